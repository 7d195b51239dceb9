"""Kill a training run at random moments, again and again; does it end as one that was never stopped?

    OMP_NUM_THREADS=1 python benchmarks/survive_training.py [--kills 200]

Each run is killed (kill -9) several times, while it trains and saves or while it begins, and started again by the same
command until it is complete. After each kill every file must be whole; at the end weights, optimizer, schedule, random
states and metrics must be those of a run that was never stopped, to the bit. Writes survive_training.json beside this
file, unless --kills is small, and ends with 1 unless all that held.
"""

import argparse
import csv
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml

from sagan_attn.bench.machine import save
from sagan_attn.files import PART
from sagan_attn.training.callbacks import RunFolder
from sagan_attn.training.cli import main as train
from sagan_attn.training.random_state import KEY
from sagan_attn.training.run import RunPaths, read_checkpoint

COMMAND = [
    *["fit", "--config=configs/lookup.yaml", "--resume=auto", "--trainer.max_epochs=3"],
    "--checkpoint_minutes=1e-9",  # one after each step
    '--model.grafts=[{"at": "local", "block": "multihead", "options": {"dropout": 0.2}}]',
    *['--model.host.options={"width": 4}', "--model.schedule.warmup_epochs=1", "--data.image_size=32"],
    *["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.batch_size=8"],
    *["--data.n_train=64", "--data.n_val=8", "--data.n_test=8"],
]
KILLS_A_RUN = 10
BEGINNING = 0.2  # share of the kills that come before the first step
KEPT = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "train_loss", KEY)
RECORDED = 100  # kills from which a result is kept


@contextmanager
def beginning(folder: Path) -> Iterator[tuple[int, int]]:
    """The run in a process of its own, whose modules are imported already: the process, and a pipe that it writes to
    when it begins to train.
    """
    ready, tell = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.dup2(os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
        RunFolder.on_train_start = lambda *_: os.write(tell, b"1")  # type: ignore[assignment,method-assign]
        code = 70
        try:
            code = train([*COMMAND, f"--run_dir={folder}"])
        finally:
            os._exit(code)
    os.close(tell)
    try:
        yield process, ready
    finally:
        os.close(ready)


def log_of(folder: Path) -> Path:
    return folder.with_suffix(".log")


def wait(process: int, seconds: float) -> int | None:
    """The exit code, or None after that time."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.001)


def damaged(paths: RunPaths) -> list[str]:
    """Files of a run that are not whole."""
    bad = []
    readers = {".ckpt": read_checkpoint, ".json": _json, ".yaml": _yaml, ".csv": _csv}
    for path in [*paths.folder.glob("*"), *paths.checkpoints.glob("*")]:  # not those of TensorBoard
        if path.suffix in readers:
            try:
                readers[path.suffix](path)
            except Exception as error:
                bad.append(f"{path.name}: {error}")
    return bad


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _yaml(path: Path) -> None:
    if "data" not in yaml.safe_load(path.read_text()):
        raise ValueError("it ends too early")


def _csv(path: Path) -> None:
    text = path.read_text()
    if len({len(row) for row in csv.reader(text.splitlines())}) != 1 or not text.endswith("\n"):
        raise ValueError("it ends in the middle of a row")


def differences(one: RunPaths, other: RunPaths) -> list[str]:
    """What is not the same in two runs."""
    found = []
    for name in ("best", "last"):
        a, b = (read_checkpoint(paths.checkpoint(name)) for paths in (one, other))
        found += [f"{name}.ckpt: {key}" for key in KEPT if not equal(a[key], b[key])]
    files = ("metrics", "config", "classes", "transform", "finished")
    contents = [
        [getattr(paths, name).read_text().replace(paths.folder.name, "") for name in files] for paths in (one, other)
    ]
    return found + [name for name, a, b in zip(files, *contents, strict=True) if a != b]


def equal(one: Any, other: Any) -> bool:
    """To the bit, of nested states."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def whole_run(folder: Path) -> float:
    """The run that is never stopped, in this process, which has then imported everything. Returns its seconds."""
    started = time.monotonic()
    with log_of(folder).open("w") as log, redirect_stdout(log):
        code = train([*COMMAND, f"--run_dir={folder}"])
    if code != 0:
        raise SystemExit(f"the run that is not killed ended with {code}")
    return time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # Lightning warns of more
    os.chdir(Path(__file__).parents[1])
    draw = random.Random(options.seed)
    kills, early, runs, damages, stuck, differing = 0, 0, 0, [], [], []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        whole = RunPaths(Path(temporary) / "whole")
        whole_run(whole.folder)
        train_seconds = whole_run(Path(temporary) / "again")  # the first one imports
        if again := differences(whole, RunPaths(Path(temporary) / "again")):
            raise SystemExit(f"two runs that are not killed differ: {', '.join(again)}")
        while kills < options.kills:
            paths = RunPaths(Path(temporary) / f"run-{runs}")
            runs, here, code = runs + 1, 0, None
            while code is None:
                with beginning(paths.folder) as (process, ready):
                    if here == KILLS_A_RUN or kills == options.kills:
                        code = wait(process, 600)
                    elif draw.random() < BEGINNING:
                        code = wait(process, draw.uniform(0, train_seconds / 2))
                        early += code is None
                    else:
                        select.select([ready], [], [], 600)
                        code = wait(process, draw.uniform(0, 2 * train_seconds / KILLS_A_RUN))
                    if code is None:
                        os.kill(process, signal.SIGKILL)
                        os.waitpid(process, 0)
                        kills, here = kills + 1, here + 1
                        damages += damaged(paths)
            if code != 0:
                stuck.append(f"run {runs} ended with {code}: {log_of(paths.folder).read_text()[-500:]}")
                continue
            differing += [f"run {runs}: {name}" for name in differences(whole, paths)]
            damages += [f"left behind: {path.name}" for path in paths.folder.rglob(f"*{PART}")]
            print(f"{kills} kills, {runs} runs, {len(damages)} files damaged, {len(stuck)} runs stuck", flush=True)
    result = {
        "kills": kills,
        "before_the_first_step": early,
        "runs": runs,
        "damaged": damages,
        "could_not_go_on": stuck,
        "ended_differently": differing,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(sum(os.times()[:4]), 1),
    }
    print(json.dumps(result, indent=1))
    if options.kills >= RECORDED:
        save(Path(__file__).with_suffix(".json"), {**result, "command": COMMAND})
    return 1 if damages or stuck or differing else 0


if __name__ == "__main__":
    sys.exit(main())
