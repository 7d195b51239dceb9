"""Before anything is computed: how long it will take, and the smallest effect that could be seen."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from sagan_attn.ablation.plan import cell_config
from sagan_attn.ablation.statistics import detectable_effect
from sagan_attn.ablation.variants import network_of
from sagan_attn.training.resolve import resolve_config

__all__ = ["DEFAULT_SD", "detectable", "seconds_an_image", "seconds_in_all"]

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


def seconds_in_all(plan: Mapping[str, Any], an_image: Mapping[str, float], workers: int) -> float:
    """Of all cells of the plan, by the seconds an image takes each variant to train."""
    total = 0.0
    for cell in plan["cells"]:
        variant = plan["variants"][cell["variant"]]
        images = variant["images"] * cell["budget"] * variant["epochs_factor"]
        total += START_UP + images * an_image[cell["variant"]]
    return total / workers


def detectable(plan: Mapping[str, Any], stage: str) -> float:
    """The smallest difference in accuracy that a stage sees with a power of 80 %, at 5 % over all of its comparisons.

    Runs are taken to be as good as unpaired: seeds of one number share weights and order, but how much that helps is
    known only afterwards.
    """
    of_stage = plan["stages"][stage]
    compared = [name for name in of_stage["variants"] if plan["variants"][name]["kind"] != "baseline"]
    sd = math.sqrt(2) * (plan["expected_sd"] or DEFAULT_SD)
    return detectable_effect(len(of_stage["seeds"]), sd, len(compared))
