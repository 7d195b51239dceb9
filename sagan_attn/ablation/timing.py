"""Seconds of training steps, on random images, before any cell is run."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sagan_attn.ablation.models import network_of
from sagan_attn.training.cli import best_precision
from sagan_attn.training.resolve import Resolved

__all__ = ["step_ratio", "step_seconds"]

RATIO_STEPS = 7


def step_seconds(configs: Sequence[Resolved], steps: int) -> list[list[float]]:
    """Seconds of steps of each config, taken in turn, after one that does not count.

    Forward, backward and SGD in the precision that a cell would take, on the GPU where there is one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls = [_Step(resolved, device) for resolved in configs]
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(steps + 1):
        for call, times in zip(calls, seconds, strict=True):
            times.append(call())
    return [times[1:] for times in seconds]


def step_ratio(one: Resolved, other: Resolved) -> float:
    """How many times as long a training step of one config takes as one of the other; more than 1."""
    ours, theirs = step_seconds((one, other), RATIO_STEPS)
    return max(1.01, statistics.median(ours) / statistics.median(theirs))


class _Step:
    def __init__(self, resolved: Resolved, device: torch.device) -> None:
        self.data, self.device = resolved.data, device
        self.network: Any = network_of(resolved).to(device).train()
        if resolved.model.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-6)
        precision = str(resolved.config["trainer"].get("precision") or best_precision("auto"))
        half = torch.bfloat16 if precision.startswith("bf16") else torch.float16
        self.autocast = torch.autocast(device.type, half, enabled="16" in precision)

    def __call__(self) -> float:
        side = self.data.preprocess.image_size
        images = torch.randn(self.data.batch_size, self.data.in_channels, side, side, device=self.device)
        labels = torch.randint(0, self.data.num_classes, (len(images),), device=self.device)
        started = time.perf_counter()
        self.optimizer.zero_grad()
        with self.autocast:
            loss = F.cross_entropy(self.network(images), labels)
        loss.backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started
