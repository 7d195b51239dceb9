"""What `save_grafts` refuses, and that a write that fails leaves the old file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stored import HOST, Shift, grafted
from torch import nn

from sagan_attn import SelfAttention2d, files
from sagan_attn.errors import GraftError
from sagan_attn.surgery.heads import prune_heads
from sagan_attn.surgery.store import save_grafts


def test_nothing_to_save(path: Path):
    with pytest.raises(GraftError, match="Tiny has no grafts to save; graft first"):
        save_grafts(HOST.build(), path)
    assert not path.exists()


@pytest.mark.parametrize("value", [nn.ReLU, {1: 2}, float("nan"), {1, 2}, torch.zeros(2)])
def test_options_that_are_no_json(value: Any, path: Path):
    def factory(channels: int, what: Any) -> nn.Module:
        return Shift(channels)

    model = grafted({"top": {"block": factory, "what": value, "gate": False}})
    with pytest.raises(
        GraftError, match=r"'factory' at 'top' cannot .* its option 'what' cannot be written: JSON .* factory"
    ):
        save_grafts(model, path)
    assert not path.exists()


def test_a_block_changed_since_it_was_grafted(path: Path):
    model = grafted("top")
    model.top.grafts.sagan.query = nn.Conv2d(16, 4, 1)
    with pytest.raises(GraftError, match=r"'sagan' at 'top' was changed since it was made .*query.weight is \(4, 16,"):
        save_grafts(model, path)
    model = grafted("top")
    model.top.grafts.sagan.__class__ = type("Other", (SelfAttention2d,), {})
    with pytest.raises(GraftError, match=r"was changed since .* it is a Other, SelfAttention2d would be made"):
        save_grafts(model, path)
    model = grafted("top")
    model.top.grafts.sagan.register_buffer("extra", torch.zeros(1))
    with pytest.raises(GraftError, match=r"was changed since .*unexpected 'extra'"):
        save_grafts(model, path)


def test_pruned_heads(path: Path):
    model = grafted("top", block="multihead")
    prune_heads(model, {"top": [0]})
    with pytest.raises(GraftError, match=r"'multihead' at 'top' (cannot be saved|was changed)"):
        save_grafts(model, path)


def test_tensors_that_cannot_be_saved(path: Path):
    with pytest.raises(GraftError, match=r"'gamma' of .*'top'.* is no plain tensor with values \(.* on meta\)"):
        save_grafts(grafted("top").to("meta"), path)

    class Words(Shift):
        def get_extra_state(self) -> Any:
            return "word"

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(GraftError, match=r"'_extra_state' of .* is no plain tensor with values \(str\)"):
        save_grafts(grafted("top", block=Words, gate=False), path)
    model = grafted("top", block=Shift, gate=False)
    model.top.grafts.shift.by = model.top.grafts.shift.by.to(torch.complex128)
    with pytest.raises(GraftError, match=r"\(torch.complex128\) has no form in a safetensors file"):
        save_grafts(model, path)


def test_two_models_grafted_apart(path: Path):
    pair = nn.Sequential(grafted("top"), grafted("top"))
    with pytest.raises(GraftError, match=r"two of graft 'sagan' at 'top'; Sequential contains models .*grafted apart"):
        save_grafts(pair, path)


def test_paths_that_cannot_be_written(path: Path):
    for wrong in (path / "missing" / "file", path.parent, path.with_name("x" * 300)):
        with pytest.raises(GraftError, match="the grafts cannot be written to"):
            save_grafts(grafted("top"), wrong)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(what: str, saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = saved.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, what, fail)
    with pytest.raises(GraftError, match=r"cannot be written to .*attn.safetensors': disk full"):
        save_grafts(grafted("top"), saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupted_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = saved.read_bytes()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_grafts(grafted("top"), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
