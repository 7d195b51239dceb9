"""The kernels as operators of torch, opaque to compilers, with derivatives of every order and a rule for `torch.vmap`.

Autocast passes the operators by: they take tensors in the dtypes they come in, and accumulate in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sagan_attn.errors import BlockError
from sagan_attn.functional.attention import allowed_keys, attention_output
from sagan_attn.functional.precision import no_autocast
from sagan_attn.kernels.layout import output_like

__all__ = ["fused_attention"]


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    lens: Tensor | None = None,
    position: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with softmax of scaled dot products, in one kernel. Nothing of size N x M is held.

    query [B, h, N, d], key [B, h, M, d], value [B, h, M, D], none of them empty, in float32, bfloat16 or float16 and
    any layout; returns [B, h, N, D] in the dtype and layout of value. A row without any key is 0.

    Args:
        mask: boolean, True at keys to attend to, each side that of [B, h, N, M] or 1.
        lens: number of keys to attend to, which come first; [B] or [B, N].
        position: what a key's row and column on a map of height x width = M add to its score, [B, h, N, height] and
            [B, h, N, width].
        dropout: probability of a weight to be set to 0, the others growing by 1 / (1 - dropout).

    Raises:
        BlockError: for second derivatives, or under `torch.vmap`, with dropout.
    """
    if query.dtype != key.dtype:
        common = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(common), key.to(common)
    if lens is not None:
        lens = (lens[:, None] if lens.dim() == 1 else lens).clamp(0, key.shape[2]).to(torch.int32)
        lens = lens.expand(query.shape[0], query.shape[2])
    rows, columns = position or (None, None)
    # On the device, for CUDA graphs and checkpoints; torch's generator there decides.
    seed = torch.randint(2**31 - 1, (1,), device=query.device) if dropout else None
    return _Fused.apply(query, key, value, mask, lens, rows, columns, seed, scale, dropout)[0]


# Defined by hand, because `torch.library.custom_op` imports torch's compiler on the first call, which takes seconds.
_LIBRARY = torch.library.Library("sagan_attn", "FRAGMENT")
_LIBRARY.define(
    "fused_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? lens, Tensor? rows, "
    "Tensor? columns, Tensor? seed, float scale, float dropout) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "fused_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor? mask, Tensor? lens, Tensor? rows, Tensor? columns, Tensor? seed, float scale, float dropout) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "fused_attention", "CompositeExplicitAutograd")
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lens: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    from sagan_attn.kernels import launch  # Triton, which takes a second to import

    return launch.forward(query, key, value, scale, launch.Limits(mask, lens, rows, columns, dropout, seed))


@torch.library.impl(_LIBRARY, "fused_attention_backward", "CompositeExplicitAutograd")
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    lens: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from sagan_attn.kernels import launch

    limits = launch.Limits(mask, lens, rows, columns, dropout, seed)
    dq, dk, dv, drows, dcolumns = launch.backward(grad, query, key, value, out, lse, scale, limits)
    # An operator has a tensor for every output.
    return dq, dk, dv, lse.new_empty(0) if drows is None else drows, lse.new_empty(0) if dcolumns is None else dcolumns


@torch.library.register_fake("sagan_attn::fused_attention", lib=_LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    return output_like(value, query.shape[2]), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("sagan_attn::fused_attention_backward", lib=_LIBRARY)
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    lens: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    drows, dcolumns = (lse.new_empty(0 if x is None else x.shape) for x in (rows, columns))
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), drows, dcolumns


class _Fused(torch.autograd.Function):
    """Output and log-sum-exp, with derivatives also for `torch.func`, which custom operators' own are not."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.sagan_attn.fused_attention(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.dropout = inputs
        ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dq, dk, dv, *of_position = _FusedBackward.apply(grad, *saved, ctx.scale, ctx.dropout)
        drows, dcolumns = of_position if saved[7] is not None else (None, None)
        return dq, dk, dv, None, None, drows, dcolumns, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        return _in_one_batch(_Fused, 3, info.batch_size, in_dims, arguments)


class _FusedBackward(torch.autograd.Function):
    """The gradients, which can be differentiated through the formula itself: with all weights in memory."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return torch.ops.sagan_attn.fused_attention_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, query, key, value, _, _, mask, lens, rows, columns, _, ctx.scale, ctx.dropout = inputs
        ctx.save_for_backward(grad, query, key, value, rows, columns, mask, lens)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.dropout:
            raise BlockError("second derivatives with dropout of weights need another path: path='materialised'")
        grad, query, key, value, rows, columns, mask, lens = ctx.saved_tensors
        inputs = [x for x in (query, key, value, rows, columns) if x is not None]

        def gradients(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            def attention(*inputs: Tensor) -> Tensor:
                return _formula(*inputs, scale=ctx.scale, mask=mask, lens=lens)

            return torch.func.vjp(attention, *inputs)[1](grad)

        found = torch.func.vjp(gradients, grad, *inputs)[1](upstream[: len(inputs)])
        dgrad, dq, dk, dv, *of_position = found
        drows, dcolumns = of_position or (None, None)
        # out and lse get no derivatives of their own, because they follow from query, key and value.
        return dgrad, dq, dk, dv, None, None, None, None, drows, dcolumns, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        return _in_one_batch(_FusedBackward, 6, info.batch_size, in_dims, arguments)


def _formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    scale: float,
    mask: Tensor | None,
    lens: Tensor | None,
) -> Tensor:
    """What the kernels compute, in operations of torch."""
    with no_autocast(query):
        scores = torch.matmul(query.float(), key.float().mT) * scale
        if rows is not None and columns is not None:
            scores = scores + (rows[..., :, None] + columns[..., None, :]).flatten(-2)
        allowed = allowed_keys(scores.shape, scores.device, lens, mask)
        if allowed is None:
            return attention_output(scores.softmax(-1), value)
        lowest = torch.finfo(scores.dtype).min
        return attention_output(scores.masked_fill(~allowed, lowest).softmax(-1).masked_fill(~allowed, 0), value)


def _in_one_batch(
    function: Any, masks: int, size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """The rule for `torch.vmap`: the mapped dimension becomes part of B. masks: where the mask is in the arguments."""
    *tensors, seed, scale, dropout = arguments
    if dropout:
        raise BlockError("torch.vmap with dropout of weights needs another path: path='materialised'")
    folded = []
    for at, (x, dim) in enumerate(zip(tensors, in_dims, strict=False)):
        if x is not None:
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            if at == masks:  # whose batch may be 1
                x = x.expand(size, folded[0].shape[0] // size, *x.shape[2:])
            x = x.flatten(0, 1)
        folded.append(x)
    outputs = function.apply(*folded, seed, scale, dropout)
    batch = folded[0].shape[0] // size
    outputs = tuple(x.unflatten(0, (size, batch)) if x.dim() > 1 else x for x in outputs)
    return outputs, tuple(0 if x.dim() > 1 else None for x in outputs)
