"""Two runs on the same images, and pairs that cannot be compared."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from sagan_attn.__main__ import main
from sagan_attn.errors import CheckpointError
from sagan_attn.inference.compare import compare_runs
from sagan_attn.training.run import RunPaths
from sagan_attn.training.test_results import StoredLogits, write_test_results

LABELS = torch.arange(64) % 10


def with_logits(
    folder: Path, predicted: Tensor, labels: Tensor = LABELS, data: str | None = "same", classes: int = 10
) -> Path:
    """A run folder whose test gave these classes, with a logit of 2 and zeros."""
    logits = 2 * torch.nn.functional.one_hot(predicted, classes).float()
    write_test_results(RunPaths(folder), StoredLogits(logits, labels, data), {})
    return folder


@pytest.fixture
def runs(small_run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A is wrong on images 0 to 4, B on 3 to 11."""
    wrong = (LABELS + 1) % 10
    a, b = LABELS.clone(), LABELS.clone()
    a[:5], b[3:12] = wrong[:5], wrong[3:12]
    for name in ("a", "b"):
        shutil.copytree(small_run, tmp_path / name)
    return with_logits(tmp_path / "a", a), with_logits(tmp_path / "b", b)


def test_the_pairs(runs: tuple[Path, Path]):
    found = compare_runs(*runs)
    pairs = found.pairing
    assert (pairs.both, pairs.only_a, pairs.only_b, pairs.neither) == (52, 7, 3, 2)
    assert pairs.p_value == pytest.approx(2 * (1 + 10 + 45 + 120) / 2**10)
    assert [one.accuracy for one in found.scores] == [59 / 64, 55 / 64]
    assert sorted(one.index for one in found.changes if one.gained) == [0, 1, 2]
    assert sorted(one.index for one in found.changes if not one.gained) == [5, 6, 7, 8, 9, 10, 11]
    right, wrong = torch.tensor([2.0, *[0.0] * 9]).softmax(0)[:2].tolist()
    assert {round(one.probability_b, 5) for one in found.changes if one.gained} == {round(right, 5)}
    assert {round(one.probability_a, 5) for one in found.changes if one.gained} == {round(wrong, 5)}


def test_the_command(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "changed.png"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "64 images: both right 52, A alone 7, B alone 3, neither 2" in said
    assert "B - A: -6.25 points of accuracy" in said
    assert "p = 0.34: not distinguishable on these images" in said
    assert "ms an image" in said
    table = pd.read_csv(out.with_suffix(".csv"))
    assert sorted(table["index"][table["right"] == "B"]) == [0, 1, 2]
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["pairs"] == {"both": 52, "only_a": 7, "only_b": 3, "neither": 2}
    assert content["a"]["parameters"] == content["b"]["parameters"] > content["a"]["graft_parameters"] > 0
    with Image.open(out) as sheet:
        assert sheet.width > 500
    assert main(["compare", *map(str, runs), "--no-timing"]) == 0
    assert "ms an image" not in capsys.readouterr().out


def test_a_clear_difference_is_said(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    with_logits(runs[1], (LABELS + 1) % 10)
    assert main(["compare", *map(str, runs), "--no-timing"]) == 0
    assert "A is right more often" in capsys.readouterr().out
    assert main(["compare", *map(str, reversed(runs)), "--no-timing"]) == 0
    assert "B is right more often" in capsys.readouterr().out


def test_other_data_are_refused(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    a, b = runs
    for change, message in (
        ({"data": "other"}, "the images or the names of the classes are not the same"),
        ({"data": "other", "labels": LABELS.roll(1)}, "64 of 64 labels differ"),
        ({"data": "other", "classes": 11}, "10 and 11 classes"),
        ({"data": None}, "was tested by an earlier version"),
    ):
        with_logits(b, LABELS, **change)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=message):
            compare_runs(a, b)
    with_logits(b, LABELS[:60], LABELS[:60], data="other")
    with pytest.raises(CheckpointError, match="tested on different data: 64 and 60 images"):
        compare_runs(a, b)
    with pytest.raises(CheckpointError, match="are the same run"):
        compare_runs(a, a)
    assert main(["compare", str(a), str(b)]) == 2
    assert "tested on different data" in capsys.readouterr().err
    RunPaths(b).test_logits.unlink()
    with pytest.raises(CheckpointError, match=r"has no test_logits.safetensors: run `python train.py test --config"):
        compare_runs(a, b)


def test_damaged_logits_are_refused(runs: tuple[Path, Path]):
    a, b = runs
    file = RunPaths(b).test_logits
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="is damaged"):
        compare_runs(a, b)
    for logits, labels in (
        (torch.zeros(64, 10), torch.full((64,), 10)),
        (torch.zeros(64, 10), torch.full((64,), -1)),
        (torch.zeros(64, 10).half(), LABELS),
        (torch.zeros(64), LABELS),
        (torch.zeros(63, 10), LABELS),
    ):
        write_test_results(RunPaths(b), StoredLogits(logits, labels, "same"), {})
        with pytest.raises(CheckpointError, match=r"test_logits.safetensors (holds no logits|has labels)"):
            compare_runs(a, b)
