"""A run that was stopped anywhere and goes on by the same command ends as one that was never stopped."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from small_runs import SMALL
from torch import Tensor

from sagan_attn.training.cli import main
from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.run import RunPaths

# dropout draws from the global generator; averaged weights and the schedule have a state of their own
GRAFTS = [{"at": "local", "block": "multihead", "options": {"dropout": 0.2}}]
AVERAGING = [{"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.9}}]
RUN = [
    *["fit", *SMALL, f"--model.grafts={json.dumps(GRAFTS)}", f"--trainer.callbacks={json.dumps(AVERAGING)}"],
    *["--model.schedule.name=onecycle", "--data.n_train=160", "--resume=auto"],
    *['--model.host.options={"width": 16}', "--data.n_val=16", "--data.n_test=16"],
    *["--model.freeze_host=true", "--model.unfreeze_epoch=1"],
]
BATCHES = 5  # an epoch


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """A test run that a shell began in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ignored_signals_stay_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    at_batch(2, send(signal.SIGINT), monkeypatch)
    assert main([*RUN, f"--run_dir={tmp_path / 'run'}"]) == 0


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*RUN, f"--run_dir={folder}"]) == 0
    return folder


def content(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(RunPaths(folder).checkpoint(name), weights_only=True)


def differing(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two nested contents differ, to the bit."""
    if isinstance(one, Tensor):
        return [] if isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other) else [at]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [at]
        return [found for key in one for found in differing(one[key], other[key], f"{at}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [at]
        return [
            found for i, (a, b) in enumerate(zip(one, other, strict=True)) for found in differing(a, b, f"{at}.{i}")
        ]
    return [] if one == other else [at]


def assert_same_run(folder: Path, other: Path) -> None:
    pd.testing.assert_frame_equal(
        pd.read_csv(RunPaths(folder).metrics), pd.read_csv(RunPaths(other).metrics), check_exact=True
    )
    for name in ("last", "best"):
        one, two = content(folder, name), content(other, name)
        for both in (one, two):  # where the run lies, and the batches since the process began
            both["callbacks"] = {
                key: v for key, v in both["callbacks"].items() if not key.startswith("ModelCheckpoint")
            }
            both["loops"]["fit_loop"].pop("epoch_loop.state_dict")
        one["loops"], two["loops"] = one["loops"]["fit_loop"], two["loops"]["fit_loop"]
        assert not differing(one, two)
    assert RunPaths(folder).finished.read_text() == RunPaths(other).finished.read_text()


def at_batch(number: int, do: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the run do something in its n-th training step."""
    step, seen = ClassifierModule.training_step, []

    def training_step(module: ClassifierModule, batch: Any, batch_idx: int) -> Tensor:
        seen.append(batch_idx)
        if len(seen) == number:
            do()
        return step(module, batch, batch_idx)

    monkeypatch.setattr(ClassifierModule, "training_step", training_step)


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    ("signum", "batch"),
    [
        (signal.SIGINT, 7),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, BATCHES, marks=pytest.mark.slow),  # the epoch ends before the run does
        pytest.param(signal.SIGINT, 2 * BATCHES - 1, marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal(
    signum: int, batch: int, never_stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_batch(batch, send(signum), patch)
        assert main([*RUN, f"--run_dir={folder}"]) == 128 + signum
    assert f"--run_dir {folder} --resume auto" in capsys.readouterr().err
    assert content(folder)["global_step"] == batch
    assert not RunPaths(folder).finished.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main([*RUN, f"--run_dir={folder}"]) == 0
    assert_same_run(folder, never_stopped)


@pytest.mark.slow
def test_stopped_at_the_last_batch_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    at_batch(2 * BATCHES, send(signal.SIGTERM), monkeypatch)
    assert main([*RUN, f"--run_dir={tmp_path / 'run'}"]) == 0
    assert RunPaths(tmp_path / "run").finished.is_file()


@pytest.mark.slow
def test_killed_after_a_checkpoint_in_mid_epoch(never_stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """kill -9 leaves what is on the disk; here the process ends at once, without a single hook."""
    folder = tmp_path / "run"
    for batch in (3, 5, 2, 1):  # batches after which it dies, each time from where it went on
        child = os.fork()
        if child == 0:
            at_batch(batch, lambda: os._exit(9), monkeypatch)
            main([*RUN, f"--run_dir={folder}", "--checkpoint_minutes=1e-9"])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert content(folder)["global_step"] == 2 + 4 + 1
    assert main([*RUN, f"--run_dir={folder}"]) == 0
    assert_same_run(folder, never_stopped)


@pytest.mark.slow
def test_killed_between_an_epochs_checkpoint_and_its_metrics(
    never_stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    for _ in range(2):
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(_LoggerConnector, "update_train_epoch_metrics", lambda _: os._exit(9))
            main([*RUN, f"--run_dir={folder}"])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert content(folder)["global_step"] == 2 * BATCHES
    assert main([*RUN, f"--run_dir={folder}"]) == 0
    assert_same_run(folder, never_stopped)


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    at_batch(2, twice, monkeypatch)
    assert main([*RUN, f"--run_dir={tmp_path / 'run'}"]) == 130
    assert not RunPaths(tmp_path / "run").checkpoint("last").exists()


def test_damaged_checkpoints_are_passed_over(
    never_stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    paths = RunPaths(tmp_path / "run")
    with monkeypatch.context() as patch:
        at_batch(BATCHES + 2, send(signal.SIGTERM), patch)
        assert main([*RUN, f"--run_dir={paths.folder}"]) == 143
    data = paths.checkpoint("last").read_bytes()
    paths.checkpoint("last").write_bytes(data[: len(data) // 2])
    assert main([*RUN, f"--run_dir={paths.folder}"]) == 0
    assert f"passed over: {paths.checkpoint('last')} is not a whole checkpoint" in capsys.readouterr().out
    assert_same_run(paths.folder, never_stopped)  # from best.ckpt, of the first epoch


def begun(never_stopped: Path, folder: Path) -> RunPaths:
    """A run that was killed before its first checkpoint, in a folder with a note of its user."""
    paths = RunPaths(folder)
    (paths.tensorboard / "events").mkdir(parents=True)
    paths.config.write_bytes((RunPaths(never_stopped).config).read_bytes())
    (folder / "note.txt").write_text("mine")
    return paths


@pytest.mark.slow
def test_killed_before_its_first_checkpoint(never_stopped: Path, tmp_path: Path):
    paths = begun(never_stopped, tmp_path / "run")
    assert main([*RUN, f"--run_dir={paths.folder}"]) == 0
    assert_same_run(paths.folder, never_stopped)
    assert (paths.folder / "note.txt").read_text() == "mine"


def test_a_failure_at_its_start_removes_the_run_alone(never_stopped: Path, tmp_path: Path, monkeypatch):
    paths = begun(never_stopped, tmp_path / "test")  # named like one of a run's own folders
    monkeypatch.setattr(ClassifierModule, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*RUN, f"--run_dir={paths.folder}"])
    assert [path.name for path in paths.folder.iterdir()] == ["note.txt"]


def test_a_complete_run_stays_as_it_is(never_stopped: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.read_bytes() for path in never_stopped.rglob("*") if path.is_file()}
    assert main([*RUN, f"--run_dir={never_stopped}"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in never_stopped.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--resume auto needs --run_dir"),
        (["--run_dir={whole}", "--ckpt_path=last"], "leave one of the two out"),
        (["--run_dir={whole}", "--model.optimizer.lr=7"], "model.optimizer.lr 0.003 -> 7.0"),
        (["--run_dir={whole}/checkpoints"], "holds files that are not of a run (best.ckpt, last.ckpt)"),
        (["--run_dir={whole}", "--checkpoint_minutes=0"], "checkpoint_minutes"),
    ],
)
def test_refused(arguments: list[str], message: str, never_stopped: Path, capsys: pytest.CaptureFixture[str]):
    given = [argument.format(whole=never_stopped) for argument in arguments]
    try:
        code = main([*RUN, *given])
    except SystemExit as ended:
        code = ended.code
    assert code in (1, 2)
    assert message in capsys.readouterr().err


def test_the_averaging_callback_is_missed(never_stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = yaml.safe_load(RunPaths(never_stopped).config.read_text())
    config["trainer"]["callbacks"] = None
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    arguments = ["fit", f"--config={tmp_path / 'other.yaml'}", f"--run_dir={never_stopped}", "--ckpt_path=last"]
    assert main(arguments) == 1
    assert "averaged weights" in capsys.readouterr().err
