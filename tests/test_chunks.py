"""Attention in groups of queries: derivatives of every order, transforms, compilers, and every way to lie in memory."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from chunk_sizes import chunk_scores
from torch import Tensor

from sagan_attn import functional
from sagan_attn.functional.chunks import chunked_attention

LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "rows": lambda b, h, n, d: torch.randn(b, h, n, d, dtype=torch.float64),
    "columns": lambda b, h, n, d: torch.randn(b, h, d, n, dtype=torch.float64).mT,
    "heads inside": lambda b, h, n, d: torch.randn(b, n, h, d, dtype=torch.float64).transpose(1, 2),
    "part": lambda b, h, n, d: (
        torch.randn(b, n, 3 * h * d, dtype=torch.float64)[..., h * d : 2 * h * d].unflatten(2, (h, d)).transpose(1, 2)
    ),
}
MASKS = {
    "none": None,
    "keys": torch.tensor([[0] * 11, [1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1]]).bool()[:, None, None],
    "rows": torch.rand(1, 3, 7, 11, generator=torch.Generator().manual_seed(0)) > 0.5,
}


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    chunk_scores(monkeypatch, 100)  # of 2 * 3 maps of 7 queries and 11 keys


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = query @ key.mT * scale
    if mask is None:
        return scores.softmax(-1) @ value
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest).softmax(-1).masked_fill(~mask, 0) @ value


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layouts", list(product(LAYOUTS, repeat=2)), ids=" ".join)
def test_output_and_derivatives_up_to_the_third(layouts: tuple[str, str], mask: Tensor | None):
    narrow, wide = (LAYOUTS[name] for name in layouts)
    inputs = [x.requires_grad_() for x in (narrow(2, 3, 7, 4), narrow(2, 3, 11, 4), wide(2, 3, 11, 9))]
    ours, theirs = chunked_attention(*inputs, 0.7, mask), plain(*inputs, 0.7, mask)
    torch.testing.assert_close(ours, theirs)
    towards = torch.randn_like(ours)
    for _ in range(3):
        ours, theirs = (torch.autograd.grad(y, inputs, towards, create_graph=True) for y in (ours, theirs))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
        ours, theirs = (sum(x.square().sum() for x in grads) for grads in (ours, theirs))
        towards = torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize("size", [4, 20])  # gradients of keys are summed in another order of memory from 16 on
def test_narrow_and_wide_queries(size: int):
    inputs = [torch.randn(1, 2, n, d, requires_grad=True) for n, d in ((30, size), (20, size), (20, 5))]
    ours, theirs = chunked_attention(*inputs, 1.0, None), plain(*inputs, 1.0, None)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_scores_far_from_zero():
    query, key, value = torch.randn(1, 1, 9, 4) * 300, torch.randn(1, 1, 9, 4) * 300, torch.randn(1, 1, 9, 3)
    expected = plain(query.double(), key.double(), value.double(), 1.0, None)
    torch.testing.assert_close(chunked_attention(query, key, value, 1.0, None).double(), expected, rtol=1e-3, atol=1e-3)


def test_transforms():
    inputs = [torch.randn(3, 2, n, d, dtype=torch.float64) for n, d in ((5, 4), (6, 4), (6, 3))]
    mask = torch.rand(3, 1, 1, 6) > 0.3

    def losses(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, m: attention(q[None], k[None], v[None], 0.5, m[None]).square().sum()

    def once(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.func.grad(f, argnums=(0, 1, 2))

    def twice(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return once(lambda *inputs: torch.func.grad(f)(*inputs).square().sum())

    for transform in (once, twice):
        for in_dims in ((0, 0, 0, 0), (0, None, None, None)):
            arguments = [x if dim == 0 else x[0] for x, dim in zip([*inputs, mask], in_dims, strict=True)]
            ours, theirs = (
                torch.func.vmap(transform(losses(way)), in_dims)(*arguments) for way in (chunked_attention, plain)
            )
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other)


def test_the_operators_keep_torchs_rules():
    ops = torch.ops.sagan_attn
    inputs = [torch.randn(2, 2, n, d) for n, d in ((5, 4), (6, 4), (6, 3))]
    tests = ("test_schema", "test_faketensor")
    for mask in (None, torch.rand(2, 1, 5, 6) > 0.5):
        torch.library.opcheck(ops.chunked_attention.default, (*inputs, 0.5, mask), test_utils=tests)
        out, lse = ops.chunked_attention(*inputs, 0.5, mask)
        arguments = (torch.randn_like(out), *inputs, out, lse, 0.5, mask)
        torch.library.opcheck(ops.chunked_attention_backward.default, arguments, test_utils=tests)


@pytest.mark.slow
def test_compiles_in_one_graph():
    torch.compiler.reset()
    inputs = [torch.randn(2, 1, n, d, requires_grad=True) for n, d in ((7, 4), (6, 4), (6, 3))]
    compiled = torch.compile(lambda *x: functional.attend(*x, path="chunked"), fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(*inputs), plain(*inputs, 1.0, None)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
