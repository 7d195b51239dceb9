"""Attention problems for the fused kernels, and what they should give: plain formulas in float64."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sagan_attn import functional

# Of ||found - expected|| / ||expected||; twice that for gradients in half precision, which feel the output's rounding.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LAYOUTS: dict[str, Callable[..., Tensor]] = {  # of a function of a shape
    "rows": lambda make, b, h, n, d: make(b, h, n, d),
    "columns": lambda make, b, h, n, d: make(b, h, d, n).mT,  # channels first
    "heads inside": lambda make, b, h, n, d: make(b, n, h, d).transpose(1, 2),  # channels last
    "part": lambda make, b, h, n, d: make(b, n, h, 3 * d)[..., d : 2 * d].transpose(1, 2),
    "spread": lambda make, b, h, n, d: make(n, b, 2 * d, h).permute(1, 3, 0, 2)[..., ::2],
    "same for all": lambda make, b, h, n, d: make(1, 1, n, d).expand(b, h, n, d),
}
MASKS: dict[str, Callable[..., Tensor]] = {
    "keys": lambda b, h, n, m: torch.rand(b, 1, 1, m) < 0.6,
    "rows": lambda b, h, n, m: torch.rand(1, h, n, m) < 0.6,
    "samples": lambda b, h, n, m: torch.rand(b, 1, 1, 1) < 0.5,  # some without any key
    "all": lambda b, h, n, m: torch.rand(b, h, n, m) < 0.3,
}
LENS: dict[str, Callable[..., Tensor]] = {
    "samples": lambda b, n, m: torch.randint(0, m + 1, (b,)),
    "rows": lambda b, n, m: torch.randint(-1, m + 3, (b, n)),
    "causal": lambda b, n, m: torch.arange(1, n + 1).expand(b, n),
}


@dataclass(frozen=True)
class Case:
    """A shape, and what else is asked for: names of the tables above. sides: of a map with a position, n = m."""

    n: int
    m: int
    d: int
    size: int
    b: int = 2
    heads: int = 1
    dtype: torch.dtype = torch.float32
    narrow: str = "rows"
    wide: str = "rows"
    scale: float = 1.0
    mask: str | None = None
    lens: str | None = None
    sides: tuple[int, int] | None = None

    def __str__(self) -> str:
        words = [f"{self.b}x{self.heads}x{self.n}x{self.m} d{self.d} D{self.size}", str(self.dtype)[6:]]
        words += [self.narrow, self.wide]
        words += [f"{name} {x}" for name in ("mask", "lens", "sides") if (x := getattr(self, name))]
        return " ".join(words)

    def inputs(self, device: str = "cpu") -> tuple[list[Tensor], dict[str, Any]]:
        """Query, key and value, then the tables of the position, all with gradients; and the masks."""
        b, h = self.b, self.heads
        make = partial(torch.randn, device=device, dtype=self.dtype)
        narrow, wide = partial(LAYOUTS[self.narrow], make, b, h), partial(LAYOUTS[self.wide], make, b, h)
        tensors = [narrow(self.n, self.d), narrow(self.m, self.d), wide(self.m, self.size)]
        if self.sides:
            tensors += [torch.randn(2 * side - 1, self.d, device=device) * self.d**-0.5 for side in self.sides]
        how: dict[str, Any] = {}
        if self.mask:
            how["mask"] = MASKS[self.mask](b, h, self.n, self.m).to(device)
        if self.lens:
            how["valid_lens"] = LENS[self.lens](b, self.n, self.m).to(device)
        return [x.requires_grad_() for x in tensors], how

    def attend(self, tensors: list[Tensor], how: dict[str, Any], **more: Any) -> Tensor:
        position = tuple(tensors[3:]) or None
        more = {"path": "fused", **more}
        return functional.attend(*tensors[:3], self.scale, position=position, **how, **more)

    def expected_weights(self, tensors: list[Tensor], how: dict[str, Any]) -> Tensor:
        """[B, h, N, M] in float64."""
        query, key = tensors[0], tensors[1]
        scores = torch.einsum("bhnd,bhmd->bhnm", query, key) * self.scale
        if self.sides:
            height, width = self.sides
            at = torch.arange(height * width, device=query.device)
            row, column = at // width, at % width
            scores = scores + torch.einsum("bhnd,nmd->bhnm", query, tensors[3][row - row[:, None] + height - 1])
            scores = scores + torch.einsum("bhnd,nmd->bhnm", query, tensors[4][column - column[:, None] + width - 1])
        allowed = torch.ones_like(scores, dtype=torch.bool)
        if (lens := how.get("valid_lens")) is not None:
            lens = lens[:, None, None, None] if lens.dim() == 1 else lens[:, None, :, None]
            allowed = allowed & (torch.arange(self.m, device=query.device) < lens)
        if (mask := how.get("mask")) is not None:
            allowed = allowed & mask
        # The largest number taken off is that of the allowed alone, and rows without any become 0.
        top = scores.detach().masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True)
        powers = torch.where(allowed, scores - top.nan_to_num(neginf=0), -torch.inf).exp()
        total = powers.sum(-1, keepdim=True)
        return powers / total.where(total > 0, 1)


def errors(case: Case, tensors: list[Tensor], how: dict[str, Any], out: Tensor, grads: Any, towards: Tensor) -> None:
    """Compare an output and gradients with the float64 formula; raise `AssertionError` naming what differs."""
    precise = [x.detach().double().requires_grad_() for x in tensors]
    weights = case.expected_weights(precise, how)
    expected = weights @ precise[2]
    wanted = torch.autograd.grad(expected, precise, towards.double())
    # Differences of near numbers (one key: dS is 0) are held against what they are differences of.
    spread = weights.detach() * (towards.double() @ precise[2].detach().mT).abs() * abs(case.scale)
    parts = (spread @ precise[1].detach().abs()).norm(), (spread.mT @ precise[0].detach().abs()).norm()
    least = [0.0, 0.02 * parts[0], 0.02 * parts[1], 0.0, 0.1 * parts[0], 0.1 * parts[0]]
    names = ["output", "dQ", "dK", "dV", "dheight", "dwidth"]
    compared = zip(names, (out.detach(), *grads), (expected.detach(), *wanted), least, strict=False)
    for name, found, want, floor in compared:
        assert found.shape == want.shape, name
        assert found.isfinite().all(), f"{name} of {case} is not finite"
        error, size = (found.double() - want).norm(), want.norm()
        tolerance = TOLERANCES[case.dtype] * (1 if name == "output" or case.dtype == torch.float32 else 2)
        bound = tolerance * max(float(size), float(floor)) + 1e-30
        assert error <= bound, f"{name} of {case} is off by {error / max(size, floor, 1e-30):.2g}"


def finite_differences(case: Case, device: str = "cpu") -> None:
    """Compare the slope along a random direction with a difference quotient, both of float32."""
    tensors, how = case.inputs(device)
    out = case.attend(tensors, how)
    towards = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, towards)
    for at, grad in enumerate(grads):
        step = 1e-2 * torch.randn_like(tensors[at])
        values = []
        for sign in (1, -1):
            moved = [x.detach() + sign * step if at == i else x.detach() for i, x in enumerate(tensors)]
            values.append((case.attend(moved, how).double() * towards).sum().item())
        slope = (grad.double() * step).sum().item()
        assert (values[0] - values[1]) / 2 == pytest.approx(slope, rel=1e-2, abs=1e-3)


def run(case: Case, device: str = "cpu", **more: Any) -> tuple[list[Tensor], dict[str, Any], Tensor, Any, Tensor]:
    """Fresh inputs, and output and gradients of the fused path towards a random tensor."""
    tensors, how = case.inputs(device)
    out = case.attend(tensors, how, **more)
    towards = torch.randn(out.shape, device=device).to(out.dtype)
    return tensors, how, out, torch.autograd.grad(out, tensors, towards), towards


def random_case(seed: int, largest: int, dtypes: tuple[torch.dtype, ...]) -> Case:
    """A shape up to so many positions, with some of the options, from a seed."""
    rng = random.Random(seed)

    def size(most: int) -> int:
        return max(1, round(most ** rng.random()))

    n, m, sides = size(largest), size(largest), None
    if rng.random() < 0.15:
        sides = size(int(largest**0.5)), size(int(largest**0.5))
        n = m = sides[0] * sides[1]
    d = rng.choice([1, 3, 8, 16, 17, 32, 48, 64, 100, 128])
    return Case(
        n,
        m,
        d,
        rng.choice([1, 5, 16, 33, 64, 96, 128, 200, 256, 512, 1024]),
        b=rng.choice([1, 2, 3]),
        heads=rng.choice([1, 1, 2, 4]),
        dtype=rng.choice(dtypes),
        narrow=rng.choice(list(LAYOUTS)),
        wide=rng.choice(list(LAYOUTS)),
        scale=rng.choice([d**-0.5, d**-0.5, 0.3 * d**-0.5, -(d**-0.5)]),
        mask=rng.choice([None, None, None, *MASKS]),
        lens=rng.choice([None, None, None, "samples", "rows"]),
        sides=sides,
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that what is not written shows."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def full(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return full

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty",))):
            for name in names:
                patch.setattr(owner, name, filled(getattr(owner, name)))
        yield
