"""Every registered form against its formula, written once more in `references`: outputs and gradients."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from block_forms import CONTROLS, learning
from chunk_sizes import chunk_scores
from references import CASES, FORMS, fill, parameters_of, reference
from torch import Tensor, nn

from sagan_attn.blocks import block_names, create_block

C = 32
NON_LOCAL = [(name, options) for name, options in CASES if name.startswith("nonlocal")]
MAPS = [(name, options) for name, options in CASES if name not in CONTROLS]


def opened(name: str, options: dict[str, Any], channels: int = C) -> nn.Module:
    return fill(create_block(name, channels, **options).double()).eval()


def random_map(*size: int, batch: int = 2, channels: int = C) -> Tensor:
    return torch.randn(batch, channels, *size, dtype=torch.float64, requires_grad=True)


def assert_same(ours: Tensor, theirs: Tensor, wanted: Sequence[Tensor]) -> None:
    """The same output, and the same gradients of `wanted`, in float64."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    towards = torch.randn_like(theirs)
    gradients = zip(
        torch.autograd.grad(ours, wanted, towards), torch.autograd.grad(theirs, wanted, towards), strict=True
    )
    for number, (one, other) in enumerate(gradients):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda m, n=number: f"gradient {n}: {m}")


def test_every_form_has_a_reference():
    assert set(FORMS) == set(block_names()) == {name for name, _ in CASES}


@pytest.mark.parametrize("size", [(6, 8), (1, 1), pytest.param((5, 7), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_numbers_and_gradients(name: str, options: dict[str, Any], size: tuple[int, int]):
    block, x = opened(name, options), random_map(*size)
    expected = reference(name, options, parameters_of(block), x)
    assert_same(block(x), expected, [x, *learning(block).values()])

    single = block.float()(x.detach().float())
    scale = expected.abs().max().item()
    torch.testing.assert_close(single / scale, expected.float() / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), MAPS, ids=str)
def test_in_groups_of_queries(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    chunk_scores(monkeypatch, 1000)  # a few of the 48 queries
    block, x = opened(name, {**options, "path": "chunked"}), random_map(6, 8)
    whole = opened(name, {**options, "path": "materialised"})
    assert_same(block(x), whole(x), [x])
    ours, theirs = (torch.autograd.grad(b(x).square().sum(), list(b.parameters())) for b in (block, whole))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), NON_LOCAL, ids=str)
def test_in_training_the_norm_takes_the_statistics_of_the_batch(name: str, options: dict[str, Any]):
    block, x = opened(name, options).train(), random_map(4, 5, batch=3)
    before = {key: value.clone() for key, value in block.named_buffers()}
    expected = reference(name, options, parameters_of(block), x, training=True)
    assert_same(block(x), expected, [x, *block.parameters()])
    if block.norm is None:
        assert not before
        return
    block.norm.reset_running_stats()
    block(x)
    block.eval()
    # After one step of momentum 0.1 from mean 0 and variance 1, the latter over N - 1.
    with torch.no_grad():
        rows = block.branch(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(block.norm.running_mean, 0.1 * rows.mean(dim=1))
    torch.testing.assert_close(block.norm.running_var, 0.9 + 0.1 * rows.var(dim=1))
    assert block.norm.num_batches_tracked == 1


@pytest.mark.parametrize("context_size", [(3, 4), (9, 2), (1, 1)], ids=str)
@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c[0] in ("cross", "decoder")], ids=str)
def test_a_context_of_another_size_and_width(name: str, options: dict[str, Any], context_size: tuple[int, int]):
    block, x = opened(name, {**options, "context_channels": 20}), random_map(5, 6)
    context = random_map(*context_size, channels=20)
    expected = reference(name, options, parameters_of(block), x, context)
    assert_same(block(x, context), expected, [x, context, *block.parameters()])


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 9, 20])
@pytest.mark.parametrize("name", [n for n in block_names() if n not in ("botnet", "multihead", "cross")])
def test_other_channel_counts(name: str, channels: int):
    options = {"heads": 1} if name in ("encoder", "decoder") else {}
    block, x = opened(name, options, channels), random_map(3, 4, channels=channels)
    assert_same(block(x), reference(name, options, parameters_of(block), x), [x, *learning(block).values()])


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("pool_first", [False, True])
def test_dot_product_factored_equals_materialised(pool: int, pool_first: bool):
    options = {"mode": "dot_product", "pool": pool, "pool_first": pool_first}
    x = random_map(5, 6)
    for name in ("materialised", "factored", "auto"):
        block = opened("nonlocal", {**options, "path": name})
        expected = reference("nonlocal", options, parameters_of(block), x)
        assert_same(block(x), expected, [x, *block.parameters()])
