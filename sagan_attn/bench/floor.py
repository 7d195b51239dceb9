"""The least time attention on a map can take: its arithmetic and its traffic, at the rates of this machine.

B samples, C channels, N = M positions, query and key width d, value width D. For one sample and head the forward pass
multiplies Q K^T and P V, and the backward pass, which has Q K^T to do once more unless N x N weights were kept, in
addition P^T dO, dO V^T, dS K and dS^T Q: 2 N M (d + D) and 2 N M (3 d + 2 D) FLOPs, a multiply-add as 2.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sagan_attn.bench.timing import Call, clocked

__all__ = ["DTYPES", "Case", "Ceilings", "attention_flops", "measure_ceilings"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def attention_flops(n: int, m: int, query_size: int, value_size: int, backward: bool) -> int:
    """FLOPs of softmax attention for one sample and head: of the forward pass, or of the backward pass alone."""
    if backward:
        return 2 * n * m * (3 * query_size + 2 * value_size)
    return 2 * n * m * (query_size + value_size)


@dataclass(frozen=True)
class Case:
    """A SAGAN block (queries and keys C/8 wide, values C) on maps [batch, channels, height, width]."""

    batch: int
    channels: int
    height: int
    width: int
    dtype: str
    backward: bool

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def query_channels(self) -> int:
        return max(1, self.channels // 8)

    @property
    def name(self) -> str:
        return f"{self.batch}, {self.channels}, {self.height} x {self.width}, {self.dtype}, {self.passes}"

    @property
    def passes(self) -> str:
        return "forward+backward" if self.backward else "forward"

    def flops(self) -> int:
        """Of the attention and the three projections."""
        n, d, c = self.positions, self.query_channels, self.channels
        projections = 2 * n * c * (2 * d + c)
        each = attention_flops(n, n, d, c, backward=False) + projections
        if self.backward:  # gradients of the inputs and of the weights
            each += attention_flops(n, n, d, c, backward=True) + 2 * projections
        return self.batch * each

    def compulsory_bytes(self) -> int:
        """Input, q, k, v, output and weights once; with the backward pass, once more, and their gradients once."""
        maps = self.batch * self.positions * (3 * self.channels + 2 * self.query_channels)
        weights = self.channels * (self.channels + 2 * self.query_channels)
        return (maps + weights) * DTYPES[self.dtype].itemsize * (3 if self.backward else 1)

    def weight_bytes(self, heads: int = 1) -> int:
        """Of the attention weights, were they all in memory."""
        return self.batch * heads * self.positions**2 * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Ceilings:
    """The best rates seen on a device: FLOPs a second of a matrix product for each dtype, bytes a second of a copy."""

    flops: Mapping[str, float]
    bandwidth: float

    def floor(self, case: Case) -> float:
        """Seconds below which a case cannot be done, unless its maps stay in a cache.

        At the rate of its dtype, or of fp32 where that is higher: a CPU may have no bfloat16 products of its own.
        """
        rate = max(self.flops[case.dtype], self.flops.get("fp32", 0.0))
        return max(case.flops() / rate, case.compulsory_bytes() / self.bandwidth)

    def best(self, other: "Ceilings") -> "Ceilings":
        """The higher rates of two measurements."""
        flops = {name: max(rate, other.flops.get(name, 0.0)) for name, rate in self.flops.items()}
        return Ceilings(flops, max(self.bandwidth, other.bandwidth))


def measure_ceilings(dtypes: Sequence[str], device: torch.device, seconds: float = 1.0) -> Ceilings:
    """Rates of square matrix products, and of a copy that no cache holds, each tried for so many seconds.

    fp32 is measured with whatever dtypes are asked for.
    """
    sides, copied = ((4096, 8192), 2**30) if device.type == "cuda" else ((256, 512, 1024), 2**28)
    flops = {name: _matmul_rate(DTYPES[name], device, sides, seconds) for name in dict.fromkeys(["fp32", *dtypes])}
    return Ceilings(flops, _copy_rate(copied, device, seconds))


def _matmul_rate(dtype: torch.dtype, device: torch.device, sides: tuple[int, ...], seconds: float) -> float:
    best, started = 0.0, time.perf_counter()
    for side in sides:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        for product in (torch.mm, F.linear):  # a b and a b^T, whose kernels may differ
            fastest = _fastest(lambda product=product, a=a, b=b: product(a, b), device, seconds / (2 * len(sides)))
            best = max(best, 2 * side**3 / fastest)
        if time.perf_counter() - started > 2 * seconds:  # a dtype that this CPU has no instructions for
            break
    return best


def _copy_rate(size: int, device: torch.device, seconds: float) -> float:
    source = torch.randn(2**20, device=device).repeat(size // 2**22)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device, seconds)  # read and written


def _fastest(call: Call, device: torch.device, seconds: float) -> float:
    clocked(call, device)
    best = clocked(call, device)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        best = min(best, clocked(call, device))
    return best
