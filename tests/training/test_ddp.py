"""Training over several processes is training."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from small_runs import SMALL

ROOT = Path(__file__).parents[2]
TWO = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=16", "--data.n_train=64", "--data.n_val=16"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


CONVNEXT = [
    *["--model.host.name=timm/convnext_atto", '--model.host.options={"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}'],
    *['--model.grafts=[{"at": "stages.1"}]', "--model.unfreeze_epoch=1"],
]


@pytest.mark.slow
@pytest.mark.parametrize("host", [[], CONVNEXT], ids=["frozen", "unfrozen"])
def test_two_processes_give_the_metrics_of_one(host: list[str], tmp_path: Path):
    """With half of the batch each: the same images a step, and gradients averaged over the same. Batch norm sees half
    of the batch, and torch has no synchronised one for CPUs: a host with it is frozen, and one without is unfrozen."""
    tables = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = [*SMALL, "--model.freeze_host=true", f"--data.batch_size={32 // processes}", f"--run_dir={folder}"]
        arguments += [
            *host,
            "--trainer.strategy=ddp",
            f"--trainer.devices={processes}",
            "--trainer.precision=32-true",
            "--model.optimizer.lr=0.03",
        ]
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "fit", *arguments],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        tables.append(pd.read_csv(folder / "metrics.csv"))
    one, two = tables
    assert list(one.columns) == list(two.columns)
    pd.testing.assert_frame_equal(one, two, rtol=1e-4, atol=1e-6)
    assert one["train/loss"].iloc[0] != pytest.approx(one["train/loss"].iloc[-1], rel=1e-3)  # it learned something


def until(what: Callable[[], bool], seconds: float) -> float:
    """Wait for something; returns how long it took."""
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < seconds, "it took too long"
        time.sleep(0.05)
    return time.monotonic() - started


def gone(process: int) -> bool:
    """Whether a process has ended, though its parent may not have asked for its exit code."""
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextmanager
def two_processes(folder: Path, epochs: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A run on two processes that has begun to train, and the process of rank 1."""
    arguments = [*SMALL, *TWO, f"--trainer.max_epochs={epochs}", f"--run_dir={folder}", "--resume=auto"]
    command = [sys.executable, str(ROOT / "train.py"), "fit", *arguments]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as first:
        second = 0
        try:
            children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
            until(lambda: bool(children.read_text()) and (folder / "metrics.csv").is_file(), 240)
            (second,) = map(int, children.read_text().split())
            yield first, second
        finally:
            for process in (first.pid, second):
                if process and not gone(process):
                    os.kill(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all(signum: int, rank: int, tmp_path: Path):
    with two_processes(tmp_path / "run", 1000) as (first, second):
        os.kill((first.pid, second)[rank], signum)
        _, words = first.communicate(timeout=60)
        assert first.returncode == 128 + signum, words
        assert "--resume auto goes on" in words
        until(lambda: gone(second), 60)
        assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_does_not_leave_the_other_waiting(rank: int, tmp_path: Path):
    with two_processes(tmp_path / "run", 1000) as (first, second):
        os.kill((first.pid, second)[rank], signal.SIGKILL)
        until(lambda: first.poll() is not None and gone(second), 60)
        assert first.returncode not in (0, None)


@pytest.mark.slow
def test_two_processes_go_on_where_they_were(tmp_path: Path):
    tables = []
    for name, stopped in (("whole", False), ("stopped", True)):
        folder = tmp_path / name
        if stopped:
            with two_processes(folder, 12) as (first, _):
                first.send_signal(signal.SIGTERM)
                first.communicate(timeout=60)
                assert first.returncode == 143
        with two_processes(folder, 12) as (first, _):
            _, words = first.communicate(timeout=240)
            assert first.returncode == 0, words
        tables.append(pd.read_csv(folder / "metrics.csv"))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert len(tables[0]) == 12
