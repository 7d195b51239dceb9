"""Run folders and checkpoints say their format: a later version's are refused in words, earlier ones are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL

from sagan_attn import __version__
from sagan_attn.errors import CheckpointError, FormatError
from sagan_attn.training.cli import main
from sagan_attn.training.run import RunPaths, load_run, read_checkpoint, read_config

LATER = {"format": 2, "library": "9.1.0"}
WORDS = "has format version 2, written by sagan_attn 9.1.0; this version of the library reads 1: update it"


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> RunPaths:
    """A run of its own, that is complete."""
    return RunPaths(shutil.copytree(small_run, tmp_path / "run"))


def say(path: Path, said: Any) -> None:
    """Have a checkpoint or environment.json say that of its format; None: nothing."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        content.pop("format")
        more = {} if said is None else {"format": said["format"], "sagan_attn": said["library"]}
        path.write_text(json.dumps(content | more))
    else:
        content = torch.load(path, weights_only=True)
        content.pop("sagan_attn", None)
        torch.save(content if said is None else content | {"sagan_attn": said}, path)


def test_what_is_written(run: RunPaths):
    for name in ("best", "last"):
        assert read_checkpoint(run.checkpoint(name))["sagan_attn"] == {"format": 1, "library": __version__}
    environment = json.loads(run.environment.read_text())
    assert (environment["format"], environment["sagan_attn"]) == (1, __version__)


def test_files_from_before_there_were_formats(run: RunPaths):
    before = load_run(run.folder, "last").model.state_dict()
    say(run.environment, None)
    say(run.checkpoint("last"), None)
    after = load_run(run.folder, "last").model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    run.environment.unlink()
    load_run(run.folder, "last")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("environment.json", lambda run, path: load_run(run.folder)),
        ("environment.json", lambda run, path: read_config(run)),
        ("checkpoints/last.ckpt", lambda run, path: load_run(run.folder, "last")),
        ("checkpoints/last.ckpt", lambda run, path: read_checkpoint(path)),
    ],
)
def test_a_later_format_is_refused(name: str, read: Callable[[RunPaths, Path], Any], run: RunPaths):
    path = run.folder / name
    say(path, LATER)
    with pytest.raises(FormatError) as error:
        read(run, path)
    assert str(error.value) == f"{path} {WORDS}"


@pytest.mark.parametrize("name", ["environment.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt"])
def test_a_later_run_is_not_gone_on_with(name: str, run: RunPaths, capsys: pytest.CaptureFixture[str]):
    """Nor begun anew in its place, as one whose checkpoints are damaged."""
    say(run.folder / name, LATER)
    run.finished.unlink()
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert main(["fit", *SMALL, f"--run_dir={run.folder}", "--resume=auto"]) == 1
    assert capsys.readouterr().err == f"error: {run.folder / name} {WORDS}\n"
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1], 10**30])
def test_what_is_no_format(version: Any, run: RunPaths):
    path = run.checkpoint("last")
    say(path, {"format": version, "library": __version__})
    with pytest.raises(CheckpointError, match=r"last\.ckpt does not say its format version, which is a number from 1"):
        read_checkpoint(path)
    say(path, version)
    if version is not None:
        with pytest.raises(CheckpointError, match=r"last\.ckpt does not say its format version"):
            read_checkpoint(path)


@pytest.mark.parametrize("text", ["[]", "1", "{", '{"format": null}', '{"format": "1"}'])
def test_no_environment(text: str, run: RunPaths):
    run.environment.write_text(text)
    with pytest.raises(CheckpointError, match=r"environment\.json"):
        read_config(run)
