"""Shared by the tests of promise 4: grafted hosts, and which of them run by default."""

from typing import Any, NamedTuple

import pytest
from hosts import ANY_HOST, count_calls, open_gates
from torch import Tensor

from sagan_attn import Grafts, graft

# The least every road is tried on: plain residual, LayerNorm, depthwise with squeeze-and-excite, and NHWC.
FOUR = ("tv-resnet18", "convnext", "efficientnet", "mambaout")
TIMM_FOUR = ("timm-resnet18", "convnext", "efficientnet", "mambaout")


class Grafted(NamedTuple):
    """A host with grafts, its images, its output before and now, and a count of calls for each graft."""

    model: Any  # a Module with whatever methods its library gives it
    images: Tensor
    grafts: Grafts
    original: Tensor
    output: Tensor
    calls: list[list[int]]

    def runs(self) -> list[int]:
        """How often each block has run since the last time this was asked."""
        found = [len(calls) for calls in self.calls]
        for calls in self.calls:
            calls.clear()
        return found

    @property
    def once(self) -> list[int]:
        return [1] * len(self.grafts)


def grafted(name: str, gate: float = 0.7, count: bool = True, **options: Any) -> Grafted:
    """The host of that name with gates at `gate`; calls are counted unless the counting hooks would be in the way."""
    host = ANY_HOST[name]
    model, images = host.build(), host.images()
    original = model(images)
    grafts = graft(model, list(host.sites), example_input=images[:1], options=options)
    if gate:
        open_gates(grafts, gate)
    output = model(images)
    return Grafted(model, images, grafts, original, output, [count_calls(g.block) for g in grafts] if count else [])


def mostly_slow(names: tuple[str, ...], *default: str) -> list[Any]:
    """Parameters for hosts, of which those named after the first argument alone run by default."""
    assert set(default) <= set(names)
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]
