"""Kill an ablation's cells and its runner with SIGKILL at random moments; count what is lost.

    python benchmarks/ablation_soak.py [--kills 100] [--folder <new folder>]

A grid of small `lookup` runs is computed by `python -m sagan_attn ablate`, started again whenever it was killed. Writes
ablation_soak.json beside this file and ends with 1 unless every cell has one whole result and only killed cells were
computed more than once.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from sagan_attn.ablation.store import PLAN_LOCK, Store, read_logits, read_results
from sagan_attn.bench.machine import save

HERE = Path(__file__).parent
SPEC = {
    "base": str(HERE.parent / "configs" / "lookup.yaml"),
    "set": {
        "data.init_args.n_train": 512,
        "data.init_args.n_val": 64,
        "data.init_args.n_test": 64,
        "data.init_args.batch_size": 64,
        "model.host.options": {"width": 32},
    },
    "axes": {"block": ["sagan", "nonlocal"]},
    "confirm": {"seeds": 12, "epochs": [1, 2]},
}


def start(spec: Path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "sagan_attn", "ablate", str(spec), "--folder", str(folder), "--workers", "2"]
    with (folder.parent / "runner.log").open("a") as log:
        return subprocess.Popen([*command, "--threads", "1"], stdout=log, stderr=log)


def running_cells(store: Store) -> dict[str, int]:
    """Key -> process of the cells that are computed now."""
    found = {}
    for path in store.folder.glob("cells/*/attempts"):
        key, lines = path.parent.name, path.read_text().splitlines()
        if lines and not store.has_result(key) and store.is_locked(key):
            found[key] = int(lines[-1].split()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    parent = arguments.folder or Path(tempfile.mkdtemp())
    parent.mkdir(parents=True, exist_ok=True)
    spec, store = parent / "soak.yaml", Store(parent / "results")
    spec.write_text(yaml.safe_dump(SPEC))
    draw = random.Random(arguments.seed)
    runner, killed, kills, started = start(spec, store.folder), {}, {"cell": 0, "runner": 0}, time.monotonic()
    while sum(kills.values()) < arguments.kills:
        time.sleep(draw.uniform(0.1, 5))
        if runner.poll() is not None:
            if runner.returncode == 0:
                print("the grid was done before all kills: give it more seeds")
                break
            runner = start(spec, store.folder)
            continue
        cells = running_cells(store)
        if cells and draw.random() < 0.7:
            key = draw.choice(sorted(cells))
            try:
                os.kill(cells[key], signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has ended in between
            killed[key] = killed.get(key, 0) + 1
            kills["cell"] += 1
        elif cells or draw.random() < 0.1:  # while it is starting there is little to break
            runner.kill()
            runner.wait()
            kills["runner"] += 1
            runner = start(spec, store.folder)
        print(f"\r{kills}", end="", flush=True)
    while runner.wait() != 0:
        runner = start(spec, store.folder)
    results, failures, problems = read_results(store.folder)
    cells = json.loads(store.plan.read_text())["cells"]
    computed = {cell["key"]: store.attempts(cell["key"]) for cell in cells}
    problems += [f"{key}: no logits" for key in computed if read_logits(store.folder, key, "test") is None]
    litter = [str(path) for path in store.folder.rglob("*") if path.name.startswith(".") and path.name != PLAN_LOCK]
    found = {
        "kills": kills,
        "cells": len(cells),
        "cells_lost": len(cells) - len(results),
        "cells_failed": len(failures),
        "cells_killed": len(killed),
        "cells_computed_again": sum(attempts > 1 for attempts in computed.values()),
        "computed_again_without_being_killed": [
            key for key, attempts in computed.items() if attempts > 1 + killed.get(key, 0)
        ],
        "files_corrupt": problems,
        "left_over_files": litter,
        "seconds": round(time.monotonic() - started),
    }
    save(HERE / "ablation_soak.json", found)
    print("\n" + json.dumps(found, indent=1))
    bad = found["cells_lost"] or failures or problems or litter or found["computed_again_without_being_killed"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
