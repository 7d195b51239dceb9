"""Before anything is computed: how long it will take, and the smallest effect that could be seen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sagan_attn.ablation.models import Models
from sagan_attn.ablation.plan import cell_config, with_controls
from sagan_attn.ablation.spec import Stage
from sagan_attn.ablation.statistics import detectable_effect
from sagan_attn.ablation.timing import step_seconds

__all__ = ["DEFAULT_SD", "Outlook", "detectable", "outlook", "seconds_an_image"]

DEFAULT_SD = 0.002  # of CIFAR-10 ResNet-18 runs that differ in the seed alone
STEPS = 2
START_UP = 8.0  # seconds a cell takes beside its training; measured on two cores


def seconds_an_image(variants: Mapping[str, Mapping[str, Any]], threads: int) -> dict[str, float]:
    """Of training each variant, the fastest of a few steps on random images."""
    models, before, found = Models(), torch.get_num_threads(), {}
    torch.set_num_threads(threads)
    try:
        for name, variant in variants.items():
            config = cell_config(variant, {}, variant["config"]["trainer"]["max_epochs"], 0)
            resolved = models.resolve(config, name)
            (seconds,) = step_seconds([resolved], STEPS)
            found[name] = min(seconds) / resolved.data.batch_size
    finally:
        torch.set_num_threads(before)
    return found


@dataclass(frozen=True)
class Outlook:
    """What a stage will be: variants, seeds, budgets, cells, and seconds of all cells, one after the other."""

    variants: int
    seeds: int
    budgets: tuple[int, ...]
    cells: int
    seconds: float


def outlook(plan: Mapping[str, Any], stage: Stage, an_image: Mapping[str, float]) -> Outlook:
    """Of a stage by the seconds an image takes each variant to train; before the screen has chosen, those that take
    the longest are taken for the chosen ones."""
    if stage.name in plan["stages"]:
        names, seeds = plan["stages"][stage.name]["variants"], len(plan["stages"][stage.name]["seeds"])
    else:
        variants = {name: one for name, one in plan["variants"].items() if one["kind"] == "variant"}
        slowest = sorted(variants, key=lambda name: -an_image[name])
        chosen = stage.choose if isinstance(stage.choose, tuple) else slowest[: stage.choose]
        names, seeds = with_controls(plan, chosen), len(stage.seeds)
    seconds = 0.0
    for name in names:
        one = plan["variants"][name]
        for budget in stage.epochs:
            seconds += seeds * (START_UP + one["images"] * budget * one["epochs_factor"] * an_image[name])
    return Outlook(len(names), seeds, stage.epochs, len(names) * seeds * len(stage.epochs), seconds)


def detectable(plan: Mapping[str, Any], outlook: Outlook) -> float:
    """The smallest difference in accuracy that a stage sees with a power of 80 %, at 5 % over all of its comparisons.

    Runs are taken to be as good as unpaired: seeds of one number share weights and order, but how much that helps is
    known only afterwards.
    """
    baselines = sum(one["kind"] == "baseline" for one in plan["variants"].values())
    sd = math.sqrt(2) * (plan["expected_sd"] or DEFAULT_SD)
    return detectable_effect(outlook.seeds, sd, max(1, outlook.variants - baselines))
