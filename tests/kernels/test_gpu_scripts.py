"""The scripts that measure on a GPU, as far as they go without one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    import kernel_cuda

    return gpu, kernel_cuda


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so(scripts, capsys: pytest.CaptureFixture[str]):
    for script in scripts:
        assert script.main([]) == 2
        assert "device 'cuda' is missing" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benches_take_their_arguments(scripts, capsys: pytest.CaptureFixture[str]):
    from sagan_attn.__main__ import main

    benches = [part for part in scripts[0].plan() if part.command[:3] == (sys.executable, "-m", "sagan_attn")]
    assert [part.name for part in benches] == ["block", "scaling", "step"]
    for part in benches:
        assert main(list(part.command[3:])) == 2
        assert "device 'cuda' is missing" in capsys.readouterr().err


def test_the_plan(scripts, capsys: pytest.CaptureFixture[str]):
    parts = scripts[0].plan("photos")
    assert sum(part.seconds for part in parts if not part.name.startswith("cifar")) < scripts[0].LIMIT < 600
    assert all((ROOT / word).is_file() for part in parts for word in part.command if word.endswith((".py", ".yaml")))
    assert scripts[0].main(["--plan", "--skip", "tests", "cifar"]) == 0
    assert [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "kernel",
        "block",
        "scaling",
        "step",
    ]


def test_a_part_that_fails_or_takes_too_long(scripts):
    part = scripts[0].Part
    assert scripts[0].run(part("", (sys.executable, "-c", "print('a'); raise SystemExit(3)"), 9), 9)["status"] == 3
    late = scripts[0].run(part("", (sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"), 1), 1.5)
    assert late["status"] is None
    assert late["seconds"] < 20


def test_the_measurement(scripts):
    kernel_cuda = scripts[1]
    among = {kernel_cuda.OURS: kernel_cuda.ways("auto")[kernel_cuda.OURS], "plain": kernel_cuda.plain}
    among["sdpa"] = kernel_cuda.sdpa
    among["missing"] = kernel_cuda.padded(kernel_cuda.SDPBackend.CUDNN_ATTENTION)
    for form, backward in (("sagan", True), ("biggan", False)):
        shape = kernel_cuda.Shape(form, 32, 64, 2)
        row = kernel_cuda.measure(shape, backward, among, torch.device("cpu"), kernel_cuda.Budget(1, 0.0))
        assert row["best_of_others"] in ("plain", "sdpa")
        assert set(row["skipped"]) == {"missing"}
        assert all(error < 1e-2 for error in row["relative_error"].values())
        m, d, size = shape.sizes
        assert row["flops"] == 2 * 2 * 64 * m * ((4 * d + 3 * size) if backward else (d + size))


def test_what_the_compiler_said_fits():
    """The committed figures are of the tiles in use, and no kernel takes more shared memory than there is."""
    from sagan_attn.kernels import tables

    found = json.loads((BENCHMARKS / "kernel_ptx.json").read_text())
    in_use = {(x.warps, x.values) for table in tables.TABLES.values() for row in table.values() for x in row}
    seen = {
        (row["tiles"]["num_warps"], row["tiles"]["BLOCK_V"]) for row in found["kernels"] if "num_warps" in row["tiles"]
    }
    assert in_use <= seen
    for row in found["kernels"]:
        assert row["shared_bytes"] <= found["room"][str(row["capability"])], row
        if row["capability"] == 90 and row["extra"] != "position":
            assert row["spilled_bytes"] <= SPILLED, row
    main = [row for row in found["kernels"] if (row["capability"], row["dtype"], row["extra"]) == (90, "bfloat16", "")]
    assert all("wgmma" in row["tensor_cores"] for row in main if row["kernel"] != "row_sums")


SPILLED = 150  # bytes a thread, as ptxas counts the stores; with dropout 132, without at most 76


@pytest.mark.slow
def test_the_kernels_compile_without_a_gpu(tmp_path: Path):
    path = tmp_path / "kernel_ptx.json"
    subprocess.run([sys.executable, BENCHMARKS / "kernel_ptx.py", "--quick", "--json", path], check=True)
    found = json.loads(path.read_text())
    assert {row["kernel"] for row in found["kernels"]} >= {"forward", "row_sums"}
    for row in found["kernels"]:
        assert row["shared_bytes"] <= found["room"][str(row["capability"])], row
        assert row["spilled_bytes"] <= SPILLED or row["extra"] == "position", row
