"""Timing several ways to do one thing against each other: in turn, so that a slow moment of the machine hits all."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Budget", "Call", "clocked", "interleaved", "ratios"]

Call = Callable[[], object]

SAMPLE_SECONDS = {"cpu": 0.005, "cuda": 0.02}  # one reading of the clock spans at least so much


@dataclass(frozen=True)
class Budget:
    """Readings of each way: at least `repetitions`, and more until `seconds` have passed for all ways together."""

    repetitions: int = 5
    seconds: float = 5.0


def interleaved(
    calls: Mapping[str, Call], budget: Budget, device: torch.device, refresh: Call | None = None
) -> dict[str, list[float]]:
    """Seconds a call of each way, one reading a round; the n-th readings of all belong to one round.

    Each way is called before the clock starts, to warm up. The order is another one in each round, so that none
    always follows the same other, and `refresh`, off the clock, puts new random numbers into what they read.
    """
    names = list(calls)
    if not names:
        return {}
    if refresh is not None:
        refresh()
    often = {name: _calls_a_reading(call, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    started, rounds = time.perf_counter(), 0
    while rounds < budget.repetitions or time.perf_counter() - started < budget.seconds:
        if refresh is not None:
            refresh()
        order.shuffle(names)
        for name in names:
            seconds[name].append(clocked(calls[name], device, often[name]))
        rounds += 1
    return seconds


def clocked(call: Call, device: torch.device, times: int = 1) -> float:
    """Seconds a call takes, over so many in a row; on a GPU until all of its work is done."""
    _finish(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    _finish(device)
    return (time.perf_counter() - started) / times


def ratios(seconds: Mapping[str, Sequence[float]], numerator: str, denominator: str) -> float:
    """Median over the rounds of the seconds of one way over those of another."""
    return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))


def _calls_a_reading(call: Call, device: torch.device) -> int:
    once = clocked(call, device)
    wanted = SAMPLE_SECONDS[device.type]
    if once < 20 * wanted:  # the first call may have warmed up; long ones need no better guess
        once = clocked(call, device)
    return max(1, math.ceil(wanted / once))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
