"""`python -m sagan_attn export`: what it says, what it refuses, and what it leaves behind when it fails."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from file_faults import room_for
from PIL import Image

from sagan_attn.__main__ import main
from sagan_attn.errors import ConfigError
from sagan_attn.export import export, export_run, load_exported, programs
from sagan_attn.training.run import RunPaths, load_run


def refused(capsys: pytest.CaptureFixture, *arguments: object, code: int = 2) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == code
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line.removeprefix("error: ")


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> RunPaths:
    shutil.copytree(small_run, tmp_path / "copy")
    return RunPaths(tmp_path / "copy")


def test_what_is_said(small_run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.safetensors").write_text("an older one")
    assert main(["export", str(small_run), "--to", "safetensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = (tmp_path / "small.safetensors").stat().st_size
    assert lines[0] == f"small.safetensors: safetensors, {size:,} bytes, not fused"
    assert lines[1] == "images batch x 3 x 48 x 48 (batch 1 and more), 10 classes"
    assert lines[2].startswith("random images: largest difference 0 of logits up to ")
    assert "other top class for 0 of 10 (1x3x48x48, 2x3x48x48, 7x3x48x48)" in lines[2]
    assert lines[3].startswith("real images (the test split, 64 of 64): largest difference 0 of logits")
    assert lines[4] == "small.safetensors.json: classes, preprocessing, checks"
    about, run = json.loads((tmp_path / "small.safetensors.json").read_text()), load_run(small_run)
    assert about["classes"] == run.classes
    assert about["source"] == {
        "run": small_run.name,
        "checkpoint": "best",
        "host": "lookup-cnn",
        "grafts": [{"at": "local", "block": "sagan"}],
    }
    recipe = about["preprocess"].pop("recipe")
    assert about["preprocess"] == run.transform.to_dict()
    assert "shorter side is round(48 / 1) = 48" in recipe[1]
    assert about["versions"]["torch"]
    read = load_exported("small.safetensors")
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(read.model(images), run.model(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.safetensors", "small.safetensors.json"]


def test_last_checkpoint_own_images_and_a_compiled_run(copy: RunPaths, tmp_path: Path, capsys):
    config = yaml.safe_load(copy.config.read_text())
    config["model"]["compile"] = True
    copy.config.write_text(yaml.safe_dump(config))
    state = torch.load(copy.checkpoint("last"), weights_only=True)
    state["state_dict"]["network.head.bias"] += 3
    torch.save(state, copy.checkpoint("last"))
    Image.new("L", (80, 50)).save(tmp_path / "one.png")
    Image.new("RGB", (48, 48)).save(tmp_path / "two.png")
    for number, last in enumerate((["--checkpoint", "last"], [])):
        run = copy.folder if last else copy.checkpoint("last")
        out = tmp_path / f"{number}.safetensors"
        arguments = ["--to", "safetensors", "--images", str(tmp_path / "*.png"), *last, "--out", str(out)]
        assert main(["export", str(run), *arguments]) == 0
        assert f"real images ({tmp_path}/*.png: 2 of 2): " in capsys.readouterr().out
        assert json.loads(Path(f"{out}.json").read_text())["source"]["checkpoint"] == "last"
        head = load_exported(out).model.get_submodule("head")
        assert torch.equal(head.bias, state["state_dict"]["network.head.bias"])


def test_data_that_are_not_here(copy: RunPaths, tmp_path: Path, capsys):
    config = yaml.safe_load(copy.config.read_text())
    config["data"] = {"class_path": "FolderData", "init_args": {"root": str(tmp_path / "moved")}}
    copy.config.write_text(yaml.safe_dump(config))
    assert main(["export", str(copy.folder), "--to", "safetensors", "--out", str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[3]
    assert line.startswith("real images: none, as the test split cannot be had: the image folder ")
    about = json.loads((tmp_path / "copy.safetensors.json").read_text())
    assert about["checks"]["real_images"] == {"from": line.removeprefix("real images: ")}
    assert "there is no image, folder" in refused(capsys, copy.folder, "--to", "safetensors", "--images", "gone.jpg")


def test_what_is_refused(small_run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["--to", "tflite"], "invalid choice: 'tflite'"),
        ([], "the following arguments are required: --to"),
        (["--to", "onnx", "--tolerance", "nan"], "'nan' must be a number of at least 0"),
        (["--to", "onnx", "--out", "gone/a.onnx"], "there is no folder gone to write a.onnx into: make it first"),
        (["--to", "onnx", "--out", "a.pt2"], "a.pt2 must end in .onnx, as onnx files do, or name a folder"),
        (["--to", "torch-export", "--out", "a"], "a must end in .pt2"),
        (["--to", "safetensors", "--no-fuse"], "safetensors holds the weights as trained"),
        (["--to", "safetensors", "--fixed-size"], "safetensors holds the weights as trained"),
    ):
        assert words in refused(capsys, small_run, *arguments)
    assert "there is no run folder gone" in refused(capsys, "gone", "--to", "onnx")
    best = small_run / "checkpoints" / "best.ckpt"
    assert "not the one that was asked for, 'last'" in refused(capsys, best, "--to", "onnx", "--checkpoint", "last")
    with pytest.raises(ConfigError, match="format 'tflite' must be one of onnx, torch-export, safetensors"):
        export_run(load_run(small_run), "tflite")
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_run_is_not_replaced(copy: RunPaths, capsys):
    copy.test_logits.write_bytes(b"logits")
    assert "is a file of the run itself" in refused(
        capsys, copy.folder, "--to", "safetensors", "--out", copy.test_logits
    )
    assert copy.test_logits.read_bytes() == b"logits"


@pytest.mark.parametrize(
    ("missing", "words"), [({"onnx"}, "onnx, which is"), ({"onnxruntime", "onnxscript"}, "are not")]
)
def test_packages_that_are_missing(missing: set[str], words: str, small_run: Path, monkeypatch, capsys):
    monkeypatch.setattr(programs, "find_spec", lambda name: None if name in missing else find_spec(name))
    line = refused(capsys, small_run, "--to", "onnx")
    assert words in line
    assert line.endswith("installed: pip install 'sagan_attn[export]'")


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """Path of a file to be replaced, and of the one beside it, alone in their folder."""
    (tmp_path / "out").mkdir()
    for name in ("model.safetensors", "model.safetensors.json"):
        (tmp_path / "out" / name).write_text("an older one")
    return tmp_path / "out" / "model.safetensors"


def assert_as_it_was(older: Path) -> None:
    names = ["model.safetensors", "model.safetensors.json"]
    assert sorted(path.name for path in older.parent.iterdir()) == names
    assert {path.read_text() for path in older.parent.iterdir()} == {"an older one"}


def test_what_differs_is_not_written(small_run: Path, older: Path, monkeypatch, capsys):
    pack = export.pack

    def damaged(run) -> bytes:
        data = bytearray(pack(run))
        data[-1] ^= 1
        return bytes(data)

    monkeypatch.setattr(export, "pack", damaged)
    assert "of the export has other numbers" in refused(capsys, small_run, "--to", "safetensors", "--out", older)
    assert_as_it_was(older)
    monkeypatch.setattr(export, "check_weights", lambda *_: None)
    line = refused(capsys, small_run, "--to", "safetensors", "--out", older, "--tolerance", 0)
    assert "the export differs from the model by" in line
    assert_as_it_was(older)


def test_a_full_disk(small_run: Path, older: Path, capsys):
    with room_for(100_000):
        line = refused(capsys, small_run, "--to", "safetensors", "--out", older, code=1)
    assert str(older) in line
    assert_as_it_was(older)


def test_a_folder_in_the_way_of_the_description(small_run: Path, older: Path, capsys):
    older.with_name("model.safetensors.json").unlink()
    older.with_name("model.safetensors.json").mkdir()
    assert "Is a directory" in refused(capsys, small_run, "--to", "safetensors", "--out", older, code=1)
    assert older.read_text() == "an older one"
    assert len(list(older.parent.iterdir())) == 2
