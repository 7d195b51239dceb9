"""Kill a training run at random moments, again and again; does it end as one that was never stopped?

    OMP_NUM_THREADS=1 python benchmarks/survive_training.py [--kills 200]

Each run is killed (kill -9) and started again by the same command until it is complete. After each kill every
checkpoint must load and metrics.csv must be whole; at the end weights, optimizer and metrics must be those of a run
that was never stopped, to the bit. Writes survive_training.json beside this file and ends with 1 unless all that held.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from sagan_attn.bench.machine import save
from sagan_attn.training.cli import main as train
from sagan_attn.training.run import RunPaths, read_checkpoint

COMMAND = [
    *["fit", "--config=configs/lookup.yaml", "--resume=auto"],
    *[
        "--checkpoint_minutes=0.001",
        '--model.grafts=[{"at": "local", "block": "multihead", "options": {"dropout": 0.2}}]',
    ],
    *['--model.host.options={"width": 16}', "--trainer.max_epochs=4", "--model.schedule.warmup_epochs=1"],
    *["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.batch_size=32"],
    *["--data.n_train=512", "--data.n_val=64", "--data.n_test=64"],
]


def begin(folder: Path) -> int:
    """Start the run in a process of its own, whose modules are imported already."""
    process = os.fork()
    if process == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            os.dup2(log.fileno(), sys.stderr.fileno())
        code = 70
        try:
            code = train([*COMMAND, f"--run_dir={folder}"])
        finally:
            os._exit(code)
    return process


def wait(process: int, seconds: float) -> int | None:
    """The exit code, or None after that time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def damaged(paths: RunPaths) -> list[str]:
    """Files of a run that are not whole."""
    bad = []
    for path in paths.checkpoints.glob("*.ckpt"):
        try:
            read_checkpoint(path)
        except Exception as error:
            bad.append(f"{path.name}: {error}")
    if paths.metrics.is_file():
        rows = paths.metrics.read_text().splitlines()
        if len({row.count(",") for row in rows}) != 1 or not paths.metrics.read_text().endswith("\n"):
            bad.append("metrics.csv")
    for path in (paths.environment, paths.classes, paths.transform, paths.finished):
        if path.is_file():
            try:
                json.loads(path.read_text())
            except ValueError:
                bad.append(path.name)
    return bad


def same(one: RunPaths, other: RunPaths) -> bool:
    a, b = (read_checkpoint(paths.checkpoint("last")) for paths in (one, other))
    weights = all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])
    states = [content["optimizer_states"][0]["state"] for content in (a, b)]
    moments = all(
        torch.equal(value, states[1][index][key]) for index, one in states[0].items() for key, value in one.items()
    )
    return weights and moments and one.metrics.read_bytes() == other.metrics.read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.chdir(Path(__file__).parents[1])
    draw = random.Random(options.seed)
    kills, runs, corrupt, stuck, differing = 0, 0, [], 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        started = time.monotonic()
        code = wait(begin(folder / "whole"), 600)
        longest = time.monotonic() - started
        if code != 0:
            raise SystemExit(f"the run that is not killed ended with {code}: {(folder / 'whole.log').read_text()}")
        while kills < options.kills:
            paths = RunPaths(folder / f"run-{runs}")
            runs += 1
            while True:
                process = begin(paths.folder)
                code = wait(process, draw.uniform(0, longest))
                if code is None:
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                    kills += 1
                    corrupt += damaged(paths)
                    print(f"{kills} kills, {runs} runs, {len(corrupt)} files damaged", flush=True)
                    continue
                stuck += code != 0
                if code == 0:
                    differing += not same(RunPaths(folder / "whole"), paths)
                break
            parts = [path for path in paths.folder.rglob("*.part")]
            corrupt += [f"left behind: {path.name}" for path in parts]
    result = {
        "kills": kills,
        "runs": runs,
        "corrupt": corrupt,
        "could_not_go_on": stuck,
        "ended_differently": differing,
    }
    print(json.dumps(result))
    save(Path(__file__).parent / "survive_training.json", {**result, "command": [str(word) for word in COMMAND]})
    return 0 if not (corrupt or stuck or differing) else 1


if __name__ == "__main__":
    sys.exit(main())
