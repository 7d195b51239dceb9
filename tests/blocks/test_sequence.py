"""Multi-head attention on sequences, against torch's class and against formulas written out."""

from typing import Any

import pytest
import torch
from chunk_sizes import chunk_scores
from from_torch import assert_same_gradients, tensors
from references import fill, softmax
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks import MultiHeadAttention
from sagan_attn.errors import BlockError

B, N, M = 3, 4, 6


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def sequence(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def copies(*values: Tensor) -> list[Tensor]:
    return [value.detach().clone().requires_grad_() for value in values]


def test_shapes_and_zeros_beyond_the_lengths():
    block = MultiHeadAttention(100, 100, 100, 100, 5, dropout=0.5).eval()
    queries, keys = torch.ones(2, 4, 100), torch.randn(2, 6, 100)
    lens = torch.tensor([3, 2])
    assert block(queries, keys, keys, lens).shape == (2, 4, 100)
    weights = block.attention_weights(queries, keys, lens)
    assert weights.shape == (10, 4, 6)
    assert not weights[:5, :, 3:].any()  # five heads of the first sample
    assert not weights[5:, :, 2:].any()
    assert (weights[:5, :, :3] > 0).all()
    assert (weights[5:, :, :2] > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(10, 4))
    beyond = keys.clone()
    beyond[0, 3:] = 1e3
    beyond[1, 2:] = -1e3
    assert torch.equal(block(queries, beyond, beyond, lens), block(queries, keys, keys, lens))
    assert [tuple(p.shape) for p in block.parameters()] == [(100, 100)] * 4


PADDING = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
PAIRS = torch.tensor([[1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1]], dtype=torch.bool)
EACH = torch.rand(B, 2, N, M, generator=torch.Generator().manual_seed(5)) < 0.5
EACH[..., 1] = True
LENS = torch.tensor([2, 6, 1])
LENS_OF_QUERIES = torch.tensor([[1, 2, 3, 4], [6, 5, 1, 1], [9, 1, 2, 6]])


def by_lens(lens: Tensor) -> Tensor:
    """True at the first keys, [B, N, M]."""
    return (torch.arange(M) < lens.reshape(B, -1, 1)).expand(B, N, M)


# What our class is given, and torch's, whose boolean masks are True at keys to ignore.
MASKS: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {
    "none": ({}, {}),
    "of keys": ({"mask": PADDING[:, None]}, {"key_padding_mask": ~PADDING}),
    "of queries and keys": ({"mask": PAIRS.expand(B, N, M)}, {"attn_mask": ~PAIRS}),
    "of heads": ({"mask": EACH}, {"attn_mask": ~EACH.flatten(0, 1)}),
    "lengths": ({"valid_lens": LENS}, {"key_padding_mask": ~by_lens(LENS)[:, 0]}),
    "lengths of queries": (
        {"valid_lens": LENS_OF_QUERIES},
        {"attn_mask": ~by_lens(LENS_OF_QUERIES).repeat_interleave(2, 0)},
    ),
    "lengths and mask": (
        {"valid_lens": LENS.new_tensor([4, 5, 6]), "mask": PADDING[:, None]},
        {"key_padding_mask": ~(PADDING & by_lens(LENS.new_tensor([4, 5, 6]))[:, 0])},
    ),
}


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(12, 12), (5, 9)], ids=["one size", "key and value sizes"])
def test_torch_multihead_attention(sizes: tuple[int, int], bias: bool, masked: str):
    theirs = fill(nn.MultiheadAttention(12, 2, bias=bias, kdim=sizes[0], vdim=sizes[1], batch_first=True).double())
    ours = MultiHeadAttention(12, *sizes, 12, 2, bias=bias).double()
    ours.load_state_dict(tensors(theirs))
    own, torchs = MASKS[masked]
    inputs = [sequence(B, N, 12), sequence(B, M, sizes[0]), sequence(B, M, sizes[1])]
    others = copies(*inputs)
    output = ours(*inputs, **own)
    expected, weights = theirs(*others, average_attn_weights=False, **torchs)
    close(output, expected)
    close(ours.attention_weights(*inputs[:2], **own), weights.flatten(0, 1))
    towards = torch.randn_like(expected)
    output.backward(towards)
    expected.backward(towards)
    for one, other in zip(inputs, others, strict=True):
        close(one.grad, other.grad)
    assert_same_gradients(ours, theirs)

    single = [value.detach().float() for value in inputs]
    torch.testing.assert_close(ours.float()(*single, **own), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_number_of_heads(heads: int):
    theirs = fill(nn.MultiheadAttention(12, heads, batch_first=True).double())
    ours = MultiHeadAttention(12, 12, 12, 12, heads, bias=True).double()
    ours.load_state_dict(tensors(theirs))
    inputs = [sequence(B, N, 12), sequence(B, M, 12), sequence(B, M, 12)]
    close(ours(*inputs), theirs(*inputs)[0])


def head(block: MultiHeadAttention, number: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One head before the output map, [B, N, size], from its rows of the weights."""
    size = block.query.out_features // block.num_heads
    rows = slice(number * size, (number + 1) * size)
    q, k, v = (
        torch.einsum("bnf,of->bno", x, linear.weight[rows])
        for x, linear in ((queries, block.query), (keys, block.key), (values, block.value))
    )
    if block.score_vector is None:
        scores = torch.einsum("bnd,bmd->bnm", q, k) / size**0.5
    else:
        scores = torch.einsum("bnmd,d->bnm", torch.tanh(q[:, :, None] + k[:, None]), block.score_vector[number])
    return torch.einsum("bnm,bmd->bnd", softmax(scores), v)


@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("heads", [1, 3])
def test_formula_and_sum_over_heads(heads: int, score: str):
    """The output is concat(head_1, ...) W_o, which is the sum over heads of head_m W_m, W_m being columns of W_o."""
    block = MultiHeadAttention(5, 7, 8, 12, heads, score=score).double()
    inputs = [sequence(2, N, 5), sequence(2, M, 7), sequence(2, M, 8)]
    outputs = [head(block, number, *inputs) for number in range(heads)]
    concatenated = torch.einsum("bnf,of->bno", torch.cat(outputs, dim=2), block.output.weight)
    columns = block.output.weight.chunk(heads, dim=1)
    summed = sum(torch.einsum("bnf,of->bno", one, w) for one, w in zip(outputs, columns, strict=True))
    close(summed, concatenated)
    output = block(*inputs)
    close(output, concatenated)
    wanted = [*inputs, *block.parameters()]
    towards = torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, wanted, towards), torch.autograd.grad(concatenated, wanted, towards), strict=True
    ):
        close(one, other)
    single = block.float()(*[value.detach().float() for value in inputs])
    torch.testing.assert_close(single, concatenated.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["materialised", "chunked"])
def test_dropout(path: str, monkeypatch: pytest.MonkeyPatch):
    chunk_scores(monkeypatch, 50_000)
    block = MultiHeadAttention(6, 6, 6, 6, 2, dropout=0.4, path=path)
    x = torch.randn(1, 5, 6).expand(4000, -1, -1)
    expected = block.eval()(x[:1], x[:1], x[:1])
    assert torch.equal(block(x[:1], x[:1], x[:1]), expected)
    dropped = block.train()(x, x, x)
    error = dropped.std(0) / len(x) ** 0.5
    assert (dropped[0] - dropped[1]).abs().max() > 0.01
    assert ((dropped.mean(0) - expected[0]).abs() < 5 * error).all()

    # With unit vectors for values the output is the weights themselves.
    q, k = torch.randn(1, 1, 300, 4), torch.randn(1, 1, 40, 4)
    weights = functional.attention_weights(q, k)
    rows = functional.attend(q, k, torch.eye(40)[None, None], dropout=0.4, path=path)
    zero = rows == 0
    assert zero.float().mean().item() == pytest.approx(0.4, abs=0.03)
    torch.testing.assert_close(rows[~zero], weights[~zero] / 0.6)


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_in_groups_of_queries(score: str, masked: str, monkeypatch: pytest.MonkeyPatch):
    chunk_scores(monkeypatch, 40)  # one query at a time, or two for the dot score without batch
    own, _ = MASKS[masked]
    inputs = [sequence(B, N, 5), sequence(B, M, 7), sequence(B, M, 8)]
    results = []
    for path in ("chunked", "materialised"):
        torch.manual_seed(1)
        block = MultiHeadAttention(5, 7, 8, 12, 2, score=score, bias=True, path=path).double()
        output = block(*inputs, **own)
        results.append([output, *torch.autograd.grad(output.square().sum(), [*inputs, *block.parameters()])])
    for one, other in zip(*results, strict=True):
        close(one, other)


@pytest.mark.parametrize("size", [1, 30, 80, 150, 10**6])
def test_every_size_of_group(size: int, monkeypatch: pytest.MonkeyPatch):
    chunk_scores(monkeypatch, size)
    inputs = [sequence(B, N, 8) for _ in range(3)]
    q, k, v = (functional.split_features(x, 2) for x in inputs)
    lens = torch.tensor([[1, 2, 3, 4], [4, 4, 0, 2], [1, 0, 0, 4]])
    kept = torch.rand(B, 1, N, N) < 0.7
    how: dict[str, Any] = {"valid_lens": lens, "mask": kept}
    whole = functional.attend(q, k, v, 0.5, path="materialised", **how)
    parts = functional.attend(q, k, v, 0.5, path="chunked", **how)
    close(parts, whole)
    towards = torch.randn_like(whole)
    for one, other in zip(
        torch.autograd.grad(parts, inputs, towards), torch.autograd.grad(whole, inputs, towards), strict=True
    ):
        close(one, other)


def test_queries_without_a_key_get_the_bias_of_the_output():
    block = fill(MultiHeadAttention(4, 4, 4, 4, 2, bias=True))
    x = torch.randn(2, 3, 4, requires_grad=True)
    output = block(x, x, x, torch.tensor([0, 2]))
    torch.testing.assert_close(output[0], block.output.bias.expand(3, 4))
    output.square().sum().backward()
    assert not x.grad[0].any()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("path", ["auto", "materialised", "chunked"])
@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize(("batch", "n", "m"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty_sequences(batch: int, n: int, m: int, score: str, path: str):
    block = MultiHeadAttention(4, 4, 4, 8, 2, score=score, path=path)
    queries, keys = torch.randn(batch, n, 4, requires_grad=True), torch.randn(batch, m, 4, requires_grad=True)
    for lens in (None, torch.zeros(batch, dtype=torch.long), torch.zeros(batch, n, dtype=torch.long)):
        output = block(queries, keys, keys, lens)
        assert output.shape == (batch, n, 8)
        assert not output.any() or (lens is None and m)
        assert block.attention_weights(queries, keys, lens).shape == (2 * batch, n, m)
        output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, r"num_heads \(3\) must divide num_hiddens \(8\)"),
        ({"num_heads": 0}, r"num_heads \(0\) must be a whole number of at least 1"),
        ({"query_size": 0}, r"query_size \(0\) must be a whole number"),
        ({"key_size": 1.5}, r"key_size \(1.5\) must be a whole number"),
        ({"value_size": True}, r"value_size \(True\) must be a whole number"),
        ({"num_hiddens": -8}, r"num_hiddens \(-8\) must be a whole number"),
        ({"score": "cosine"}, r"score \('cosine'\) must be 'dot' or 'additive'"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be a number of at least 0 and below 1"),
        ({"dropout": -0.1}, r"dropout \(-0.1\) must be a number"),
        ({"path": "fast"}, r"path \('fast'\) must be"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str):
    sizes = {"query_size": 4, "key_size": 4, "value_size": 4, "num_hiddens": 8, "num_heads": 2}
    with pytest.raises(BlockError, match=message):
        MultiHeadAttention(**{**sizes, **options})


def test_masks_that_do_not_fit():
    block, x = MultiHeadAttention(4, 4, 4, 4, 2), torch.randn(2, 3, 4)
    with pytest.raises(BlockError, match=r"valid_lens of shape \(3,\) .* must be whole numbers of shape \(2,\)"):
        block(x, x, x, torch.tensor([1, 2, 3]))
    with pytest.raises(BlockError, match=r"mask, of shape \(3,\), must be a tensor of shape \[B, 1, M\]"):
        block(x, x, x, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(BlockError, match=r"mask of shape \(2, 1, 1, 4\) .* broadcast to .* \(2, 2, 3, 3\)"):
        block(x, x, x, mask=torch.ones(2, 1, 4, dtype=torch.bool))
    with pytest.raises(BlockError, match=r"torch.float32 must be boolean"):
        block(x, x, x, mask=torch.ones(2, 1, 3))
    with pytest.raises(BlockError, match=r"mask must be a boolean tensor|mask, a list, must be a tensor"):
        block(x, x, x, mask=[[True]])
    with pytest.raises(BlockError, match=r"valid_lens must be a tensor of whole numbers, not a list"):
        block(x, x, x, [1, 2])
    with pytest.raises(
        BlockError,
        match=r"path \('factored'\) must be 'auto', 'materialised', 'chunked', 'fused', 'sdpa' or 'sdpa_padded'",
    ):
        MultiHeadAttention(4, 4, 4, 4, 2, path="factored")


def test_sequences_that_do_not_fit():
    block = MultiHeadAttention(4, 5, 6, 8, 2)
    queries, keys, values = torch.randn(2, 3, 4), torch.randn(2, 7, 5), torch.randn(2, 7, 6)
    with pytest.raises(BlockError, match=r"queries of shape \(3, 4\) must be of shape \[B, N, 4\]"):
        block(queries[0], keys, values)
    with pytest.raises(BlockError, match=r"keys of shape \(1, 7, 5\) must be of shape \[2, N, 5\]"):
        block(queries, keys[:1], values)
    with pytest.raises(BlockError, match=r"values of shape \(2, 4, 6\) must be of shape \[2, 7, 6\]"):
        block(queries, keys, values[:, :4])
    with pytest.raises(BlockError, match=r"keys of shape \(2, 7, 6\) must be of shape \[2, N, 5\]"):
        block.attention_weights(queries, values)
