"""Programs of torch.export: what is dynamic, what is refused, and that files hold no paths of this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs_to_export import run_of
from torch import Tensor, nn

from sagan_attn.__main__ import main
from sagan_attn.errors import ConfigError, SaganAttnError
from sagan_attn.export import export_run, programs
from sagan_attn.training.run import load_run

ROOT = str(Path(__file__).parents[2]).encode()


class Pooled(nn.Module):
    """Logits [B, 3] by the mean over all pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(2).mean(2)


class AtMost(Pooled):
    """For images of up to 20 columns, as a table of positions may be."""

    def forward(self, images: Tensor) -> Tensor:
        torch._check(images.shape[3] <= 20)
        return super().forward(images)


class OfWidth(nn.Module):
    """For images of 8 x 8 alone."""

    def forward(self, images: Tensor) -> Tensor:
        return (images + torch.linspace(-1, 1, 64).view(8, 8)).mean((2, 3))


class Pairs(Pooled):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.zeros(2, 3)


def test_free_sizes_in_words():
    assert programs.allowed_sizes(programs.to_program(Pooled(), (8, 8), True)) == {"batch": "1 and more"}
    anything = {"batch": "1 and more", "height": "1 and more", "width": "1 and more"}
    assert programs.allowed_sizes(programs.to_program(Pooled(), (8, 8), False)) == anything
    narrow = programs.to_program(AtMost(), (16, 16), False)
    assert programs.allowed_sizes(narrow) == anything | {"width": "1 to 20"}


def test_models_of_one_size_need_to_be_told():
    with pytest.raises(ConfigError, match=r"OfWidth fixes the height and the width of its images; use --fixed-size"):
        programs.to_program(OfWidth(), (8, 8), False)
    program = programs.to_program(OfWidth(), (8, 8), True)
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(programs.load_program(programs.to_pt2(program))(images), OfWidth()(images))
    for fixed in (False, True):
        with pytest.raises(SaganAttnError, match="Pairs cannot be exported for any number of images"):
            programs.to_program(Pairs(), (8, 8), fixed)


class Branching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def test_what_cannot_be_exported():
    with pytest.raises(SaganAttnError, match=r"^Branching cannot be exported: .+") as error:
        programs.to_program(Branching(), (8, 8), True)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="Branching cannot be exported for images of any size"):
        programs.to_program(Branching(), (8, 8), False)


def test_more_weights_than_onnx_holds(monkeypatch):
    program = programs.to_program(nn.Sequential(Pooled(), nn.Linear(3, 4)), (8, 8), True)
    monkeypatch.setattr(programs, "ONNX_LIMIT", 63)
    with pytest.raises(ConfigError, match=r"64 bytes of weights do not fit into one ONNX file .* --to torch-export"):
        programs.to_onnx(program)


@pytest.fixture(scope="module")
def exported(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("program") / "model.pt2"
    assert main(["export", str(small_run), "--to", "torch-export", "--out", str(out)]) == 0
    return out


def test_a_program_of_a_run(small_run: Path, exported: Path):
    about = json.loads(Path(f"{exported}.json").read_text())
    assert (about["format"], about["fused"], about["opset"]) == ("torch-export", True, None)
    assert about["input"]["shape"] == ["batch", 3, "height", "width"]
    assert about["checks"]["random_images"]["sizes_the_model_refuses"] == []
    program, run = torch.export.load(exported), load_run(small_run)
    assert any("projections" in key for key in program.state_dict)  # of the fused graft
    for shape in ((1, 3, 48, 48), (4, 3, 31, 57)):
        images = torch.randn(shape)
        torch.testing.assert_close(program.module()(images), run.model(images), rtol=0, atol=1e-5)
    assert ROOT not in exported.read_bytes()


def test_sources_are_left_out(monkeypatch):
    """The file says of each operation where in whose source files it comes from, unless it is told not to."""
    assert ROOT not in programs.to_pt2(programs.to_program(Pooled(), (8, 8), True))
    monkeypatch.setattr(programs, "_forget_sources", lambda program: None)
    assert ROOT in programs.to_pt2(programs.to_program(Pooled(), (8, 8), True))


@pytest.mark.slow
def test_a_program_runs_without_this_library(exported: Path):
    code = (
        f"import sys, torch; program = torch.export.load({str(exported)!r}).module();"
        "print(list(program(torch.zeros(3, 3, 48, 50)).shape), 'sagan_attn' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[3, 10] False"


HOSTS = {
    "resnet18": ("timm/resnet18", [{"at": "layer3"}, {"at": "layer2", "block": "biggan"}], 64),
    "positions": ("timm/resnet18", [{"at": "layer3", "block": "multihead", "options": {"position": "relative"}}], 75),
    "convnext": ("timm/convnext_atto", [{"at": "stages.2", "block": "nonlocal"}], 64),
    "encoder": ("resnet20", [{"at": "layer3", "block": "encoder"}, {"at": "layer2", "block": "nonlocal-caffe2"}], 33),
    "plain": ("resnet9", [], 32),
}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
@pytest.mark.parametrize("name", HOSTS)
def test_hosts(name: str, to: str, tmp_path: Path):
    run = run_of(*HOSTS[name], channels_last=name in ("convnext", "resnet18"))
    _, found = export_run(run, to, tmp_path, fused=name != "resnet18")
    assert found["fused"] == (name not in ("plain", "resnet18"))
    assert found["input"]["shape"] == ["batch", 3, "height", "width"]
    random = found["checks"]["random_images"]
    assert len(random["shapes"]) == 6
    assert 0 <= random["logits"] < 1e-5 * max(1, random["largest_logit"])


@pytest.mark.slow
def test_small_maps_need_a_fixed_size(tmp_path: Path):
    """The last map is of one position at 32 pixels, of which torch makes another program than of others."""
    run = run_of("timm/resnet18", [{"at": "layer3"}], 32)
    with pytest.raises(SaganAttnError, match=r"fails for images 1x3x32x32: .* --fixed-size may do"):
        export_run(run, "torch-export", tmp_path)
    assert not list(tmp_path.iterdir())
    _, found = export_run(run, "torch-export", tmp_path, fixed_size=True)
    assert found["input"]["shape"] == ["batch", 3, 32, 32]


@pytest.mark.slow
def test_transformers_take_one_size(tmp_path: Path):
    run = run_of("timm/vit_tiny_patch16_224", [], 224)
    with pytest.raises(ConfigError, match=r"no images of another size than 224 x 224 \(.+\); use --fixed-size"):
        export_run(run, "onnx", tmp_path)
    export_run(run, "onnx", tmp_path, fixed_size=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.onnx", "made.onnx.json"]
