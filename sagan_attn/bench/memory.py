"""The most memory a call holds at once, beyond what was held before it."""

from collections.abc import Callable
from typing import Any

import torch

from sagan_attn.bench.timing import Call

__all__ = ["largest_batch", "peak_bytes"]


def peak_bytes(call: Call, device: torch.device) -> int:
    """Bytes of tensors and work space: of torch's ledger on the CPU, of its caching allocator on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    recorder: Any = recorded.profiler
    held = most = 0
    for event in recorder.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def largest_batch(fits: Callable[[int], bool], most: int = 2**20, step: float = 1 / 16) -> int:
    """The largest batch that fits, up to a share `step` of it; 0 if not even one does.

    Doubles until one does not fit, then halves the gap.
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    if bad > most:
        return good
    while bad - good > max(1, int(good * step)):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
