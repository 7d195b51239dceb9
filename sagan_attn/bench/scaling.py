"""Time and memory of one block on one sample as its map grows."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sagan_attn.bench.block import CAN_FAIL, Measured, Options, create_modules, measure, one_call
from sagan_attn.bench.floor import DTYPES, Case, Ceilings
from sagan_attn.bench.memory import peak_bytes
from sagan_attn.bench.peers import PEERS

__all__ = ["SIZES", "Scaled", "cases_of", "exponents", "measure_scaled"]

SIZES = ((16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128))
LARGE = 4096  # positions; below, `auto` may take another path, and what does not grow with N weighs in


@dataclass(frozen=True)
class Scaled:
    """Seconds and peak bytes of each way in a case."""

    measured: Measured
    bytes: Mapping[str, int]

    def to_dict(self, ceilings: Ceilings) -> dict[str, Any]:
        result = self.measured.to_dict(ceilings)
        for name, peak in self.bytes.items():
            result["peers"][name]["peak_bytes"] = peak
        return result


def cases_of(channels: int, sizes: Sequence[tuple[int, int]], dtypes: Sequence[str]) -> list[Case]:
    """Forward and backward of one sample, from the smallest map to the largest."""
    sizes = sorted(sizes, key=math.prod)
    return [Case(1, channels, height, width, dtype, backward=True) for dtype in dtypes for height, width in sizes]


def measure_scaled(case: Case, names: Sequence[str], options: Options) -> Scaled:
    """`measure`, and then the memory of each way that could be timed."""
    measured = measure(case, names, options)
    shape = case.batch, case.channels, case.height, case.width
    x = torch.randn(shape, device=options.device).to(DTYPES[case.dtype]).requires_grad_()
    towards = torch.randn(shape, device=options.device).to(DTYPES[case.dtype])
    modules, _ = create_modules(case, list(measured.seconds), options)
    peaks: dict[str, int] = {}
    for name, module in modules.items():
        try:
            peaks[name] = peak_bytes(one_call(module, x, towards), options.device)
        except CAN_FAIL:  # no memory left beside the profiler's own
            continue
    return Scaled(measured, peaks)


def exponents(results: Sequence[Scaled]) -> dict[str, dict[str, dict[str, float]]]:
    """By dtype and way: the exponents p of time and of bytes as N^p, fitted from 4096 positions on.

    With fewer than two such maps, fitted to all; a way with one map alone is left out.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in dict.fromkeys(r.measured.case.dtype for r in results):
        for name in PEERS:
            mine = [r for r in results if r.measured.case.dtype == dtype and name in r.bytes]
            large = [r for r in mine if r.measured.case.positions >= LARGE]
            mine = large if len(large) > 1 else mine
            if len(mine) < 2:
                continue
            n = [r.measured.case.positions for r in mine]
            found.setdefault(dtype, {})[name] = {
                "time": _slope(n, [r.measured.median(name) for r in mine]),
                "memory": _slope(n, [r.bytes[name] for r in mine]),
            }
    return found


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the logarithm of y over that of x, by least squares."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope
