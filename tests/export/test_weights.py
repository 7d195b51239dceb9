"""The safetensors file: bit for bit, without code, and refused when it is not what it should be."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import rng_states
from runs_to_export import run_of
from safetensors import safe_open
from safetensors.torch import load, save

from sagan_attn.errors import CheckpointError, FormatError
from sagan_attn.export import export_run, load_exported
from sagan_attn.export.weights import KEY, pack, unpack
from sagan_attn.training.run import Run


def assert_read_back(run: Run, path: Path) -> None:
    before = rng_states()
    read = load_exported(path)
    assert rng_states() == before
    own, theirs = run.model.state_dict(), read.model.state_dict()
    assert list(own) == list(theirs)
    for key, tensor in own.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key
    size = run.transform.image_size
    images = torch.randn(3, 3, size, size)
    # The layout of the weights, which the file does not keep, decides how convolutions round.
    assert torch.equal(read.model(images), copy.deepcopy(run.model).to(memory_format=torch.contiguous_format)(images))
    assert (read.classes, read.transform, read.model.training) == (run.classes, run.transform, False)


RELATIVE = {"at": "layer2", "block": "multihead", "options": {"position": "relative"}}
RUNS: dict[str, tuple[str, list[dict[str, Any]], int, bool]] = {
    "several": ("resnet20", [RELATIVE, {"at": "layer3"}], 20, True),
    "none": ("lookup-cnn", [], 16, False),
    "timm": ("timm/convnext_atto", [{"at": "stages.2", "block": "nonlocal", "name": "own"}], 32, True),
}


@pytest.mark.parametrize("name", ["several", "none", pytest.param("timm", marks=pytest.mark.slow)])
def test_a_round_trip_is_exact(name: str, tmp_path: Path):
    host, grafts, size, channels_last = RUNS[name]
    run = run_of(host, grafts, size, channels_last=channels_last)
    path, found = export_run(run, "safetensors", tmp_path / "model.safetensors")
    assert_read_back(run, path)
    assert found["checks"]["random_images"]["logits"] < (1e-5 if channels_last else 1e-30)
    assert found["fused"] is False
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()[KEY])
    assert content["classes"] == run.classes
    assert content["host"]["weights"] is None


def test_a_pruned_run_with_local_weights_needs_them_no_more(tmp_path: Path):
    run = run_of("lookup-cnn", [{"at": "local", "block": "multihead", "pruned_heads": [1]}], 16)
    run.config["model"]["host"]["weights"] = "gone.safetensors"
    path, _ = export_run(run, "safetensors", tmp_path)
    assert path == tmp_path / "made.safetensors"
    assert_read_back(run, path)


def changed(data: bytes, **changes: Any) -> bytes:
    with_metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return save(load(data), {KEY: json.dumps(json.loads(with_metadata[KEY]) | changes)})


@pytest.fixture(scope="module")
def packed() -> bytes:
    torch.manual_seed(0)
    return pack(run_of("lookup-cnn", [{"at": "local"}], 16))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": 2}, "m has format version 2; this version of the library reads 1: update it"),
        ({"format": True}, "does not say its format version"),
        ({"classes": ["a", 1]}, "classes is missing or wrong"),
        ({"classes": None, "host": []}, "host, classes is missing or wrong"),
        ({"classes": ["a", "b"]}, "m does not fit the model: head.weight is"),
        ({"grafts": []}, "m does not fit the model: local.act.grafts"),
        ({"grafts": [{"code": 1}]}, "does not describe a model"),
        ({"grafts": [1]}, "does not describe a model"),
        ({"host": {"name": "lookup-cnn", "weights": "/etc/passwd"}}, "no weights"),
        ({"host": {"name": 5}}, "must have a name"),
    ],
)
def test_files_that_say_something_else(packed: bytes, changes: dict[str, Any], match: str):
    with pytest.raises(FormatError if changes.get("format") == 2 else CheckpointError, match=match):
        unpack(changed(packed, **changes), "m")


def test_files_that_are_none(packed: bytes, tmp_path: Path):
    assert unpack(changed(packed), "m").classes == list("abcde")
    for data in (
        b"",
        packed[:100],
        b"\0" * 50,
        save({"a": torch.zeros(2)}),
        save({"a": torch.zeros(2)}, {KEY: "[" * 9}),
    ):
        with pytest.raises(CheckpointError, match="m is no file of `export --to safetensors`, or not a whole one"):
            unpack(data, "m")
    with pytest.raises(CheckpointError, match="m is not a whole safetensors file"):
        unpack(packed[:-1], "m")
    with pytest.raises(CheckpointError, match=r"there is no file .*gone"):
        load_exported(tmp_path / "gone")
