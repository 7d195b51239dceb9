"""Runs an hour: an ablation with workers against the same runs by `train.py fit`, one after another.

    python benchmarks/seeds_per_hour.py [--rounds 3] [--workers 2] [--devices cuda:0,...]

Each round computes the cells of a small ablation and, before or after, fits of the same config; a cell does more than a
fit, for it also measures the test split and what its attention is worth. Writes seeds_per_hour.json beside this file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from sagan_attn.bench.machine import save

HERE = Path(__file__).parent
SEEDS = 8
OPTIONS = {
    "data.init_args.n_train": 2500,
    "data.init_args.n_val": 500,
    "data.init_args.n_test": 500,
    "data.init_args.batch_size": 64,
    "model.host.options": {"width": 64},
}
SPEC = {
    "base": str(HERE.parent / "configs" / "lookup.yaml"),
    "set": OPTIONS,
    "axes": {"block": ["sagan", "nonlocal"]},
    "confirm": {"seeds": SEEDS, "epochs": [1]},
}
VARIANTS = [[], [{"at": "local", "block": "sagan"}], [{"at": "local", "block": "nonlocal"}]]
FITS = [json.dumps(grafts) for grafts in VARIANTS] * 2


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=HERE.parent)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--devices")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"ablate": [], "fit": []}
    with tempfile.TemporaryDirectory() as temporary:
        spec = Path(temporary) / "spec.yaml"
        spec.write_text(yaml.safe_dump(SPEC))
        for number in range(options.rounds):
            ablate = [sys.executable, "-m", "sagan_attn", "ablate", str(spec), "--folder", f"{temporary}/{number}"]
            ablate += ["--workers", str(options.workers)]
            ablate += ["--devices", options.devices] if options.devices else []
            for way in ("ablate", "fit") if number % 2 else ("fit", "ablate"):
                if way == "ablate":
                    rates[way].append(3600 * len(VARIANTS) * SEEDS / seconds(ablate))
                    continue
                taken = 0.0
                for fit, grafts in enumerate(FITS):
                    chosen = [f"--{key.replace('.init_args', '')}={_text(value)}" for key, value in OPTIONS.items()]
                    run = [f"--run_dir={temporary}/fit-{number}-{fit}", f"--seed_everything={fit}"]
                    more = [f"--model.grafts={grafts}", "--trainer.max_epochs=1", "--model.schedule.warmup_epochs=0"]
                    command = [sys.executable, "train.py", "fit", "--config", SPEC["base"], *chosen, *run, *more]
                    taken += seconds(command)
                rates[way].append(3600 * len(FITS) / taken)
            print({way: [round(rate) for rate in found] for way, found in rates.items()}, flush=True)
    ratio = [ours / theirs for ours, theirs in zip(rates["ablate"], rates["fit"], strict=True)]
    content = {
        "workers": options.workers,
        "devices": options.devices or ("cuda" if torch.cuda.is_available() else "cpu"),
        "runs_per_hour": {way: {"median": statistics.median(found), "all": found} for way, found in rates.items()},
        "ratio": {"median": statistics.median(ratio), "min": min(ratio), "max": max(ratio)},
    }
    print(json.dumps(content, indent=1))
    save(HERE / "seeds_per_hour.json", content)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    main()
