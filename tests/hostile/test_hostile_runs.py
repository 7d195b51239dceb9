"""Run folders from elsewhere: what is read of them besides checkpoints, and what their links lead to."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from canary import Canary
from small_runs import SMALL

from sagan_attn.__main__ import main
from sagan_attn.errors import CheckpointError, SaganAttnError
from sagan_attn.training.cli import main as train
from sagan_attn.training.logger import EpochCSV
from sagan_attn.training.run import RunPaths, load_run


@pytest.fixture
def copy(small_run: Path, tmp_path: Path) -> RunPaths:
    shutil.copytree(small_run, tmp_path / "run")
    return RunPaths(tmp_path / "run")


def bomb() -> str:
    """9 ** 12 values in some hundred bytes of YAML."""
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    return "\n".join([*lines, *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])


FILES: list[tuple[str, str, str]] = [
    ("config.yaml", "model: !!python/object/apply:canary_in_a_mine.boom []", "config.yaml cannot be read"),
    ("config.yaml", "!!python/name:canary_in_a_mine.boom", "config.yaml cannot be read"),
    ("config.yaml", "model: " + "[" * 600, "config.yaml cannot be read"),
    ("config.yaml", bomb(), "config.yaml has more than 200,000 values"),
    ("config.yaml", "- model", "config.yaml is not the config of a run: it must be a mapping"),
    ("config.yaml", "model: {host: lookup-cnn, grafts: []}", "config.yaml is not the config of a run"),
    ("config.yaml", "model: {host: {name: 7}, grafts: []}", "config.yaml is not the config of a run: its host has no"),
    ("config.yaml", "model: {host: {name: a, options: [1]}, grafts: []}", "its host has no name or no options"),
    ("config.yaml", "model: {host: {name: a, code: 1}, grafts: []}", "config.yaml is not the config of a run"),
    ("config.yaml", "model: {host: {name: lookup-cnn}, grafts: 3}", "config.yaml is not the config of a run"),
    ("config.yaml", "model: {host: {name: lookup-cnn}, grafts: [at]}", "config.yaml is not the config of a run"),
    ("classes.json", "[" * 200_000, "classes.json cannot be read: .*recursion"),
    ("classes.json", '["a", 5]', "classes.json is not a list of class names"),
    ("classes.json", "[" + "9" * 5_000 + "]", "classes.json cannot be read"),
    ("transform.json", "[[1]]", "transform.json is not the transform of a run"),
    ("transform.json", '{"a":' * 200_000, "transform.json cannot be read"),
]


@pytest.mark.parametrize(("name", "text", "match"), FILES)
def test_hostile_files_of_a_run(name: str, text: str, match: str, copy: RunPaths, canary: Canary):
    (copy.folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=match) as error:
        load_run(copy.folder)
    assert str(copy.folder) in str(error.value)
    assert canary.sang == []


@pytest.mark.parametrize("name", ["config.yaml", "classes.json", "transform.json"])
def test_files_that_are_no_files_or_too_large(name: str, copy: RunPaths):
    path = copy.folder / name
    os.truncate(path, 10**11)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it has more than 10,000,000 bytes"):
        load_run(copy.folder)
    for make in (
        os.mkfifo,
        os.mkdir,
        lambda place: os.symlink("/dev/zero", place),
        lambda place: os.symlink(place, place),
    ):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(CheckpointError, match=f"is not a whole run folder: {name} is missing"):
            load_run(copy.folder)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: " + "[" * 600, "config.yaml cannot be read"),
        (bomb(), "config.yaml has more than"),
        ("[]", "be a mapping"),
    ],
)
@pytest.mark.slow
def test_a_run_goes_on_from_no_hostile_config(text: str, match: str, copy: RunPaths, capsys: Any):
    copy.config.write_text(text)
    assert train(["fit", *SMALL, "--run_dir", str(copy.folder), "--resume", "auto"]) == 1
    error = capsys.readouterr().err
    assert re.search(match, error.splitlines()[-1])


def test_images_are_of_no_foreign_data_set(copy: RunPaths, canary: Canary, tmp_path: Path, capsys: Any):
    """`dataset:4` makes the data of the run's config."""
    run = ["explore", "--checkpoint", str(copy.folder), "--out", str(tmp_path / "a.html"), "--images", "dataset:4"]
    config = yaml.safe_load(copy.config.read_text())
    for data, match in (
        ({"class_path": "TorchvisionData", "init_args": {"dataset": canary.bomb}}, "names 'canary_in_a_mine.Bomb'"),
        ({"class_path": "TorchvisionData", "init_args": {"dataset": "torchvision.datasets.LSUN"}}, "none of the data"),
        ({"class_path": canary.bomb}, "are not of this library"),
        ({"class_path": "canary_in_a_mine.LookupData"}, "none of the classes"),
        (
            {"class_path": "LookupData", "init_args": {"augment": {"class_path": canary.bomb}}},
            "augment.class_path names",
        ),
        ({"class_path": "LookupData", "init_args": {"augment": {"x": 1}}}, "does not fit LookupData"),
        ({"class_path": "LookupData", "init_args": {"augment": "evil.yaml"}}, "augment must be a mapping"),
        (canary.bomb, "names no data"),
    ):
        copy.config.write_text(yaml.safe_dump({**config, "data": data}))
        assert main(run) == 2
        error = capsys.readouterr().err
        assert match in error
        assert str(copy.folder) in error
        assert error.count("\n") == 1
    assert canary.sang == []
    assert not (tmp_path / "a.html").exists()
    copy.config.write_text(yaml.safe_dump(config))
    (copy.classes).write_text(json.dumps(["a", "b"]))
    with pytest.raises(SaganAttnError):
        load_run(copy.folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "step\n1\n",
        "epoch,a\nx,1\n",
        "epoch,a\n1,=1+1\n",
        "epoch,a\ninf,1\n",
        "\0\n1\n",
        "\udcff",
    ],
)
def test_a_hostile_log_is_not_gone_on_with(text: str, tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"metrics.csv is not the log of a run"):
        EpochCSV(path)
    os.truncate(path, 10**11)
    with pytest.raises(CheckpointError, match=r"it has more than 100,000,000 bytes"):
        EpochCSV(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_what_a_run_writes_replaces_links(copy: RunPaths, tmp_path: Path):
    """`test` in a folder from elsewhere."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("test_metrics.json", "test_logits.safetensors"):
        (home / name).write_text("mine")
        (copy.folder / name).symlink_to(home / name)
    assert train(["test", *SMALL, "--run_dir", str(copy.folder)]) == 0
    for name in ("test_metrics.json", "test_logits.safetensors"):
        assert (home / name).read_text() == "mine"
        assert not (copy.folder / name).is_symlink()


@pytest.mark.slow
def test_linked_checkpoints_are_of_another_run(copy: RunPaths, tmp_path: Path, capsys: Any):
    copy.checkpoints.rename(tmp_path / "other")
    copy.checkpoints.symlink_to(tmp_path / "other")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "other").iterdir()}
    assert train(["fit", *SMALL, "--run_dir", str(copy.folder), "--ckpt_path", "last"]) == 1
    assert "is not of the run in" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "other").iterdir()} == before
