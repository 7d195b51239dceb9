"""One block against its peers at one shape: checked to be equal, then timed in turn."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn.bench.floor import DTYPES, Case, Ceilings
from sagan_attn.bench.machine import summary
from sagan_attn.bench.peers import OURS, PEERS
from sagan_attn.bench.timing import Budget, Call, interleaved, ratios

__all__ = ["CAN_FAIL", "Measured", "Options", "create_modules", "grid", "measure", "one_call"]

# What a peer may raise that cannot serve a shape: compilers, kernels and lack of memory raise RuntimeErrors, timm's
# layers assert.
CAN_FAIL = (RuntimeError, ValueError, AssertionError)
TOLERANCES = {"fp32": 1e-3, "bf16": 6e-2}  # of outputs and gradients, over the largest number
CHANNELS = (64, 128, 256, 512)
BATCHES = {4: 64, 8: 64, 16: 32, 32: 8, 64: 2}  # by side


@dataclass(frozen=True)
class Options:
    """How cases are measured; peers that hold more bytes of N x N weights, or whose first call is longer, are not."""

    device: torch.device
    budget: Budget
    max_bytes: float
    max_call_seconds: float
    channels_last: bool = False


@dataclass(frozen=True)
class Measured:
    """A case, the seconds of every round of each peer, and why others were left out."""

    case: Case
    seconds: Mapping[str, Sequence[float]]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def best_peer(self) -> str | None:
        """The fastest of the same form that is not ours."""
        same = [name for name in self.seconds if PEERS[name].kind == "same form"]
        return min(same, key=lambda name: self.median(name), default=None)

    def median(self, name: str) -> float:
        return summary(self.seconds[name])["median"]

    def speed(self, name: str, other: str | None) -> float | None:
        """How many times as fast as the other; the median over the rounds. None where one was not measured."""
        if other is None or name not in self.seconds or other not in self.seconds:
            return None
        return ratios(self.seconds, other, name)

    def to_dict(self, ceilings: Ceilings) -> dict[str, Any]:
        floor, best = ceilings.floor(self.case), self.best_peer()
        peers: dict[str, Any] = {}
        for name, values in self.seconds.items():
            peers[name] = {
                "kind": PEERS[name].kind,
                "ms": summary([1000 * value for value in values]),
                "times_floor": self.median(name) / floor,
                "speed_over_best_peer": self.speed(name, best),
                "speed_over_plain": self.speed(name, "plain"),
            }
        flops, moved = self.case.flops(), self.case.compulsory_bytes()
        case = {**asdict(self.case), "flops": flops, "bytes": moved, "floor_ms": 1000 * floor}
        return {**case, "best_peer": best, "peers": peers, "skipped": dict(self.skipped)}


def grid(dtypes: Sequence[str], shapes: Sequence[tuple[int, int, int, int]] | None = None) -> list[Case]:
    """Forward, and forward and backward, at those shapes [B, C, H, W]; by default at all of the grid."""
    shapes = shapes or [(batch, c, side, side) for side, batch in BATCHES.items() for c in CHANNELS]
    return [Case(*shape, dtype, backward) for shape in shapes for dtype in dtypes for backward in (False, True)]


def measure(case: Case, names: Sequence[str], options: Options) -> Measured:
    """Seconds of `sagan` and its peers in a case. What cannot serve it is left out, with the reason."""
    device, dtype = options.device, DTYPES[case.dtype]
    modules, skipped = create_modules(case, names, options)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    x = torch.randn(case.batch, case.channels, case.height, case.width, device=device).to(dtype)
    x = x.contiguous(memory_format=layout).requires_grad_(case.backward)
    towards = torch.empty_like(x, requires_grad=False).normal_()
    calls: dict[str, Call] = {}
    expected: list[Tensor] | None = None
    for name, module in modules.items():
        call = one_call(module, x, towards)
        started = time.perf_counter()
        try:
            found = call()
        except CAN_FAIL as error:
            if name == OURS:
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            continue
        if name == OURS:
            expected = found
        elif expected is not None and PEERS[name].kind != "other form":
            off = max(_distance(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
            if not off <= TOLERANCES[case.dtype]:
                skipped[name] = f"its output or gradient differs from ours by {off:.2g} of the largest number"
                continue
        took = time.perf_counter() - started
        if took > options.max_call_seconds and name not in (OURS, "flex"):  # flex compiles
            skipped[name] = f"one call took {took:.3g} s, more than max_call_seconds ({options.max_call_seconds:g})"
            continue
        calls[name] = call
    expected = None

    def refresh() -> None:
        with torch.no_grad():
            x.normal_()
            towards.normal_()

    return Measured(case, interleaved(calls, options.budget, device, refresh), skipped)


def create_modules(case: Case, names: Sequence[str], options: Options) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules of a case, those of the same form with the same weights; and why others are left out."""
    modules: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    for name in names:
        peer = PEERS[name]
        held = case.weight_bytes(peer.weight_heads)
        if held > options.max_bytes:
            skipped[name] = f"its weights would take {held:,} bytes, more than max_bytes ({options.max_bytes:,.0f})"
            continue
        if name == "flex" and options.device.type == "cpu" and case.backward:
            skipped[name] = "FlexAttention has no backward pass on the CPU"
            continue
        try:
            module = peer.create(case.channels, case.height, case.width)
        except CAN_FAIL as error:
            if name == OURS:
                raise
            skipped[name] = f"{type(error).__name__}: {error}"
            continue
        weights = weights or module.state_dict()  # of the first, which is ours
        if peer.kind != "other form":
            module.load_state_dict(weights)
        module = module.to(options.device, DTYPES[case.dtype]).train(case.backward)
        modules[name] = module.to(memory_format=torch.channels_last) if options.channels_last else module
    return modules, skipped


def one_call(module: nn.Module, x: Tensor, towards: Tensor):
    """A function that runs the module; if x requires a gradient, backwards as well, for x and all parameters.

    It returns the output and the gradients.
    """
    wanted = [x, *module.parameters()]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [module(x)]

    def forward_backward() -> list[Tensor]:
        out = module(x)
        return [out.detach(), *torch.autograd.grad(out, wanted, towards)]

    return forward_backward if x.requires_grad else forward


def _distance(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().float(), other.detach().float()
    return ((one - other).abs().max() / other.abs().max()).item()
