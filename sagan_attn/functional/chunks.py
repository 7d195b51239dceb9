"""Softmax attention through groups of queries: no weights are kept, and memory grows linearly with N.

The idea is FlashAttention's (Dao et al. 2022, arXiv:2205.14135) in whole matrix products: the weights of a group are
made, used and dropped while they are in the cache, and made again in the backward pass from the log-sum-exp of each
query's scores. Where queries and keys are narrow and values wide, as in SAGAN, making them again costs little.

Scores lie in memory with the keys as rows, [M, N]: matrix libraries are up to three times as fast that way round where
d is small. Both passes are operators of torch, opaque to compilers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sagan_attn.functional.attention import attention_output, attention_weights
from sagan_attn.functional.precision import no_autocast, product_dtype

__all__ = ["chunked_attention"]

LOG2_E = math.log2(math.e)  # scores are taken as powers of 2, because torch's exp2 is twice as fast as its exp
CHUNK_SCORES = 2**20  # held at a time: 4 MB in float32, which stay in the cache
CHUNK_SCORES_ON_GPU = 2**26  # not measured: enough to keep it busy
CHUNK_MAPS = 2  # at least: matrix libraries share out whole products among their threads
CHUNK_ROWS = 64  # fewer queries at a time waste the multiplication


def chunked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attention with softmax of scaled dot products.

    query [B, h, N, d], key [B, h, M, d], value [B, h, M, D], none of them empty but for features; mask boolean, True
    at keys to attend to, each side that of [B, h, N, M] or 1. Returns [B, h, N, D] in the dtype of value; a row
    without any key is 0.
    """
    return _Chunked.apply(query, key, value, scale, mask)[0]


# Defined by hand, because `torch.library.custom_op` imports torch's compiler on the first call, which takes seconds.
_LIBRARY = torch.library.Library("sagan_attn", "DEF")
_LIBRARY.define(
    "chunked_attention(Tensor query, Tensor key, Tensor value, float scale, Tensor? mask) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "chunked_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "float scale, Tensor? mask) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "chunked_attention", "CompositeExplicitAutograd")
def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`chunked_attention`, and the log-sum-exp of each query's scores, [B, h, N], as a power of 2."""
    precise, wide = torch.promote_types(query.dtype, torch.float32), product_dtype(value)
    out = _output(value, query.shape[2])
    lse = query.new_empty(query.shape[:3], dtype=precise)
    outs, lses = out.flatten(0, 1), lse.flatten(0, 1)
    with no_autocast(query):
        q, k, v = (_flat(query, precise) * (scale * LOG2_E)).mT, _flat(key, precise), _flat(value, wide)
        for i, j, buffer, allowed in _chunks(query, key, mask, precise):
            weights = torch.bmm(k[i], q[i, :, j], out=buffer)  # [g, M, rows]
            if allowed is not None:
                weights.masked_fill_(~allowed, torch.finfo(precise).min)
            top = weights.amax(1, keepdim=True)
            weights.sub_(top).exp2_()
            if allowed is not None:
                weights.masked_fill_(~allowed, 0)
            total = weights.sum(1, keepdim=True).clamp_(min=1)  # the largest weight is 1, unless there is none
            lses[i, j] = total.log2().add_(top)[:, 0]
            if _in_columns(v):
                outs[i, j] = torch.bmm(v[i].mT, weights.to(wide)).div_(total).mT
            else:
                outs[i, j] = torch.bmm(weights.to(wide).mT, v[i]).div_(total.mT)
    return out, lse


@torch.library.impl(_LIBRARY, "chunked_attention_backward", "CompositeExplicitAutograd")
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for a gradient of the output [B, h, N, D] of `chunked_attention`."""
    precise, wide = lse.dtype, product_dtype(value)
    grads = _gradients(query, key, value, precise)
    dq, dk, dv = (x.flatten(0, 1) for x in grads)  # views
    with no_autocast(query):
        q, k = (_flat(query, precise) * (scale * LOG2_E)).mT, _flat(key, precise)
        g, v = _flat(grad, wide), _flat(value, wide)
        lse, delta = lse.flatten(0, 1)[:, None], (grad.to(precise) * out).sum(-1).flatten(0, 1)[:, None]
        second = None
        for i, j, buffer, allowed in _chunks(query, key, mask, precise):
            weights = torch.bmm(k[i], q[i, :, j], out=buffer).sub_(lse[i, :, j]).exp2_()  # [g, M, rows]
            if allowed is not None:
                weights.masked_fill_(~allowed, 0)
            if wide == precise:
                dv[i].baddbmm_(weights, g[i, j])
                second = torch.empty_like(buffer) if second is None or second.shape != buffer.shape else second
                ds = torch.bmm(v[i], g[i, j].mT, out=second)
            else:
                dv[i] += torch.bmm(weights.to(wide), g[i, j])
                ds = torch.bmm(v[i], g[i, j].mT).to(precise)
            ds.sub_(delta[i, :, j]).mul_(weights)
            dq[i, j] = torch.bmm(k[i].mT, ds).mul_(scale).mT
            if _in_columns(dk):
                dk[i].mT.baddbmm_(q[i, :, j], ds.mT)
            else:
                dk[i].baddbmm_(ds, q[i, :, j].mT)
        dk.div_(LOG2_E)
    return tuple(x.to(like.dtype) for x, like in zip(grads, (query, key, value), strict=True))  # type: ignore[return-value]


def _chunks(
    query: Tensor, key: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """Parts of the B*h maps, parts of the queries, room for the scores [maps, M, rows] and the mask of the two."""
    b, heads, n, _ = query.shape
    m = key.shape[2]
    scores = CHUNK_SCORES if query.device.type == "cpu" else CHUNK_SCORES_ON_GPU
    maps = min(b * heads, max(CHUNK_MAPS, scores // (n * m)))
    rows = min(n, max(CHUNK_ROWS, scores // (m * maps)))
    room = query.new_empty(maps * m * rows, dtype=dtype)
    for i in range(0, b * heads, maps):
        picked = torch.arange(i, min(i + maps, b * heads), device=query.device)
        for j in range(0, n, rows):
            allowed = None
            if mask is not None:
                part = mask if mask.shape[2] == 1 else mask[:, :, j : j + rows]
                allowed = part.expand(b, heads, part.shape[2], m)[picked // heads, picked % heads].mT
            shape = len(picked), m, min(rows, n - j)
            yield slice(i, i + maps), slice(j, j + rows), room[: shape[0] * m * shape[2]].view(shape), allowed


def _in_columns(x: Tensor) -> bool:
    """Whether rows [..., N, d] lie as columns in memory, as those of a map [..., d, H, W] do."""
    return x.stride(-1) != 1 and x.stride(-2) == 1


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, h, N, d] as [B*h, N, d], in the same order of memory."""
    return x.mT.flatten(0, 1).mT.to(dtype) if _in_columns(x) else x.flatten(0, 1).to(dtype)


def _output(value: Tensor, n: int) -> Tensor:
    """Room for the output [B, h, N, D], in columns or rows as the values are."""
    b, heads, _, size = value.shape
    return value.new_empty(b, heads, size, n).mT if _in_columns(value) else value.new_empty(b, heads, n, size)


def _gradients(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Room for those of queries, keys and values, in the order of memory that is the fastest to fill; 0."""
    (b, heads, n, d), m = query.shape, key.shape[2]
    dq = query.new_zeros(b, heads, d, n, dtype=dtype).mT
    dk = key.new_zeros(b, heads, d, m, dtype=dtype).mT if d < 16 else key.new_zeros(b, heads, m, d, dtype=dtype)
    return dq, dk, value.new_zeros(value.shape, dtype=dtype)


@torch.library.register_fake("sagan_attn::chunked_attention", lib=_LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(query.dtype, torch.float32)
    return _output(value, query.shape[2]), query.new_empty(query.shape[:3], dtype=precise)


@torch.library.register_fake("sagan_attn::chunked_attention_backward", lib=_LIBRARY)
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _gradients(query, key, value, lse.dtype)
    return tuple(x.to(like.dtype) for x, like in zip(grads, (query, key, value), strict=True))  # type: ignore[return-value]


class _Chunked(torch.autograd.Function):
    """`chunked_attention` with its derivatives: also for `torch.func`, which custom operators' own are not."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.sagan_attn.chunked_attention(query, key, value, scale, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.scale, mask = inputs
        ctx.save_for_backward(query, key, value, *output, mask)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, mask = ctx.saved_tensors
        return *_ChunkedBackward.apply(grad, query, key, value, out, lse, ctx.scale, mask), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        return _in_one_batch(_Chunked.apply, info.batch_size, in_dims, arguments)


class _ChunkedBackward(torch.autograd.Function):
    """The gradients, which can be differentiated through the formula itself: with all weights in memory."""

    @staticmethod
    def forward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.sagan_attn.chunked_attention_backward(grad, query, key, value, out, lse, scale, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, query, key, value, _, _, ctx.scale, mask = inputs
        ctx.save_for_backward(grad, query, key, value, mask)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, query, key, value, mask = ctx.saved_tensors

        def gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                with no_autocast(query):
                    return attention_output(attention_weights(query, key, ctx.scale, mask=mask), value)

            return torch.func.vjp(attention, query, key, value)[1](grad)

        # out and lse get no derivatives of their own, because they follow from query, key and value.
        return *torch.func.vjp(gradients, grad, query, key, value)[1](upstream), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        return _in_one_batch(_ChunkedBackward.apply, info.batch_size, in_dims, arguments)


def _in_one_batch(
    run: Callable[..., Any], size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """The rule for `torch.vmap`: the mapped dimension becomes part of B."""
    *tensors, scale, mask = arguments

    def first(x: Tensor, dim: int | None) -> Tensor:
        return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)

    tensors = [first(x, dim) for x, dim in zip(tensors, in_dims[:-2], strict=True)]
    batch = tensors[0].shape[1]
    if mask is not None:  # whose batch may be 1
        mask = first(mask, in_dims[-1])
        mask = mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)
    outputs = run(*(x.flatten(0, 1) for x in tensors), scale, mask)
    return tuple(output.unflatten(0, (size, batch)) for output in outputs), (0,) * len(outputs)
