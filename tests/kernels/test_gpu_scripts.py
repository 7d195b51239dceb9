"""The scripts that measure on a GPU, as far as they go without one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sagan_attn.bench.timing import Budget

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
    parts = {part.name: part for part in scripts[0].plan("photos")}
    for call in (("tests", "more-shapes"), ("kernel", "block", "scaling", "step")):  # as its first lines say
        assert f"--only {' '.join(call)}\n" in scripts[0].__doc__
        assert sum(parts[name].seconds for name in call) < scripts[0].LIMIT < 600
    words = [word for part in parts.values() for word in part.command if word.endswith((".py", ".yaml"))]
    assert all((ROOT / word).is_file() for word in words)
    assert str(Path(__file__).with_name("test_fused_cuda.py")) in parts["tests"].command
    assert parts["tests"].command[-1] != str(ROOT / "tests")
    assert scripts[0].main(["--plan", "--skip", "tests", "more-shapes", "cifar"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["kernel", "block", "scaling", "step"]


def test_parts_of_several_calls(scripts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    gpu = scripts[0]
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu, "get_device", lambda name: None)
    commands = {"tests": "pass", "kernel": "raise SystemExit(1)", "block": "pass"}
    parts = [gpu.Part(name, (sys.executable, "-c", words), 60) for name, words in commands.items()]
    monkeypatch.setattr(gpu, "plan", lambda root: parts)
    for options, status, left_out in (
        (["--only", "tests"], 0, []),
        (["--only", "kernel"], 1, []),
        (["--only", "block", "--limit", "5"], 0, ["block"]),
    ):
        assert gpu.main(options) == status
        found = json.loads((tmp_path / "gpu.json").read_text())
        assert found["left_out"] == left_out
    assert {name: part["status"] for name, part in found["parts"].items()} == {"tests": 0, "kernel": 1}


def test_every_kernel_case_is_measured_once(scripts):
    kernel_cuda = scripts[1]
    cases = [*kernel_cuda.FIRST, *kernel_cuda.LATER]
    assert len(cases) == len(set(cases)) == 2 * len([*kernel_cuda.LARGE, *kernel_cuda.CIFAR])
    assert not any(backward for _, backward in kernel_cuda.LATER)


@pytest.mark.parametrize("seconds", [0.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_the_table_of_the_kernel(scripts, seconds: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Of tiny shapes on a CPU; what no time is left for is counted."""
    kernel_cuda, cpu = scripts[1], torch.device("cpu")
    shape = kernel_cuda.Shape("sagan", 16, 16, 2)
    monkeypatch.setattr(kernel_cuda, "get_device", lambda name: cpu)
    monkeypatch.setattr(kernel_cuda, "FIRST", [(shape, True)])
    monkeypatch.setattr(kernel_cuda, "LATER", [(shape, False)])
    ways = kernel_cuda.ways("materialised")
    monkeypatch.setattr(kernel_cuda, "ways", lambda: ways)
    monkeypatch.setattr(kernel_cuda, "flex", lambda: kernel_cuda.plain)
    monkeypatch.setattr(kernel_cuda, "Budget", lambda *of: Budget(1, 0.0))
    path = tmp_path / "kernel.json"
    assert kernel_cuda.main(["--seconds", str(seconds), "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["left_out"] == ({"cases": 0, "with_flex": 0} if seconds else {"cases": 2, "with_flex": 1})
    assert [row["passes"] for row in found["cases"]] == (["forward+backward", "forward"] if seconds else [])
    assert [("with_flex" in row) for row in found["cases"]] == ([True, False] if seconds else [])


@pytest.mark.slow
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
    in_use = [x for table in tables.TABLES.values() for row in table.values() for x in row]
    in_use += tables.WIDENED.values()
    seen = [row["tiles"] for row in found["kernels"] if "num_warps" in row["tiles"]]
    seen = {(x["num_warps"], x["BLOCK_V"], x["BLOCK_N"], x["BLOCK_M"]) for x in seen}
    assert {(x.warps, x.values, x.queries, x.keys) for x in in_use} <= seen
    forms = {(row["capability"], row["dtype"], row["extra"]) for row in found["kernels"]}
    assert {(room, dtype, "") for room in (80, 89, 90) for dtype in ("bfloat16", "float16", "float32")} <= forms
    assert {(room, dtype, "position 256") for room in (89, 90) for dtype in ("bfloat16", "float16")} <= forms
    for row in found["kernels"]:
        assert row["shared_bytes"] <= found["room"][str(row["capability"])], row
        if row["capability"] == 90 and not row["extra"].startswith("position"):
            assert row["spilled_bytes"] <= SPILLED, row
    main = [row for row in found["kernels"] if (row["capability"], row["dtype"], row["extra"]) == (90, "bfloat16", "")]
    assert all("wgmma" in row["tensor_cores"] for row in main if row["kernel"] != "row_sums")


def test_tiles_where_float32_copies_take_the_room():
    """Of float16, on GPUs with less shared memory than an H100; other dtypes keep theirs."""
    from sagan_attn.kernels import tables

    small = 163 * 1024
    for table, d, fewer in (("backward", 128, True), ("backward", 64, True), ("backward", 32, False)):
        for size in (16, 64, 1024):
            usual = tables.choose(table, 2, d, size, small)
            assert (tables.choose(table, 2, d, size, small, True) == tables.WIDENED[table]) == fewer
            assert usual != tables.WIDENED[table]
            assert tables.choose(table, 2, d, size, tables.LARGE_ROOM, True).stages == 2
    assert tables.choose("of queries", 2, 16, 16, small, True) == tables.WIDENED["of queries"]
    assert tables.choose("of queries", 4, 16, 16, small, True) == tables.choose("of queries", 4, 16, 16, small)


SPILLED = 150  # bytes a thread, as ptxas counts the stores; with dropout 120, without at most 76


@pytest.mark.slow
def test_the_kernels_compile_without_a_gpu(tmp_path: Path):
    path = tmp_path / "kernel_ptx.json"
    subprocess.run([sys.executable, BENCHMARKS / "kernel_ptx.py", "--quick", "--json", path], check=True)
    found = json.loads(path.read_text())
    assert {row["kernel"] for row in found["kernels"]} >= {"forward", "row_sums"}
    for row in found["kernels"]:
        assert row["shared_bytes"] <= found["room"][str(row["capability"])], row
        assert row["spilled_bytes"] <= SPILLED or row["extra"] == "position", row
