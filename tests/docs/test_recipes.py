"""Each recipe of docs/recipes.md, run from the page itself."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from sagan_attn import graft, grafts_of, is_grafted, load_grafts
from sagan_attn.blocks.gate import Gated
from sagan_attn.errors import GraftError

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
TEXT = PAGE.read_text(encoding="utf-8")
RECIPES = dict(zip(re.findall(r"^## (.*)$", TEXT, re.M), re.findall(r"```python\n(.*?)```", TEXT, re.S), strict=True))


@pytest.fixture(autouse=True)
def _no_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pretrained weights are some weights, the same for each name: what is shown does not depend on which."""
    create = timm.create_model

    def created(name: str, pretrained: bool, **options: Any) -> nn.Module:
        assert pretrained
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return create(name, **options)

    monkeypatch.setattr(timm, "create_model", created)
    monkeypatch.chdir(tmp_path)


def cook(code: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """The names that a piece of code leaves behind."""
    names = {} if names is None else names
    exec(compile(code, PAGE.name, "exec"), names)
    return names


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what is the host's own."""
    return {key: value.clone() for key, value in model.state_dict().items() if ".grafts." not in key}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    now = state_of(model)
    assert now.keys() == before.keys()
    return {key for key in now if not torch.equal(now[key], before[key])}


def test_every_recipe_is_tested():
    assert list(RECIPES) == ["A timm classifier, fine-tuned", "The backbone of a torchvision detector",
                             "A module of one's own"]  # fmt: skip


def test_a_timm_classifier(capsys: pytest.CaptureFixture[str]):
    frozen, unfreeze, rest = RECIPES["A timm classifier, fine-tuned"].partition("model.requires_grad_(True)\n")
    names = cook(frozen)
    model, grafts = names["model"], names["grafts"]
    assert "sagan  layer3" in capsys.readouterr().out
    first = state_of(timm.create_model("resnet18", pretrained=True, num_classes=37))
    assert changed(first, model) == {"fc.weight", "fc.bias"}
    assert all(gamma != 0 for gamma in grafts.gammas().values())
    frozen_state = state_of(model)
    names = cook(unfreeze + rest, names)
    moved = changed(frozen_state, model)
    assert moved == {key for key, _ in model.named_parameters() if ".grafts." not in key}  # and no statistics
    assert not torch.equal(names["logits"], names["without"])


def test_the_backbone_of_a_detector():
    code, freeze, rest = RECIPES["The backbone of a torchvision detector"].partition("freeze_host(detector)\n")
    names = cook(code)
    detector, (block,) = names["detector"], [one.block for one in names["grafts"]]
    before = {name: parameter.clone() for name, parameter in detector.named_parameters()}
    calls: list[torch.Size] = []
    block.register_forward_hook(lambda _module, _inputs, output: calls.append(output.shape))
    names = cook(freeze + rest, names)
    assert calls == [(2, 1024, 8, 8), (2, 1024, 8, 8)]  # a training step and an evaluation, at a sixteenth
    assert set(names["losses"]) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    moved = {name for name, parameter in detector.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"backbone.body.layer3.5.grafts.sagan.gamma"}  # the rest of the block learns from the next step on
    assert len(names["found"]) == 2
    assert set(names["found"][0]) == {"boxes", "labels", "scores"}


def test_a_module_of_ones_own(tmp_path: Path):
    names = cook(RECIPES["A module of one's own"])
    fresh, images, strips = names["fresh"], names["images"], names["Strips"]
    (loaded,) = grafts_of(fresh)
    assert isinstance(loaded.block, Gated)
    assert {tuple(p.shape[2:]) for p in loaded.block.parameters() if p.ndim == 4} == {(1, 5), (5, 1)}
    again = timm.create_model("resnet18", pretrained=True).eval()
    graft(again, {"layer3": {"block": strips, "gate": True, "length": 5}}, name="strips", example_input=images)
    again.load_state_dict(fresh.state_dict())
    assert torch.equal(fresh(images), again(images))
    assert not torch.equal(fresh(images), names["before"])
    assert not is_grafted(names["model"])
    with pytest.raises(GraftError, match="strips"):  # as the page says
        load_grafts(names["model"], tmp_path / "strips.safetensors", example_input=images)
    with pytest.raises(GraftError, match="gate"):
        graft(names["model"], "layer3", block=strips, example_input=images)


def test_numbers_of_the_page():
    assert "50 x 84 = 4,200 positions" in TEXT
    assert "71 MB" in TEXT
    assert round(4 * (50 * 84) ** 2 / 1e6) == 71
