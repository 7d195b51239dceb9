"""Attention alone on a GPU, in bfloat16: the fused kernels against what torch has, for SAGAN's and BigGAN's shapes.

    python benchmarks/kernel_cuda.py [--seconds 310] [--json benchmarks/kernel_cuda.json]

Queries, keys and values are maps, channels first, as projections make them. `sagan` has keys and values of as many
positions as queries and C wide values, `biggan` a quarter of the positions and half the width; queries have C / 8
features. Speed is over the fastest of the others, by the median over interleaved rounds on fresh random data.
FlexAttention, which compiles for every shape, has a share of the time to itself; `with_flex` says where it joined.
Last, as long as there is time, come the forward passes alone of the largest and the smallest maps; `left_out` counts
what was not begun.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sagan_attn import functional
from sagan_attn.bench.floor import attention_flops, measure_ceilings
from sagan_attn.bench.machine import get_device, save, summary
from sagan_attn.bench.timing import Budget, clocked, interleaved, ratios
from sagan_attn.errors import ConfigError

OURS = "fused"
MAX_BYTES = 2**33  # of N x N weights, of the ways that hold them
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    form: str
    channels: int
    positions: int
    batch: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Keys, and features of queries and values."""
        pooled = self.form == "biggan"
        return self.positions // (4 if pooled else 1), self.channels // 8, self.channels // (2 if pooled else 1)

    def inputs(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        m, d, size = self.sizes
        shapes = (d, self.positions), (d, m), (size, m)
        maps = [torch.randn(self.batch, 1, *shape, device=device).to(dtype) for shape in shapes]
        return [x.mT.requires_grad_() for x in maps]

    def flops(self, backward: bool) -> int:
        m, d, size = self.sizes
        each = attention_flops(self.positions, m, d, size, backward=False)
        return self.batch * (each + (attention_flops(self.positions, m, d, size, backward=True) if backward else 0))


LARGE = [
    Shape(form, c, n, 65536 // n) for n in (4096, 1024, 16384) for c in (256, 128, 512) for form in ("sagan", "biggan")
]
CIFAR = [Shape("sagan", c, n, b) for n, b in ((64, 1024), (256, 512), (1024, 256)) for c in (128, 256)]
Case = tuple[Shape, bool]  # and whether backwards as well
LATER: list[Case] = [(shape, False) for shape in (*LARGE, *CIFAR) if shape.positions > 4096 or shape in CIFAR]
FIRST: list[Case] = [
    (x, backward) for x in (*LARGE, *CIFAR) for backward in (True, False) if (x, backward) not in LATER
]
FOR_FLEX = 0.3  # of the time


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As public code has it."""
    weights = torch.softmax(query @ key.mT, dim=-1)
    return (value.mT @ weights.mT).mT


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def padded(backend: SDPBackend) -> Way:
    """With all as wide as the values and in rows, by one of torch's kernels."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        more = value.shape[-1] - query.shape[-1]
        with sdpa_kernel(backend):
            return sdpa(F.pad(query, (0, more)), F.pad(key, (0, more)), value.contiguous())

    return attend


def in_rows(backend: SDPBackend) -> Way:
    """In rows and as they are, by those of torch's kernels that take values wider than queries."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(query.contiguous(), key.contiguous(), value.contiguous())

    return attend


def flex() -> Way:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query.contiguous(), key.contiguous(), value.contiguous(), scale=1.0)


def ways(path: Any = OURS) -> dict[str, Way]:
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    backends["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    return {
        OURS: lambda *x: functional.attend(*x, path=path),
        "plain": plain,
        "sdpa": sdpa,
        **{f"padded, {name}": padded(backend) for name, backend in backends.items()},
        **{f"rows, {name}": in_rows(backends[name]) for name in ("efficient", "cudnn")},
    }


def add_flex(row: dict, shape: Shape, device: torch.device, budget: Budget) -> None:
    """Measure FlexAttention, which takes long to compile, against ours alone, and count it among the others."""
    found = measure(shape, True, {OURS: ways()[OURS], "flex": flex()}, device, budget)
    row["with_flex"] = {key: found[key] for key in ("ms", "speed_over_best", "first_call_seconds", "skipped")}
    speed = found["speed_over_best"]
    if speed is not None and (row["speed_over_best"] is None or speed < row["speed_over_best"]):
        row["best_of_others"], row["speed_over_best"] = "flex", speed


def measure(shape: Shape, backward: bool, among: Mapping[str, Way], device: torch.device, budget: Budget) -> dict:
    """Milliseconds of each way, what keeps others from the shape, and how far each is from float64."""
    inputs = shape.inputs(device)
    towards = torch.randn(shape.batch, 1, shape.sizes[2], shape.positions, device=device).to(inputs[0].dtype).mT
    one = [x.detach()[:1] for x in inputs]
    expected = functional.attend(*(x.double() for x in one), path="chunked")
    skipped, first, off, calls = {}, {}, {}, {}
    for name, way in among.items():

        def call(way: Way = way) -> object:
            if not backward:
                with torch.no_grad():
                    return way(*inputs)
            return torch.autograd.grad(way(*inputs), inputs, towards)

        if name in ("plain", "sdpa") and 2 * shape.batch * shape.positions * shape.sizes[0] > MAX_BYTES:
            skipped[name] = f"its weights would take more than {MAX_BYTES:,} bytes"
            continue
        try:
            first[name] = clocked(call, device)
            with torch.no_grad():
                off[name] = float((way(*one) - expected).norm() / expected.norm())
        except RuntimeError as error:  # no kernel for it, or no memory
            if name == OURS:
                raise
            skipped[name] = str(error).strip().partition("\n")[0][:200]
            continue
        calls[name] = call

    def refresh() -> None:
        with torch.no_grad():
            for x in (*inputs, towards):
                x.normal_()

    seconds = interleaved(calls, budget, device, refresh)
    medians = {name: summary(values)["median"] for name, values in seconds.items()}
    best = min((name for name in medians if name != OURS), key=medians.__getitem__, default=None)
    return {
        **asdict(shape),
        "passes": "forward+backward" if backward else "forward",
        "flops": shape.flops(backward),
        "ms": {name: summary([1000 * s for s in values]) for name, values in seconds.items()},
        "best_of_others": best,
        "speed_over_best": None if best is None else ratios(seconds, best, OURS),
        "flops_per_second": shape.flops(backward) / medians[OURS],
        "relative_error": off,
        "first_call_seconds": first,
        "skipped": skipped,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=310.0, help="no new case is begun after so many")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args(argv)
    try:
        device = get_device("cuda")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    started = time.perf_counter()
    rate = measure_ceilings(["bf16"], device, 0.5).flops["bf16"]
    rows: list[dict] = []

    def note(words: str) -> None:
        print(words, file=sys.stderr, flush=True)
        flex = sum(backward for _, backward in FIRST) - sum("with_flex" in row for row in rows)
        left_out = {"cases": len(FIRST) + len(LATER) - len(rows), "with_flex": flex}
        save(arguments.json, {"matmul_flops_per_second": rate, "left_out": left_out, "cases": rows})

    def begin(cases: Iterable[Any], until: float) -> Iterator[Any]:
        """Those that are reached before so many seconds."""
        return itertools.takewhile(lambda _: time.perf_counter() - started < until, cases)

    def add(shape: Shape, backward: bool) -> None:
        row = measure(shape, backward, ways(), device, Budget(5, 0.5))
        row["share_of_matmul_rate"] = row["flops_per_second"] / rate
        rows.append(row)
        words = f"{row['ms'][OURS]['median']:.3g} ms, {row['speed_over_best'] or 0:.2f} times {row['best_of_others']}"
        note(f"{len(rows)} of {len(FIRST) + len(LATER)}: {shape}, {row['passes']}: {words}")

    for case in begin(FIRST, (1 - FOR_FLEX) * arguments.seconds):
        add(*case)
    measured = zip(list(rows), FIRST, strict=False)
    for row, (shape, _) in begin([x for x in measured if x[1][1]], arguments.seconds):
        add_flex(row, shape, device, Budget(5, 0.5))
        note(f"{shape} with flex: {row['speed_over_best'] or 0:.2f}")
    for case in begin(LATER, arguments.seconds):
        add(*case)
    note(f"{len(rows)} cases after {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
