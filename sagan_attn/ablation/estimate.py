"""Before anything is computed: how long it will take, and the smallest effect that could be seen."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sagan_attn.ablation.plan import cell_config
from sagan_attn.ablation.spec import Stage
from sagan_attn.ablation.statistics import detectable_effect
from sagan_attn.ablation.variants import network_of
from sagan_attn.training.resolve import resolve_config

__all__ = ["DEFAULT_SD", "Outlook", "detectable", "outlook", "seconds_an_image"]

DEFAULT_SD = 0.002  # of CIFAR-10 ResNet-18 runs that differ in the seed alone
STEPS = 3
START_UP = 8.0  # seconds a cell takes beside its training; measured on two cores


def seconds_an_image(variant: Mapping[str, Any], threads: int) -> float:
    """Of training, the fastest of a few steps on random images, on the GPU where there is one."""
    config = cell_config(variant, {}, variant["config"]["trainer"]["max_epochs"], 0)
    resolved = resolve_config(config, variant["label"])
    data = resolved.data
    data.setup("fit")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network_of(resolved).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6)
    side, best, before = data.preprocess.image_size, math.inf, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(STEPS):
            images = torch.randn(data.batch_size, data.in_channels, side, side, device=device)
            labels = torch.randint(0, data.num_classes, (len(images),), device=device)
            started = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return best / data.batch_size


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
        names, seeds = [name for name in plan["variants"] if name not in variants or name in chosen], len(stage.seeds)
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
