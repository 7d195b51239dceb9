"""A run folder that was moved, or copied to another machine, goes on there as it would have where it was."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sagan_attn.training.checkpoints import WholeFileIO, checkpoint_callbacks
from sagan_attn.training.cli import main
from sagan_attn.training.run import RunPaths


def saved(folder: Path, **more: Any) -> Path:
    """A checkpoint of a run in that folder, whose best epoch is another one."""
    place = folder / "checkpoints"
    best = str(place / "best.ckpt")
    state = {
        "dirpath": str(place),
        "best_model_path": best,
        "kth_best_model_path": best,
        "best_model_score": torch.tensor(0.75),
        "kth_value": torch.tensor(0.75),
        "best_k_models": {best: torch.tensor(0.75)},
        "last_model_path": "",
        "monitor": "val/accuracy",
        **more,
    }
    callbacks = {ModelCheckpoint(monitor="val/accuracy", mode="max").state_key: state, "Other": {"folder": best}}
    content = {"state_dict": {"network.a": torch.ones(1)}, "callbacks": callbacks}
    WholeFileIO().save_checkpoint(content, place / "last.ckpt")
    return place / "last.ckpt"


def loaded(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the file holds of the ModelCheckpoint, and of the other callback."""
    state, other = WholeFileIO().load_checkpoint(path)["callbacks"].values()
    return state, other


def test_the_best_epoch_is_remembered(tmp_path: Path):
    """By Lightning, which warns, here an error, when it forgets it."""
    saved(tmp_path / "before")
    paths = RunPaths(shutil.move(tmp_path / "before", tmp_path / "now"))
    state, other = loaded(paths.checkpoint("last"))
    best, _ = checkpoint_callbacks(paths)
    best.load_state_dict(state)
    assert best.best_model_score == best.kth_value == 0.75
    assert best.best_model_path == best.kth_best_model_path == str(paths.checkpoint("best"))
    assert best.best_k_models == {str(paths.checkpoint("best")): 0.75}
    assert best.last_model_path == ""
    assert other == {"folder": str(tmp_path / "before" / "checkpoints" / "best.ckpt")}


@pytest.mark.parametrize("where", ["/elsewhere/best.ckpt", "best.ckpt", "", None, 7])
def test_other_paths_stay(where: Any, tmp_path: Path):
    saved(tmp_path / "before", best_model_path=where, best_k_models=where)
    shutil.move(tmp_path / "before", tmp_path / "now")
    state, _ = loaded(tmp_path / "now" / "checkpoints" / "last.ckpt")
    assert state["best_model_path"] == state["best_k_models"] == where
    assert state["dirpath"] == str(tmp_path / "now" / "checkpoints")


def test_a_run_that_stays_is_read_as_it_was_written(tmp_path: Path):
    path = saved(tmp_path / "run")
    assert loaded(path) == tuple(torch.load(path, weights_only=True)["callbacks"].values())


@pytest.mark.parametrize("callbacks", [None, [], {"a": 1}, {"a": {"dirpath": 3}}, {"a": {"dirpath": ""}}])
def test_callbacks_of_any_kind(callbacks: Any, tmp_path: Path):
    path = tmp_path / "last.ckpt"
    WholeFileIO().save_checkpoint({"state_dict": {"network.a": torch.ones(1)}, "callbacks": callbacks}, path)
    assert WholeFileIO().load_checkpoint(path)["state_dict"].keys() == {"network.a"}


def test_a_config_is_that_of_the_run_it_lies_in(small_run: Path, tmp_path: Path):
    """Of a copy, whose config still names the folder it was written in; unless another is asked for."""
    copy, before = tmp_path / "copy", {path: path.read_bytes() for path in small_run.rglob("*") if path.is_file()}
    shutil.copytree(small_run, copy)
    RunPaths(copy).config.write_text(RunPaths(copy).config.read_text().replace(str(small_run), "/nowhere"))
    assert main(["test", "--config", str(copy / "config.yaml")]) == 0
    assert RunPaths(copy).test_metrics.is_file()
    assert {path: path.read_bytes() for path in small_run.rglob("*") if path.is_file()} == before
    shutil.copytree(small_run, tmp_path / "other")
    assert main(["test", "--config", str(copy / "config.yaml"), f"--run_dir={tmp_path / 'other'}"]) == 0
    assert RunPaths(tmp_path / "other").test_metrics.is_file()
