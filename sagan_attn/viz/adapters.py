"""Attention of other libraries: the weights that one call of a module made, for chosen queries alone."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.errors import GraftError

__all__ = ["ForeignCall", "adapter_of"]


@dataclass(frozen=True)
class ForeignCall:
    """One call of a foreign attention.

    Args:
        shape: B, h, N and M of its weights.
        size: height and width of the map that queries and keys are positions of; None for sequences.
        weights: positions of queries [Q] or [B, Q], or None for all -> their weights [B, h, Q, M], before any dropout.
    """

    shape: tuple[int, int, int, int]
    size: tuple[int, int] | None
    weights: Callable[[Tensor | None], Tensor]


Adapter = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], ForeignCall]


def adapter_of(module: nn.Module) -> Adapter | None:
    """How to read a module of another library: `nn.MultiheadAttention`, timm's `NonLocalAttn` and `BottleneckAttn`."""
    if isinstance(module, nn.MultiheadAttention):
        return _multihead
    for place, name, adapter in (
        ("non_local_attn", "NonLocalAttn", _non_local),
        ("bottleneck_attn", "BottleneckAttn", _bottleneck),
    ):
        library = sys.modules.get(f"timm.layers.{place}")  # not imported: the module cannot be one of its
        if library is not None and isinstance(module, getattr(library, name)):
            return adapter
    return None


def _multihead(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForeignCall:
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | dict(kwargs)
    rows: list[Tensor] = [given[name].detach() for name in ("query", "key", "value")]
    if any(row.is_nested for row in rows):
        raise GraftError("nested tensors in nn.MultiheadAttention are not recorded: pass padded ones and a mask")
    if rows[0].dim() == 2:
        rows = [row[:, None] for row in rows]  # [N, 1, E]
    elif module.batch_first:
        rows = [row.transpose(0, 1) for row in rows]
    query, key, value = rows  # [N, B, E]
    n, batch, heads = query.shape[0], query.shape[1], module.num_heads
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    if padding is not None and padding.dim() == 1:
        padding = padding[None]
    m = key.shape[0] + (module.bias_k is not None) + module.add_zero_attn

    def weights(index: Tensor | None) -> Tensor:
        asked, hidden = query, mask
        if index is not None:
            each = index.expand(batch, -1)  # [B, Q]
            asked = query.take_along_dim(each.T[:, :, None], dim=0)
            if mask is not None:
                whole = mask.expand(batch * heads, n, -1).unflatten(0, (batch, heads))  # [B, h, N, M]
                hidden = whole.take_along_dim(each[:, None, :, None], dim=2).flatten(0, 1)
        _, found = F.multi_head_attention_forward(
            asked,
            key,
            value,
            module.embed_dim,
            heads,
            module.in_proj_weight,
            module.in_proj_bias,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            0.0,
            module.out_proj.weight,
            module.out_proj.bias,
            training=False,
            key_padding_mask=padding,
            need_weights=True,
            attn_mask=hidden,
            use_separate_proj_weight=not module._qkv_same_embed_dim,
            q_proj_weight=module.q_proj_weight,
            k_proj_weight=module.k_proj_weight,
            v_proj_weight=module.v_proj_weight,
            average_attn_weights=False,
        )
        assert found is not None
        return found

    return ForeignCall((batch, heads, n, m), None, weights)


def _non_local(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForeignCall:
    (x,) = (*args, *kwargs.values())
    batch, _, height, width = x.shape
    n = height * width

    def weights(index: Tensor | None) -> Tensor:
        query, key = (conv.forward(x.detach()).flatten(2).mT[:, None] for conv in (module.t, module.p))  # [B, 1, N, d]
        return functional.attention_weights(_rows(query, index), key, float(module.scale))

    return ForeignCall((batch, 1, n, n), (height, width), weights)


def _bottleneck(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ForeignCall:
    (x,) = (*args, *kwargs.values())
    batch, _, height, width = x.shape
    heads, n = module.num_heads, height * width

    def weights(index: Tensor | None) -> Tensor:
        both = module.qkv.forward(x.detach())[:, : 2 * module.dim_out_qk]
        query, key = (functional.split_heads(part, heads) for part in both.chunk(2, dim=1))  # [B, h, N, d]
        factor = float(module.scale) if module.scale_pos_embed else 1.0
        tables = module.pos_embed.height_rel * factor, module.pos_embed.width_rel * factor
        every = torch.arange(n, device=x.device) if index is None else index
        return functional.attention_weights(
            _rows(query, index), key, float(module.scale), position=tables, index=every.expand(batch, -1)
        )

    return ForeignCall((batch, heads, n, n), (height, width), weights)


def _rows(query: Tensor, index: Tensor | None) -> Tensor:
    """Rows [Q] or [B, Q] of [B, h, N, d]."""
    return query if index is None else query.take_along_dim(index.expand(len(query), -1)[:, None, :, None], dim=2)
