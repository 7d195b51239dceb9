"""All tests and tables that need a GPU, in one call of less than ten minutes on an H200.

    python benchmarks/gpu.py [--skip PART ...] [--only PART ...] [--cifar-root FOLDER] [--limit SECONDS] [--plan]

Runs `pytest -m cuda`, then fills kernel_cuda.json, block_cuda.json, scaling_cuda.json and step_cuda.json beside this
file, and last, as long as there is time, trains 30 epochs on CIFAR-10 in each precision. A part that fails or takes
too long is recorded in gpu.json and does not stop the others; the exit status is 1 then, and 2 without a GPU.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sagan_attn.bench.machine import get_device, save
from sagan_attn.errors import ConfigError

HERE = Path(__file__).parent
LIMIT = 570.0
WORKERS = str(max(1, min(14, (os.cpu_count() or 2) - 2)))  # of the tests, which mostly wait for the compiler
BENCH = (sys.executable, "-m", "sagan_attn", "bench")
BLOCK_SHAPES = ("1024,128,8x8", "512,128,16x16", "256,256,8x8", "64,256,32x32", "16,256,64x64", "4,512,128x128")


@dataclass(frozen=True)
class Part:
    """A command, run from the repository's root, and the seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float


def bench(name: str, seconds: float, *options: str) -> Part:
    return Part(name, (*BENCH, name, "--device", "cuda", "--json", str(HERE / f"{name}_cuda.json"), *options), seconds)


def plan(cifar_root: str | None = None) -> list[Part]:
    """The parts in their order."""
    peers = ("--peers", "sagan/materialised,plain,sdpa,sdpa-padded,flex")
    quick = ("--repetitions", "3", "--seconds", "0.3", "--max-bytes", str(2**33))
    parts = [
        Part("tests", (sys.executable, "-m", "pytest", "-m", "cuda", "-n", WORKERS, "-q"), 220),
        Part("kernel", (sys.executable, str(HERE / "kernel_cuda.py"), "--seconds", "120"), 150),
        bench("block", 70, "--dtypes", "bf16", "--channels-last", *peers, *quick, "--shapes", *BLOCK_SHAPES),
        bench("scaling", 40, "--dtypes", "bf16", "--peers", "plain,sdpa-padded", *quick),
        bench("step", 60, "--preset", "cifar-resnet18,resnet50", "--precision", "bf16", "--channels-last",
              "--repetitions", "3", "--seconds", "1", "--no-largest-batch"),
    ]  # fmt: skip
    data = ("--data", "FolderData", "--data.root", cifar_root, "--data.image_size", "32") if cifar_root else ()
    for precision in ("bf16-mixed", "16-mixed", "32-true"):
        folder = f"runs/cuda-{precision}"
        fit = (
            "train.py",
            "fit",
            "--config",
            "configs/cifar10_fast.yaml",
            "--trainer.max_epochs",
            "30",
            "--run_dir",
            folder,
        )
        parts.append(Part(f"cifar {precision}", (sys.executable, *fit, "--trainer.precision", precision, *data), 200))
    return parts


def run(part: Part, seconds: float) -> dict:
    """What came of it: seconds, exit status (None where it took too long) and its last lines."""
    started = time.perf_counter()
    process = subprocess.Popen(
        part.command,
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all it started ends with it
    )
    status: int | None = None
    try:
        words = process.communicate(timeout=seconds)[0]
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        words = process.communicate()[0]
    lines = [line for line in words.splitlines() if line.strip()]
    return {"status": status, "seconds": time.perf_counter() - started, "last_lines": lines[-25:]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ("tests", "kernel", "block", "scaling", "step", "cifar")
    parser.add_argument("--skip", nargs="+", choices=names, default=[])
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--cifar-root", metavar="FOLDER", help="CIFAR-10 as split/class/file (default: downloaded)")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"for all (default: {LIMIT:g})")
    parser.add_argument("--plan", action="store_true", help="print the commands and do nothing")
    arguments = parser.parse_args(argv)
    chosen = set(arguments.only) - set(arguments.skip)
    parts = [part for part in plan(arguments.cifar_root) if part.name.split()[0] in chosen]
    if arguments.plan:
        for part in parts:
            print(f"{part.name} ({part.seconds:g} s): {' '.join(part.command)}")
        return 0
    try:
        get_device("cuda")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    started, results = time.perf_counter(), {}
    for part in parts:
        left = arguments.limit - (time.perf_counter() - started)
        if left < 10:
            results[part.name] = {"status": None, "seconds": 0.0, "last_lines": ["no time was left"]}
        else:
            print(f"{part.name}: at most {min(left, part.seconds):.0f} s", file=sys.stderr, flush=True)
            results[part.name] = run(part, min(left, part.seconds))
        found = results[part.name]
        words = {0: "done", None: "out of time"}.get(found["status"], f"failed with status {found['status']}")
        print(
            f"{part.name}: {words} after {found['seconds']:.0f} s", *found["last_lines"][-5:], sep="\n    ", flush=True
        )
        save(HERE / "gpu.json", {"parts": results})
    return int(any(found["status"] != 0 for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
