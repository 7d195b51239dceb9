"""Saved grafts and the hosts they are loaded into: which fit, and which are refused untouched."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hosts import HOSTS, Tiny, assert_same, assert_unchanged, count_calls, open_gates, snapshot
from stored import HOST, IMAGE, Shift, fresh_like, grafted, read, refused
from timm.layers import SEModule
from torch import Tensor, nn

from sagan_attn import SelfAttention2d, graft, grafts_of
from sagan_attn.blocks import create_block
from sagan_attn.errors import GraftError
from sagan_attn.surgery.store import load_grafts, save_grafts


def test_beside_grafts_that_are_there_already(saved: Path):
    model = HOST.build()
    graft(model, "top", "context-max", example_input=IMAGE)
    load_grafts(model, saved, example_input=IMAGE)
    assert [g.name for g in grafts_of(model)] == ["sagan", "context_max", "nonlocal_"]


class Twice(nn.Module):
    """One stage under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
        self.alias = self.stage

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x)


def test_modules_with_two_names_and_wrapped_models(path: Path):
    model = Twice()
    open_gates(graft(model, "alias", example_input=IMAGE))
    save_grafts(nn.DataParallel(model), path)  # sites are those of the model that was grafted
    description, tensors = read(path)
    assert [entry["site"] for entry in description["grafts"]] == ["alias"]
    assert len(tensors) == len(model.alias[1].grafts.sagan.state_dict())
    fresh = Twice()
    fresh.stage.load_state_dict({k: v for k, v in model.stage.state_dict().items() if "grafts" not in k})
    calls = count_calls(load_grafts(fresh, path, example_input=IMAGE)[0].block)
    assert_same(fresh(IMAGE + 1), model(IMAGE + 1))
    assert len(calls) == 1


def test_hosts_that_do_not_fit(saved: Path):
    refused(saved, "site 'top' puts out 32 channels in NCHW, 16 channels in NCHW are required", Tiny(32))
    refused(saved, "'sagan' at 'stage' does not fit ResNet: .*no module 'stage'", HOSTS["tv-resnet18"].build())
    with pytest.raises(GraftError, match=r"'sagan' at 'stage' .* on the meta device, where it would lose its weights"):
        load_grafts(HOST.build().to("meta"), saved, example_input=IMAGE)
    model = HOST.build()
    model.compile(backend="eager")
    refused(saved, "'the model' is compiled", model)
    model = HOST.build()
    model.top.grafts = nn.Identity()
    refused(saved, "'top' has an attribute 'grafts' of its own", model)


def test_a_graft_of_that_name_is_there(saved: Path):
    model = HOST.build()
    graft(model, "stage.1", "context-max", name="sagan", example_input=IMAGE)
    refused(saved, r"site 'stage' already has a graft named 'sagan' \(at module 'stage.1'\); take it out", model)
    refused(saved, "already has a graft named", grafted({"stage": "sagan", "top": "nonlocal"}))


def test_an_input_the_model_does_not_take(saved: Path):
    model = HOST.build().train()
    before = snapshot(model)
    with pytest.raises(GraftError, match="example_input is none that Tiny takes"):
        load_grafts(model, saved, example_input=torch.zeros(1, 4, 32, 32))
    assert_unchanged(model, before)


def test_blocks_to_be_passed(path: Path):
    model = grafted({"top": {"block": SEModule, "gate": True, "rd_ratio": 0.25, "name": "se"}, "stage": "sagan"})
    save_grafts(model, path)
    refused(path, r"'se' at 'top' \(made by 'timm.layers.*SEModule'\): .*; pass blocks={'se': ...} with it")
    refused(path, "pass blocks={'se': ...}", blocks={})
    refused(path, "blocks has 'sagan', but the file asks for 'se'", blocks={"se": SEModule, "sagan": SelfAttention2d})
    refused(path, "'se' at 'top' cannot be rebuilt: block 'selfattention2d' has no option 'rd_ratio'",
            blocks={"se": SelfAttention2d})  # fmt: skip
    refused(path, "must be a registered name, a class or a factory", blocks={"se": nn.Identity()})
    refused(path, "cannot be rebuilt: .*made a int", blocks={"se": lambda channels, rd_ratio: channels})
    refused(
        path, "'se' at 'top' are not those .* unexpected 'block.fc", blocks={"se": lambda c, rd_ratio: nn.Identity()}
    )
    refused(
        path,
        r"cannot be rebuilt: block 'lambda_' for 16 .* cannot be made: 1 \(KeyError\)",
        blocks={"se": lambda c, rd_ratio: {}[1]},
    )
    fitting = functools.partial(create_block, "sagan")
    refused(path, "'se' at 'top' cannot be rebuilt: block 'sagan' has no option 'rd_ratio'", blocks={"se": fitting})
    load_grafts(fresh_like(model), path, example_input=IMAGE, blocks={"se": SEModule})


def test_blocks_of_one_name_at_several_places(path: Path):
    """A path stands for one graft and goes before the name, which stands for all."""
    at = {site: {"block": Shift, "gate": False, "name": "own"} for site in ("stage", "down", "top")}
    model = grafted(at)
    save_grafts(model, path)
    made: list[str] = []

    def maker(word: str) -> Callable[[int], nn.Module]:
        return lambda channels: made.append(word) or Shift(channels)

    paths = [one.path for one in grafts_of(model)]
    assert paths == ["stage.1.grafts.own", "down.grafts.own", "top.grafts.own"]  # a stage's graft is in its last block
    fresh = fresh_like(model)
    grafts = load_grafts(fresh, path, example_input=IMAGE, blocks={"own": maker("all"), paths[1]: maker("one")})
    assert [one.path for one in grafts] == paths
    assert made == ["all", "one", "all"]
    assert_same(fresh(HOST.images()), model(HOST.images()))
    made.clear()
    load_grafts(fresh_like(model), path, example_input=IMAGE, blocks={word: maker(word) for word in [*paths, "own"]})
    assert made == paths

    every = ", ".join(f"'{word}': ..." for word in paths)
    refused(path, rf"'own' at 'stage' .*, .*'own' at 'top' .*; pass blocks={{{every}}} with it")
    refused(path, rf"graft 'own' at 'top' \(.*; pass blocks={{'{paths[2]}': ...}} with it",
            blocks={word: Shift for word in paths[:2]})  # fmt: skip
    for wrong in ("stage.grafts.own", "top", "owl"):
        refused(path, f"blocks has '{wrong}', but the file asks for '{paths[0]}', '{paths[1]}', '{paths[2]}'",
                blocks={"own": Shift, wrong: Shift})  # fmt: skip


def test_a_path_stands_for_a_graft_of_a_name_of_its_own_too(path: Path):
    model = grafted({"top": {"block": Shift, "gate": False}, "stage": "sagan"})
    save_grafts(model, path)
    load_grafts(fresh_like(model), path, example_input=IMAGE, blocks={"top.grafts.shift": Shift})
    refused(path, "blocks has 'stage.1.grafts.sagan', but the file asks for 'shift'",
            blocks={"shift": Shift, "stage.1.grafts.sagan": Shift})  # fmt: skip
