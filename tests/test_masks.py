"""Lengths and masks: in the functional core, and on the maps of the blocks."""

import inspect
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chunk_sizes import chunk_scores
from references import CASES, fill, pooled
from torch import Tensor

from sagan_attn import functional
from sagan_attn.blocks import create_block
from sagan_attn.errors import BlockError
from sagan_attn.functional.paths import PATHS

B, H, N, M, D = 3, 2, 4, 5, 6


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def random_mask(*shape: int) -> Tensor:
    """With every first key allowed, so that no query is without one."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[..., 0] = True
    return mask


def by_lens(lens: Tensor) -> Tensor:
    return torch.arange(M) < lens.reshape(B, 1, -1, 1)


MASKS: dict[str, tuple[dict[str, Tensor], Tensor]] = {
    "lengths": ({"valid_lens": torch.tensor([1, 5, 3])}, by_lens(torch.tensor([1, 5, 3]))),
    "lengths of queries": (
        {"valid_lens": torch.tensor([[1, 2, 3, 4], [5, 5, 1, 9], [2, 2, 2, 1]])},
        by_lens(torch.tensor([[1, 2, 3, 4], [5, 5, 1, 9], [2, 2, 2, 1]])),
    ),
    "int32 lengths": ({"valid_lens": torch.tensor([1, 5, 3], dtype=torch.int32)}, by_lens(torch.tensor([1, 5, 3]))),
    **{
        f"mask {sizes}": ({"mask": random_mask(*sizes)}, random_mask(*sizes))
        for sizes in product((1, B), (1, H), (1, N), (M,))
    },
    "lengths and mask": (
        {"valid_lens": torch.tensor([4, 5, 3]), "mask": random_mask(1, H, N, M)},
        by_lens(torch.tensor([4, 5, 3])) & random_mask(1, H, N, M),
    ),
    "lengths of queries and mask of keys": (
        {"valid_lens": torch.tensor([[1, 2, 3, 4]] * B), "mask": random_mask(B, 1, 1, M)},
        by_lens(torch.tensor([[1, 2, 3, 4]] * B)) & random_mask(B, 1, 1, M),
    ),
}
masked = pytest.mark.parametrize("masked", MASKS)


@masked
@pytest.mark.parametrize("score", ["dot", "additive", "concatenation"])
def test_weights_are_those_of_the_allowed_keys_alone(score: str, masked: str):
    own, allowed = MASKS[masked]
    how: dict[str, Any] = {"score": score}
    if score != "dot":
        how["vector"] = rows(H, D if score == "additive" else 2 * D)
    q, k = rows(B, H, N, D), rows(B, H, M, D)
    weights = functional.attention_weights(q, k, 0.7, **how, **own)
    means = functional.attention_weights(q, k, 0.7, normalize="mean", **how, **own)
    assert torch.equal(weights == 0, ~allowed.expand(B, H, N, M))
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N, dtype=torch.float64))
    for b, h, n in product(range(B), range(H), range(N)):
        keys = allowed.expand(B, H, N, M)[b, h, n]
        one = how | ({"vector": how["vector"][h : h + 1]} if "vector" in how else {})
        query, reduced = q[b : b + 1, h : h + 1, n : n + 1], k[b : b + 1, h : h + 1, keys]
        expected = functional.attention_weights(query, reduced, 0.7, **one)
        torch.testing.assert_close(weights[b, h, n, keys], expected[0, 0, 0])
        expected = functional.attention_weights(query, reduced, 0.7, normalize="mean", **one)
        torch.testing.assert_close(means[b, h, n, keys], expected[0, 0, 0])
        assert not means[b, h, n, ~keys].any()


SERVED = [
    ("softmax" if path in ("sdpa", "sdpa_padded") else "mean", path) for path in PATHS if path not in ("flex", "fused")
] + [
    ("softmax", path) for path in ("auto", "materialised", "chunked")
]  # "flex" takes no masks, and "fused" is tested in tests/kernels


@masked
@pytest.mark.parametrize("path", ["auto", "materialised", "chunked", "sdpa", "sdpa_padded"])
def test_torch_with_the_same_boolean_mask(path: str, masked: str):
    own, allowed = MASKS[masked]
    q, k, v = rows(B, H, N, D), rows(B, H, M, D), rows(B, H, M, 3)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed.expand(B, H, N, M), scale=0.4)
    output = functional.attend(q, k, v, 0.4, path=path, **own)
    torch.testing.assert_close(output, expected)
    towards = torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, (q, k, v), towards), torch.autograd.grad(expected, (q, k, v), towards), strict=True
    ):
        torch.testing.assert_close(one, other)


@masked
def test_factored_means(masked: str):
    own, allowed = MASKS[masked]
    q, k, v = rows(B, H, N, D), rows(B, H, M, D), rows(B, H, M, 3)
    if allowed.shape[2] > 1:
        with pytest.raises(BlockError, match="path 'factored' cannot serve a mask that differs from query to query"):
            functional.attend(q, k, v, path="factored", normalize="mean", **own)
        return
    results = []
    for path in ("factored", "materialised", "auto", "chunked"):
        output = functional.attend(q, k, v, 0.4, path=path, normalize="mean", **own)
        results.append([output, *torch.autograd.grad(output.square().sum(), (q, k, v))])
    scores = 0.4 * q @ k.transpose(2, 3) * allowed
    torch.testing.assert_close(results[0][0], (scores / allowed.sum(-1, keepdim=True)) @ v)
    for one in results[1:]:
        for a, b in zip(one, results[0], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("normalize", "path"), SERVED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_queries_without_any_key(dtype: torch.dtype, normalize: str, path: str):
    q, k, v = rows(2, 1, 3, 4, dtype=dtype), rows(2, 1, 5, 4, dtype=dtype), rows(2, 1, 5, 4, dtype=dtype)
    for own in (
        {"valid_lens": torch.tensor([0, 3])},
        {"mask": torch.tensor([False, True])[:, None, None, None].expand(2, 1, 1, 5)},
        {"valid_lens": torch.tensor([1, 3]), "mask": torch.tensor([[0, 1, 1, 1, 1], [1] * 5]).bool()[:, None, None]},
    ):
        weights = functional.attention_weights(q, k, normalize=normalize, **own)
        assert not weights[0].any()
        assert weights[1].any()
        output = functional.attend(q, k, v, path=path, normalize=normalize, **own)
        assert not output[0].any()
        gradients = torch.autograd.grad(output.float().square().sum() + weights.square().sum(), (q, k, v))
        for gradient in gradients:
            assert not gradient[0].any()
            assert gradient.isfinite().all()
            assert gradient[1].any()


def test_a_mask_over_everything_has_no_gradient_at_all():
    q, k = rows(1, 1, 2, 3), rows(1, 1, 4, 3)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        weights = functional.attention_weights(q, k, mask=torch.zeros(1, 1, 2, 4, dtype=torch.bool))
        assert not weights.any()
        for gradient in torch.autograd.grad(weights.sum(), (q, k)):
            assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype):
    q, k = rows(B, H, N, D, dtype=dtype), rows(B, H, M, D, dtype=dtype)
    own, allowed = MASKS["lengths and mask"]
    weights = functional.attention_weights(q, k, **own)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, functional.attention_weights(q.float(), k.float(), **own), rtol=0, atol=0)
    assert torch.equal(weights == 0, ~allowed.expand(B, H, N, M))
    with torch.autocast("cpu", dtype):
        assert torch.equal(functional.attention_weights(q, k, **own), weights)
        assert torch.equal(functional.attention_weights(q.float(), k.float(), **own), weights)
        value = torch.randn(B, H, M, D, dtype=dtype)
        output = functional.attend(q, k, value, **own)
    assert output.dtype == dtype
    exact = functional.attend(q.double(), k.double(), value.double(), **own)
    torch.testing.assert_close(output.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), 1e300])
@pytest.mark.parametrize("normalize", ["softmax", "mean"])
@pytest.mark.parametrize("score", ["dot", "additive", "concatenation"])
def test_masked_scores_take_no_part(score: str, normalize: str, bad: float):
    how: dict[str, Any] = {"normalize": normalize, "score": score}
    if score != "dot":
        how["vector"] = rows(H, D if score == "additive" else 2 * D)
    q, k = rows(B, H, N, D).detach(), rows(B, H, M, D).detach()
    lens = torch.tensor([1, 3, 0])
    expected = functional.attention_weights(q, k, valid_lens=lens, **how)
    for b in range(B):
        k[b, :, lens[b] :] = bad
    assert torch.equal(functional.attention_weights(q, k, valid_lens=lens, **how), expected)


def test_means_divide_by_the_number_of_valid_keys():
    q, k = torch.ones(2, 1, 1, 1), torch.tensor([2.0, 4, 6, 8]).reshape(1, 1, 4, 1).expand(2, -1, -1, -1)
    whole = functional.attention_weights(q, k, normalize="mean")
    assert whole[:, 0, 0].tolist() == [[0.5, 1, 1.5, 2]] * 2
    part = functional.attention_weights(q, k, normalize="mean", valid_lens=torch.tensor([2, 1]))
    assert part[:, 0, 0].tolist() == [[1, 2, 0, 0], [2, 0, 0, 0]]


def test_no_keys_and_no_samples():
    lens = torch.zeros(2, dtype=torch.long)
    assert functional.attention_weights(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 0, 4), valid_lens=lens).numel() == 0
    none = functional.attend(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 0, 4), torch.ones(2, 1, 0, 5), valid_lens=lens)
    assert none.tolist() == torch.zeros(2, 1, 3, 5).tolist()
    for lens in (torch.zeros(0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)):
        empty = functional.attention_weights(torch.ones(0, 1, 3, 4), torch.ones(0, 1, 2, 4), valid_lens=lens)
        assert empty.shape == (0, 1, 3, 2)


@pytest.mark.parametrize("path", ["auto", "materialised", "chunked"])
@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"valid_lens": torch.ones(2)}, r"valid_lens of shape \(2,\) and torch.float32 must be whole numbers"),
        ({"valid_lens": torch.ones(2, 4).bool()}, r"valid_lens of shape \(2, 4\) and torch.bool must be whole numbers"),
        ({"valid_lens": torch.ones(3).long()}, r"valid_lens of shape \(3,\) .* of shape \(2,\) or \(2, 4\)"),
        ({"valid_lens": torch.ones(2, 5).long()}, r"valid_lens of shape \(2, 5\)"),
        ({"valid_lens": torch.tensor(1)}, r"valid_lens of shape \(\)"),
        ({"mask": torch.ones(2, 1, 4, 5)}, r"mask of shape \(2, 1, 4, 5\) and torch.float32 must be boolean"),
        ({"mask": torch.ones(4, 5).bool()}, r"mask of shape \(4, 5\) .* broadcast to .* \(2, 1, 4, 5\)"),
        ({"mask": torch.ones(2, 1, 5, 4).bool()}, r"mask of shape \(2, 1, 5, 4\)"),
        ({"mask": torch.ones(2, 3, 4, 5).bool()}, r"mask of shape \(2, 3, 4, 5\)"),
    ],
)
def test_lengths_and_masks_that_do_not_fit(own: dict[str, Tensor], message: str, path: str):
    q, k = torch.ones(2, 1, 4, 3), torch.ones(2, 1, 5, 3)
    with pytest.raises(BlockError, match=message):
        functional.attend(q, k, k, path=path, **own)
    with pytest.raises(BlockError, match=message):
        functional.attention_weights(q, k, **own)


@pytest.mark.parametrize("own", [{"valid_lens": torch.ones(2, 8).long()}, {"mask": torch.ones(2, 1, 8, 5).bool()}])
@pytest.mark.parametrize("queries_at_once", [1, 2, 3, 4])
def test_too_many_rows_are_refused_in_groups_too(
    own: dict[str, Tensor], queries_at_once: int, monkeypatch: pytest.MonkeyPatch
):
    q, k = torch.ones(2, 1, 4, 3), torch.ones(2, 1, 5, 3)
    chunk_scores(monkeypatch, 10 * queries_at_once)
    with pytest.raises(BlockError, match=r"of shape \(2, (8|1, 8, 5)\)"):
        functional.attend(q, k, k, path="chunked", **own)


@pytest.mark.parametrize(("normalize", "path"), SERVED)
def test_unknown_arguments_are_refused_on_every_path(normalize: str, path: str):
    q = torch.ones(1, 1, 2, 3)
    with pytest.raises(TypeError, match="valid_len'"):
        functional.attend(q, q, q, path=path, normalize=normalize, valid_len=torch.ones(1).long())


def test_dropout_in_groups_drops_the_same_weights_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch):
    chunk_scores(monkeypatch, 60)
    q, k, v = rows(1, 1, 20, 4), rows(1, 1, 30, 4), rows(1, 1, 30, 3)
    output = functional.attend(q, k, v, dropout=0.5, path="chunked")
    towards = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, v, towards)
    torch.testing.assert_close((gradient * v).sum(), (output * towards).sum())  # the output is linear in the values


MAPS = [
    (name, options)
    for name, options in CASES
    if "mask" in inspect.signature(create_block(name, 32, **options).forward).parameters  # not so controls
]


@pytest.mark.parametrize(("name", "options"), MAPS, ids=str)
def test_masked_positions_of_a_map_do_not_matter_to_others(name: str, options: dict[str, Any]):
    block = fill(create_block(name, 32, **options).double()).eval()
    mask = torch.rand(2, 5, 7) < 0.4
    mask[1, :3] = False
    x = rows(2, 32, 5, 7)
    changed = torch.where(mask[:, None], x, 3 * torch.randn_like(x))
    masks = {"mask": mask, "context_mask": mask} if name == "decoder" else {"mask": mask}
    before, after = block(x, **masks), block(changed, **masks)
    kept = mask[:, None].expand_as(x)
    torch.testing.assert_close(before[kept], after[kept], rtol=1e-12, atol=1e-12)
    assert (block(x) - block(changed))[kept].abs().max() > 1e-6
    (gradient,) = torch.autograd.grad(before[kept].square().sum(), x)
    assert not gradient[~kept].any()

    every = torch.ones_like(mask)
    whole = block(x, **dict.fromkeys(masks, every))
    torch.testing.assert_close(whole, block(x))

    none = block(x, **dict.fromkeys(masks, ~every))
    assert none.isfinite().all()
    gradients = torch.autograd.grad(none.square().sum(), [x, *block.parameters()], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_pooled_masks(size: int, pool_first: bool):
    """A window counts where any of its positions does, with the maximum over those."""
    options = {"pool": size, "pool_first": pool_first, "scale": "sqrt", "norm": False}
    block = fill(create_block("nonlocal", 8, **options).double())
    x, mask = rows(2, 8, 5, 7), torch.rand(2, 5, 7) < 0.2
    if pool_first:
        low = pooled(torch.where(mask[:, None], x, -torch.inf), size, whole=True)
        key, value = (conv(low.nan_to_num(neginf=0.0)).flatten(2) for conv in (block.key, block.value))
    else:
        low = pooled(torch.where(mask[:, None], block.key(x), -torch.inf), size, whole=True)
        key = low.nan_to_num(neginf=0.0).flatten(2)
        value = pooled(torch.where(mask[:, None], block.value(x), -torch.inf), size, whole=True)
        value = value.nan_to_num(neginf=0.0).flatten(2)
    kept = (low[:, 0] > -torch.inf).flatten(1)
    assert kept.any()
    assert not kept.all()
    scores = torch.einsum("bci,bcj->bij", block.query(x).flatten(2), key) / 2
    weights = scores.masked_fill(~kept[:, None], -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(block.attention_weights(x, mask=mask)[:, 0], weights)
    branch = torch.einsum("bij,bcj->bci", weights, value).view(2, -1, 5, 7)
    torch.testing.assert_close(block(x, mask=mask), x + block.output(branch))


@pytest.mark.parametrize("name", ["sagan", "nonlocal", "multihead", "cross", "encoder", "decoder"])
def test_masks_of_maps_that_do_not_fit(name: str):
    block, x = create_block(name, 8), torch.randn(2, 8, 3, 4)
    for mask in (torch.ones(2, 3, 4), torch.ones(3, 4).bool(), torch.ones(2, 4, 3).bool(), torch.ones(1, 3, 4).bool()):
        with pytest.raises(BlockError, match=r"must be boolean, .* of shape \[B, H, W\] = \(2, 3, 4\)"):
            block(x, mask=mask)
