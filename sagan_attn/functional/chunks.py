"""Softmax attention through groups of queries: no weights are kept, and memory grows linearly with N.

The idea is FlashAttention's (Dao et al. 2022, arXiv:2205.14135) in whole matrix products: the weights of a group are
made, used and dropped while they are in the cache, and made again in the backward pass from the log-sum-exp of each
row. Where queries and keys are narrow and values wide, as in SAGAN, making them again costs little.

Both passes are operators of torch, opaque to compilers. What a pass takes off each row rides along as one more column
of the factors, and so does the sum over a row:

    P [V, 1] = [P V, sum(P)]      [q, -lse] [k, 1]^T = scores - lse      [dO, -sum(dO * O)] [V, 1]^T = dP - sum(P * dP)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sagan_attn.functional.attention import attention_output, attention_weights
from sagan_attn.functional.precision import no_autocast, product_dtype

__all__ = ["chunked_attention"]

CHUNK_SCORES = 2**18  # held at a time: 1 MB in float32, which stays in the cache
CHUNK_ROWS = 64  # fewer queries at a time waste the multiplication


def chunked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attention with softmax of scaled dot products.

    query [B, h, N, d], key [B, h, M, d], value [B, h, M, D], none of them empty but for features; mask boolean, True
    at keys to attend to, each side that of [B, h, N, M] or 1. Returns [B, h, N, D] in the dtype of value; a row
    without any key is 0.
    """
    return _Chunked.apply(query, key, value, scale, mask)[0]


@torch.library.custom_op("sagan_attn::chunked_attention", mutates_args=())
def attend_op(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`chunked_attention`, and the log-sum-exp of each row of scores, [B, h, N, 1], in float32 or float64."""
    precise, wide = torch.promote_types(query.dtype, torch.float32), product_dtype(value)
    out = _empty(value, query.shape[2])
    lse = _empty(query[..., :1], query.shape[2], precise)
    outs, lses = out.flatten(0, 1), lse.flatten(0, 1)
    with no_autocast(query):
        q, k, v = _rows(query, precise) * scale, _rows(key, precise), _rows(value, wide)
        v = _with_column(v, 1) if wide == precise else v
        for i, j, allowed in _chunks(query, key, mask):
            weights = torch.bmm(q[i, j], k[i].mT)
            if allowed is not None:
                weights.masked_fill_(~allowed, torch.finfo(precise).min)
            top = weights.amax(-1, keepdim=True)
            weights.sub_(top).exp_()
            if allowed is not None:
                weights.masked_fill_(~allowed, 0)
            product = torch.bmm(weights.to(wide), v[i])  # [g, rows, D + 1], or D in half precision
            total = product[..., -1:] if wide == precise else weights.sum(-1, keepdim=True)
            total = total.clamp(min=1)  # the largest weight is 1, unless there is none
            outs[i, j] = (product[..., :-1] if wide == precise else product) / total
            lses[i, j] = top + total.log()
    return out, lse


@torch.library.custom_op("sagan_attn::chunked_attention_backward", mutates_args=())
def attend_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value for a gradient of the output [B, h, N, D] of `attend_op`."""
    precise, wide = lse.dtype, product_dtype(value)
    n, m = query.shape[2], key.shape[2]
    grads = _empty(query, n, precise), _empty(key, m, precise), _empty(value, m, precise)
    dq, dk, dv = (part.flatten(0, 1) for part in grads)
    with no_autocast(query):
        q, k = _rows(query, precise) * scale, _rows(key, precise)
        g, v = _rows(grad, wide), _rows(value, wide)
        minus = -(grad.to(precise) * out.to(precise)).sum(-1, keepdim=True).flatten(0, 1)
        q_and, k_and = _with_column(q, -lse.flatten(0, 1)), _with_column(k, 1)
        g_and, v_and = (_with_column(g, minus), _with_column(v, 1)) if wide == precise else (g, v)
        dk.zero_()
        dv.zero_()
        for i, j, allowed in _chunks(query, key, mask):
            weights = torch.bmm(q_and[i, j], k_and[i].mT).exp_()
            if allowed is not None:
                weights.masked_fill_(~allowed, 0)
            ds = torch.bmm(g_and[i, j], v_and[i].mT)
            if wide == precise:
                dv[i].baddbmm_(weights.mT, g[i, j])
            else:
                ds = ds.to(precise).add_(minus[i, j])
                dv[i] += torch.bmm(weights.to(wide).mT, g[i, j])
            ds.mul_(weights)
            dq[i, j] = torch.bmm(ds, k[i])
            dk[i].baddbmm_(ds.mT, q[i, j])
        dq.mul_(scale)
    return tuple(part.to(like.dtype) for part, like in zip(grads, (query, key, value), strict=True))  # type: ignore[return-value]


def _chunks(query: Tensor, key: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Parts of the B*h maps, parts of the queries, and the mask [maps, rows or 1, M] of the two."""
    b, heads, n, _ = query.shape
    m = key.shape[2]
    maps = max(1, CHUNK_SCORES // (n * m))
    rows = min(n, max(CHUNK_ROWS, CHUNK_SCORES // m))
    for i in range(0, b * heads, maps):
        picked = torch.arange(i, min(i + maps, b * heads), device=query.device)
        for j in range(0, n, rows):
            allowed = None
            if mask is not None:
                part = mask if mask.shape[2] == 1 else mask[:, :, j : j + rows]
                allowed = part.expand(b, heads, part.shape[2], m)[picked // heads, picked % heads]
            yield slice(i, i + maps), slice(j, j + rows), allowed


def _in_columns(x: Tensor) -> bool:
    """Whether rows [..., N, d] lie as columns in memory, as those of a map [..., d, H, W] do."""
    return x.stride(-1) != 1 and x.stride(-2) == 1


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, h, N, d] as [B*h, N, d], in the same order of memory."""
    if _in_columns(x):
        return x.mT.flatten(0, 1).mT.to(dtype)
    return x.flatten(0, 1).to(dtype)


def _empty(like: Tensor, length: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised rows [B, h, length, d], in the order of memory of like, whose maps can be flattened."""
    b, heads, _, size = like.shape
    if _in_columns(like):
        return like.new_empty(b, heads, size, length, dtype=dtype).mT
    return like.new_empty(b, heads, length, size, dtype=dtype)


def _with_column(x: Tensor, column: Tensor | float) -> Tensor:
    """Rows [G, N, d] with one more feature, in the same order of memory."""
    last = column if isinstance(column, Tensor) else x.new_full((), column).expand(*x.shape[:-1], 1)
    if _in_columns(x):
        return torch.cat([x.mT, last.mT], dim=-2).mT
    return torch.cat([x, last], dim=-1)


@attend_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(query.dtype, torch.float32)
    return _empty(value, query.shape[2]), _empty(query[..., :1], query.shape[2], precise)


@attend_backward_op.register_fake
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
    return _empty(query, query.shape[2]), _empty(key, key.shape[2]), _empty(value, key.shape[2])


class _Chunked(torch.autograd.Function):
    """`chunked_attention` with its derivatives: also for `torch.func`, which custom operators' own are not."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return attend_op(query, key, value, scale, mask)

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
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return attend_backward_op(*arguments)

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
