"""Files of earlier versions are read for ever; see make.py for what they are and how they were made."""

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from sagan_attn import HubGrafts, grafts_of, load_grafts
from sagan_attn.__main__ import main as command
from sagan_attn.ablation.analysis import analyse
from sagan_attn.ablation.store import read_logits, read_plan, read_results
from sagan_attn.training.cli import main as train
from sagan_attn.training.run import RunPaths, load_run
from sagan_attn.training.test_results import read_test_results

HERE = Path(__file__).parent
FORMATS = sorted(HERE.glob("v*"))
_spec = importlib.util.spec_from_file_location("long_lived_make", HERE / "make.py")
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.fixture(params=FORMATS, ids=lambda path: path.name)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, since what reads a run or an ablation may write into it."""
    return Path(shutil.copytree(request.param, tmp_path / "files"))


@pytest.fixture
def expected(files: Path) -> dict[str, Any]:
    return json.loads((files / "expected.json").read_text())


def close(found: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found.detach(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_there_are_some():
    assert [path.name for path in FORMATS] == ["v1"]


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_runs(checkpoint: str, files: Path, expected: dict[str, Any]):
    run = load_run(files / "run", checkpoint)
    close(run.model(make.images(48)), expected["run"][checkpoint])


def test_runs_of_another_place_go_on(files: Path):
    paths = RunPaths(files / "run")
    before = pd.read_csv(paths.metrics)
    assert before["epoch"].tolist() == [0]
    assert train(make.run_arguments(files)) == 0
    after = pd.read_csv(paths.metrics)
    assert after["epoch"].tolist() == [0, 1]
    pd.testing.assert_frame_equal(after[before.columns].iloc[:1], before, check_dtype=False)
    assert json.loads(paths.finished.read_text()) == {"epochs": 2, "steps": 2 * make.STEPS}


def test_results_of_tests(files: Path, expected: dict[str, Any]):
    results = read_test_results(RunPaths(files / "run"))
    right = results.logits.argmax(dim=1) == results.labels
    assert (len(right), float(right.float().mean())) == (expected["test"]["images"], expected["test"]["test/accuracy"])


@pytest.mark.slow
def test_runs_are_tested_again(files: Path, expected: dict[str, Any]):
    paths = RunPaths(files / "run")
    before = read_test_results(paths)
    paths.test_logits.unlink()
    assert train(make.test_arguments(files)) == 0
    after = read_test_results(paths)
    close(after.logits, before.logits.tolist())
    assert torch.equal(after.labels, before.labels)
    metrics = json.loads(paths.test_metrics.read_text())
    for name, value in expected["test"].items():
        assert math.isclose(metrics[name], value, rel_tol=1e-4), name


def test_grafts(files: Path, expected: dict[str, Any]):
    model = make.host()
    load_grafts(model, files / "hub" / "grafts.safetensors", example_input=make.images(24))
    assert len(grafts_of(model)) == 1 + len(make.FORMS)
    close(model(make.images(24)), expected["grafts"])


@pytest.mark.slow
def test_grafts_from_a_folder_of_the_hub(files: Path, expected: dict[str, Any]):
    grafted = HubGrafts.from_pretrained(files / "hub", model=make.host(), example_input=make.images(24))
    close(grafted.model(make.images(24)), expected["grafts"])


def test_ablations(files: Path, expected: dict[str, Any]):
    folder = files / "ablation"
    plan, (results, failures, problems) = read_plan(folder), read_results(folder)
    assert (failures, problems) == ([], [])
    assert {result["key"]: result["metrics"]["val/accuracy"] for result in results} == expected["accuracies"]
    analysis = analyse(plan, results, failures, lambda key, split: read_logits(folder, key, split))
    assert [(group.stage, len(group.cells), group.complete) for group in analysis.groups] == [
        ("confirm", 12, True),
        ("screen", 3, True),
    ]
    assert analysis.problems == ()
    for result in results:
        logits, labels = read_logits(folder, result["key"], "val")
        accuracy = float((logits.argmax(axis=1) == labels).mean())
        assert math.isclose(accuracy, result["metrics"]["val/accuracy"], abs_tol=1e-6)


@pytest.mark.slow
def test_ablations_are_reported(files: Path, capsys: pytest.CaptureFixture[str]):
    assert command(["report", str(files / "ablation")]) == 0
    assert not capsys.readouterr().err
    assert (files / "ablation" / "report" / "report.html").is_file()


@pytest.mark.slow
def test_ablations_go_on(files: Path, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    """By the same spec, with one of the results lost: it is computed again, and no other."""
    key = next(iter(expected["accuracies"]))
    results = {path: path.read_bytes() for path in (files / "ablation" / "cells").glob("*/result.json")}
    lost = files / "ablation" / "cells" / key / "result.json"
    lost.unlink()
    assert command(["ablate", str(files / "spec.yaml"), "--folder", str(files / "ablation"), "--threads", "1"]) == 0
    assert lost.is_file()
    assert {path for path, data in results.items() if path.read_bytes() != data} == {lost}
