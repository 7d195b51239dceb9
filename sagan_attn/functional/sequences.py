"""Sequences around attention: heads and masks."""

import torch
from torch import Tensor

from sagan_attn.errors import BlockError
from sagan_attn.functional.attention import check_lens

__all__ = ["causal_lens", "merge_features", "sequence_mask", "split_features"]


def split_features(x: Tensor, heads: int) -> Tensor:
    """A sequence [B, N, h*d] as rows of positions [B, h, N, d]: a view."""
    return x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)


def merge_features(rows: Tensor) -> Tensor:
    """Rows of positions [B, h, N, D] as a sequence [B, N, h*D]."""
    return rows.transpose(1, 2).flatten(2)


def sequence_mask(mask: Tensor | None) -> Tensor | None:
    """A mask over keys [B, M], or over queries and keys [B, N, M], in the four dimensions of `attention_weights`.

    None, and a mask of four dimensions, are returned as they are. Raises `BlockError` for other dimensions.
    """
    if mask is None or mask.dim() == 4:
        return mask
    if mask.dim() not in (2, 3):
        raise BlockError(f"mask of shape {tuple(mask.shape)} must be of shape [B, M], [B, N, M] or [B, h, N, M]")
    return mask[:, None, None] if mask.dim() == 2 else mask[:, None]


def causal_lens(x: Tensor, valid_lens: Tensor | None, causal: bool) -> Tensor | None:
    """Lengths for keys of which each position of x [B, N, features] sees those up to its own, if `causal`.

    As [B, N], within valid_lens of shape [B] or [B, N]; without `causal` valid_lens as they are.
    Raises `BlockError` for lengths of another shape or kind.
    """
    if not causal:
        return valid_lens
    check_lens(x.shape[0], x.shape[1], valid_lens)
    lens = torch.arange(1, x.shape[1] + 1, device=x.device).expand(x.shape[0], -1)
    if valid_lens is None:
        return lens
    return lens.minimum(valid_lens if valid_lens.dim() == 2 else valid_lens[:, None])
