"""Memory of attention grows linearly with the number of positions where it is asked to, and by itself on large maps."""

import math
import statistics

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sagan_attn import functional
from sagan_attn.blocks import create_block

SIZES = ((64, 64), (64, 128), (128, 128))  # 4096, 8192 and 16384 positions


def peak(run) -> int:
    """Most bytes that the CPU allocator held at once for `run`, beyond those held before: its own ledger."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_the_ledger_counts():
    assert peak(lambda: torch.ones(1000, 1000).add_(1)) == pytest.approx(4e6, rel=1e-3)
    assert peak(lambda: torch.ones(1000, 1000) + 1) == pytest.approx(8e6, rel=1e-3)


def exponent(sizes, values: list[int]) -> float:
    """Slope of the logarithm of the values over that of the number of positions, fitted to all."""
    return statistics.linear_regression(
        [math.log(height * width) for height, width in sizes], [math.log(value) for value in values]
    ).slope


def peak_of_block(name: str, size: tuple[int, int], **options) -> int:
    """That of forward and backward, with everything but the block and its input."""
    channels = 8
    block = create_block(name, channels, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1)  # nothing at 0, which could be left out
    x = torch.randn(1, channels, *size, requires_grad=True)
    return peak(lambda: block(x).square().sum().backward())


def wide(name: str, **options):
    return pytest.param(name, options, marks=pytest.mark.slow)


FORMS = [
    wide("sagan"),
    wide("sagan", heads=1, position="relative"),
    wide("sagan-paper"),
    ("biggan", {}),
    wide("botnet"),
    wide("nonlocal"),
    wide("nonlocal", mode="gaussian"),
    wide("nonlocal", mode="concatenation"),
    wide("nonlocal", mode="dot_product"),
    wide("multihead", heads=2),
    wide("multihead", heads=2, position="sinusoidal"),
    wide("additive"),
    wide("cross", heads=2),
    wide("encoder", heads=2),
    wide("decoder", heads=2),
]


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_growth_is_linear_on_request(name: str, options: dict):
    peaks = [peak_of_block(name, size, path="chunked", **options) for size in SIZES]
    assert exponent(SIZES, peaks) < 1.1, peaks
    assert peaks[-1] < 16384 * 16384, "as much as the scores of one byte each would take"


@pytest.mark.parametrize(("name", "options"), [("nonlocal", {"mode": "dot_product"}), wide("sagan"), wide("additive")])
def test_large_maps_need_no_request(name: str, options: dict):
    peaks = [peak_of_block(name, size, **options) for size in SIZES]
    assert exponent(SIZES, peaks) < 1.1, peaks
    assert peaks[-1] < 16384 * 16384


def test_materialised_weights_grow_quadratically():
    sizes = ((16, 16), (16, 32), (32, 32))
    assert exponent(sizes, [peak_of_block("sagan", size, path="materialised") for size in sizes]) > 1.8


@pytest.mark.parametrize("normalize", ["softmax", "mean"])
@pytest.mark.parametrize("score", ["dot", "additive", "concatenation"])
def test_without_gradients_nothing_is_kept(score: str, normalize: str):
    n = 4096
    q, k, v = (torch.randn(1, 1, n, 2) for _ in range(3))
    vector = torch.randn(1, 4 if score == "concatenation" else 2)

    def attend() -> Tensor:
        with torch.no_grad():
            return functional.attend(q, k, v, score=score, normalize=normalize, vector=vector, path="chunked")

    assert peak(attend) < 4 * n * n
