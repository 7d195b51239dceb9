"""Runs `interpreted.py`, the fused kernels in Triton's interpreter, in processes of their own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("interpreted.py")
PARTS = ("empty or lies or far or differences",)
SLOW = ("not tiles and not order and not random and not blocks", "tiles or order", "random or blocks", "slow")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("part", [*PARTS, *(pytest.param(part, marks=pytest.mark.slow) for part in SLOW)])
def test_in_triton_s_interpreter(part: str):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_XDIST_WORKER", None)
    chosen = ["-m", "slow"] if part == "slow" else ["-k", part]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *chosen, str(FILE)]
    done = subprocess.run(pytest_, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
