"""Training over several processes is training."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from small_runs import SMALL

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(tmp_path: Path):
    """With half of the batch each: the same images a step, and gradients averaged over the same. The host is frozen,
    because batch norm sees half of the batch, and torch has no synchronised one for CPUs."""
    tables = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = [*SMALL, "--model.freeze_host=true", f"--data.batch_size={32 // processes}", f"--run_dir={folder}"]
        arguments += [
            "--trainer.strategy=ddp",
            f"--trainer.devices={processes}",
            "--trainer.precision=32-true",
            "--model.optimizer.lr=0.03",
        ]
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "fit", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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
