"""All tests and tables that need a GPU, in two calls of less than ten minutes each on an H200.

    python benchmarks/gpu.py --only tests more-shapes
    python benchmarks/gpu.py --only kernel block scaling step
    python benchmarks/gpu.py --only cifar [--cifar-root FOLDER]

Also [--skip PART ...] [--limit SECONDS] [--plan]. The first call runs the tests marked `cuda`; each of their random
shapes is compiled, half of them in `more-shapes`. The second fills kernel_cuda.json, block_cuda.json,
scaling_cuda.json and step_cuda.json beside this file. The third trains 30 epochs on CIFAR-10 in each precision.

A part that fails or takes too long is recorded in gpu.json, beside those of earlier calls, and does not stop the
others; the exit status is 1 then, and 2 without a GPU. For those that are `left_out` there was no time, which is no
failure.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sagan_attn.bench.machine import get_device, save
from sagan_attn.errors import ConfigError

HERE = Path(__file__).parent
RESULTS = HERE / "gpu.json"
LIMIT = 570.0
WORKERS = str(max(1, min(14, (os.cpu_count() or 2) - 2)))  # of the tests, which mostly wait for the compiler
BENCH = (sys.executable, "-m", "sagan_attn", "bench")
# Most have about as many scores as those from which `auto` takes the kernels, B x N x N = 2^24.
BLOCK_SHAPES = (
    "256,256,8x8", "1024,128,8x8", "32,256,16x16", "512,128,16x16", "8,256,32x32", "64,256,32x32", "16,256,64x64",
    "4,512,128x128",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A command, run from the repository's root, and the seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float


def bench(name: str, seconds: float, *options: str) -> Part:
    return Part(name, (*BENCH, name, "--device", "cuda", "--json", str(HERE / f"{name}_cuda.json"), *options), seconds)


def cuda_tests(words: str) -> tuple[str, ...]:
    """pytest on the files with tests marked `cuda`; the others take long to import. words: its `-k`."""
    files = (x for x in sorted((HERE.parent / "tests").rglob("test_*.py")) if "mark.cuda" in x.read_text())
    workers = "-n", WORKERS, "--maxprocesses", WORKERS  # whose default is less
    return (sys.executable, "-m", "pytest", "-m", "cuda", "-k", words, *workers, "-q", *map(str, files))


def plan(cifar_root: str | None = None) -> list[Part]:
    """The parts in their order."""
    # Without flex, which compiles for minutes: it is in the table of the kernel.
    peers = ("--peers", "sagan/fused,sagan/materialised,plain,sdpa,sdpa-rows,sdpa-padded")
    quick = ("--repetitions", "3", "--seconds", "0.3", "--max-bytes", str(2**33))
    parts = [
        Part("tests", cuda_tests("not more_random_shapes"), 330),
        Part("kernel", (sys.executable, str(HERE / "kernel_cuda.py"), "--seconds", "310"), 350),
        bench("block", 80, "--dtypes", "bf16", "--channels-last", *peers, *quick, "--shapes", *BLOCK_SHAPES),
        bench("scaling", 50, "--dtypes", "bf16", "--peers", "sagan/fused,plain,sdpa-padded", *quick),
        bench("step", 80, "--preset", "cifar-resnet18,resnet50", "--precision", "bf16", "--channels-last",
              "--repetitions", "3", "--seconds", "1", "--no-largest-batch"),
        Part("more-shapes", cuda_tests("more_random_shapes"), 230),
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
    """What came of it: when, seconds, exit status (None where it took too long) and its last lines."""
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
    took, date = time.perf_counter() - started, datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "status": status, "seconds": took, "last_lines": lines[-25:]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ("tests", "kernel", "block", "scaling", "step", "more-shapes", "cifar")
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
    started, statuses, left_out = time.perf_counter(), [], []
    results = json.loads(RESULTS.read_text())["parts"] if RESULTS.is_file() else {}
    for part in parts:
        left = arguments.limit - (time.perf_counter() - started)
        if left < 10:
            left_out.append(part.name)
            print(f"{part.name}: left out, because no time was left", flush=True)
        else:
            print(f"{part.name}: at most {min(left, part.seconds):.0f} s", file=sys.stderr, flush=True)
            found = results[part.name] = run(part, min(left, part.seconds))
            statuses.append(found["status"])
            words = {0: "done", None: "out of time"}.get(found["status"], f"failed with status {found['status']}")
            lines = found["last_lines"][-5:]
            print(f"{part.name}: {words} after {found['seconds']:.0f} s", *lines, sep="\n    ", flush=True)
        save(RESULTS, {"left_out": left_out, "parts": results})
    return int(any(status != 0 for status in statuses))


if __name__ == "__main__":
    sys.exit(main())
