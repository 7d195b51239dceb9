"""A made-up ablation: plan, results, failures and logits, the same every time. Also as a folder:

python tests/ablation/fake_results.py <folder>
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

IMAGES, CLASSES = 1000, 4
EFFECTS = {"none": 0.0, "conv": 0.004, "context-max": 0.012, "sagan at layer3": 0.03, "biggan at layer3": -0.015}
CONTROLS = ("conv", "context-max")
SPLITS = {"screen": ("val",), "confirm": ("val", "test")}


@dataclass
class Fake:
    """What the report is made of; tests change it before they analyse it."""

    plan: dict[str, Any]
    results: list[dict[str, Any]]
    failures: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def logits(self, key: str, split: str) -> tuple[np.ndarray, np.ndarray] | None:
        return self.stored.get((key, split))

    def result(self, variant: str, index: int = 0, stage: str = "confirm", budget: int = 6) -> dict[str, Any]:
        """Of that variant's seed of that place."""
        found = [r for r in self.results if (r["variant"], r["stage"], r["budget"]) == (variant, stage, budget)]
        return found[index]

    def lose(self, result: dict[str, Any], **failure: Any) -> None:
        """Take a result away; with words, leave a failure instead."""
        self.results.remove(result)
        if failure:
            self.failures.append({"format": 1, "key": result["key"], "attempts": 1, "log": "", **failure})

    def write(self, folder: Path) -> Path:
        """As `ablate` leaves it."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(self.plan))
        for found, name in ((self.results, "result.json"), (self.failures, "failure.json")):
            for one in found:
                cell = folder / "cells" / one["key"]
                cell.mkdir(parents=True, exist_ok=True)
                (cell / name).write_text(json.dumps(one))
                (cell / "config.yaml").write_text(f"seed_everything: {one.get('seed', 0)}\n")
                (cell / "log.txt").write_text("epoch 1\n")
        for key in {key for key, _ in self.stored}:
            tensors = {}
            for split in ("val", "test"):
                if (key, split) in self.stored:
                    tensors[f"{split}/logits"], tensors[f"{split}/labels"] = self.stored[key, split]
            if (folder / "cells" / key).is_dir():
                save_file(tensors, folder / "cells" / key / "logits.safetensors")
        return folder


def make(
    effects: Mapping[str, float] = EFFECTS,
    *,
    controls: Sequence[str] = CONTROLS,
    seeds: int = 8,
    stages: Mapping[str, Sequence[int]] | None = None,
    spread: float = 0.004,
    used: float = 0.05,
) -> Fake:
    """Accuracies of 0.85 plus the effect, with a spread of runs; the first variant is the baseline.

    used: accuracy lost when a branch is disabled.
    """
    stages = {"confirm": (6,)} if stages is None else stages
    generator = np.random.default_rng(0)
    baseline = next(iter(effects))
    kinds = {n: "baseline" if n == baseline else "control" if n in controls else "variant" for n in effects}
    variants = {
        name: {
            "label": name,
            "kind": kinds[name],
            "baseline": baseline,
            "settings": {"block": name},
            "parameters": 272_474 + 9_000 * place,
            "flops": 41_000_000 + 1_500_000 * place,
        }
        for place, name in enumerate(effects)
    }
    plan = {"format": 1, "name": "fake", "stages": {}, "variants": variants, "baseline": baseline, "expected_sd": None}
    fake = Fake(plan | {"cells": []}, [])
    difficulty = {split: generator.random(IMAGES) for split in ("val", "test")}
    labels = {split: generator.integers(0, CLASSES, IMAGES) for split in ("val", "test")}
    for stage, budgets in stages.items():
        for budget in budgets:
            for seed in range(1000 if stage == "confirm" else 0, (1000 if stage == "confirm" else 0) + seeds):
                shared = spread * generator.normal()
                for name, effect in effects.items():
                    level = 0.85 + effect + 0.7 * shared + 0.7 * spread * generator.normal()
                    _add(fake, generator, stage, budget, seed, name, level, difficulty, labels, used)
    return fake


def _add(
    fake: Fake,
    generator: np.random.Generator,
    stage: str,
    budget: int,
    seed: int,
    name: str,
    level: float,
    difficulty: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    used: float,
) -> None:
    key = hashlib.sha256(f"{stage} {budget} {seed} {name}".encode()).hexdigest()[:16]
    cell = {"key": key, "stage": stage, "budget": budget, "variant": name, "seed": seed, "added": False}
    variant = fake.plan["variants"][name]
    attention = variant["kind"] == "variant"
    metrics = {"train/loss": 0.2}
    for split in SPLITS[stage]:
        blurred = difficulty[split] + 0.02 * generator.normal(size=IMAGES)
        right = np.argsort(np.argsort(blurred)) < round(level * IMAGES)
        picked = np.where(right, labels[split], (labels[split] + 1) % CLASSES)
        fake.stored[key, split] = np.eye(CLASSES, dtype=np.float16)[picked], labels[split]
        metrics |= {f"{split}/accuracy": float(right.mean()), f"{split}/loss": 0.3}
    grows = [metrics["val/accuracy"] * (1 - 0.5 * 0.5**epoch) for epoch in range(budget)]
    graft = f"{name.split()[-1]}.grafts.block"
    rate = float(generator.normal(1, 0.1))
    curves = [
        {"epoch": e, "train/loss": 1.5 / (e + 1), "val/accuracy": a, "val/loss": 1 - a} for e, a in enumerate(grows)
    ]
    knockouts = {}
    if attention:
        for epoch in curves:
            epoch[f"gamma/{graft}"] = 0.05 * rate * (epoch["epoch"] + 1)
        noise = 0.002 * generator.normal(size=3)
        drops = dict(zip(("disabled", "uniform", "other_image"), noise + used * np.array([1, 0.8, 3]), strict=True))
        knockouts = {"as_trained": grows[-1], **{knock: grows[-1] - float(lost) for knock, lost in drops.items()}}
    fake.plan["cells"].append(cell)
    fake.results.append(
        {
            "format": 1,
            **cell,
            "kind": variant["kind"],
            "outcome": "finished",
            "metrics": metrics,
            "curves": curves,
            "gammas": {graft: curves[-1][f"gamma/{graft}"]} if attention else {},
            "evidence": {graft: {"branch_share": 0.12 * rate}} if attention else {},
            "knockouts": knockouts,
            "cost": {
                "parameters": variant["parameters"],
                "flops": variant["flops"],
                "train_seconds": 30.0,
                "images_per_second": 4400.0 - 300 * list(fake.plan["variants"]).index(name),
                "peak_bytes": 123_456_789 + 9_000_000 * list(fake.plan["variants"]).index(name),
            },
            "provenance": {
                "code": "c0de" * 16,
                "git": None,
                "versions": {"python": "3.12.1", "torch": "2.8.0"},
                "machine": "a machine",
                "device": "cpu",
                "threads": 1,
                "data": "da7a" * 16,
                "started": "2026-01-01T00:00:00",
                "finished": "2026-01-01T00:01:00",
                "attempt": 1,
            },
        }
    )


def hostile() -> Fake:
    """Two stages and budgets; a name and an error that would run in a page; diverged, missing and added runs."""
    effects = {**EFFECTS, "<script>alert('x')</script> & $\\frac{1}$ a_b%": 0.001}
    fake = make(effects, stages={"screen": (3,), "confirm": (6, 12)})
    fake.lose(fake.result("conv"), kind="crash", message='<img src="http://evil.example/x" onerror=alert(1)> "boom"')
    fake.lose(fake.result("biggan at layer3"))
    diverged = fake.result("biggan at layer3", budget=12)
    diverged |= {"outcome": "diverged", "metrics": {"test/accuracy": None}}
    fake.plan["cells"][-1]["added"] = True
    fake.result("none", 2)["provenance"]["versions"]["torch"] = "2.9.0"
    return fake


if __name__ == "__main__":
    which = make(stages={"screen": (3,), "confirm": (6, 12)}, seeds=12) if "good" in sys.argv[2:] else hostile()
    print(which.write(Path(sys.argv[1])))
