"""Sequences around attention: heads and masks."""

import torch
from torch import Tensor

from sagan_attn.errors import BlockError
from sagan_attn.functional.attention import check_lens
from sagan_attn.functional.checks import check_devices, check_flag, check_floats, check_heads, check_shape, check_whole

__all__ = ["causal_lens", "merge_features", "sequence_mask", "sequence_of", "split_features"]


def split_features(x: Tensor, heads: int) -> Tensor:
    """A sequence [B, N, h*d] as rows of positions [B, h, N, d]: a view.

    Raises `BlockError` for another shape, and for heads that do not divide the features.
    """
    check_shape("input", x, ("B", "N", "h*d"))
    check_heads("the features", heads, x.shape[2])
    return x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)


def merge_features(rows: Tensor) -> Tensor:
    """Rows of positions [B, h, N, D] as a sequence [B, N, h*D]. Raises `BlockError` for another shape."""
    check_shape("rows", rows, ("B", "h", "N", "D"))
    return rows.transpose(1, 2).flatten(2)


def sequence_mask(mask: Tensor | None) -> Tensor | None:
    """A mask [B or 1, N or 1, M] over keys, or one for each head [B, h, N, M], in four dimensions; None for None.

    Raises `BlockError` for other dimensions: in two, [B, M] and [N, M] could not be told apart.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 4):
        return mask
    if not isinstance(mask, Tensor) or mask.dim() != 3:
        found = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise BlockError(f"mask, {found}, must be a tensor of shape [B, 1, M], [1, N, M], [B, N, M] or [B, h, N, M]")
    return mask[:, None]


def sequence_of(x: Tensor, name: str, size: int, batch: int | None = None, length: int | None = None) -> Tensor:
    """x itself. Raises `BlockError`, with its name, unless it is [B, N, size], with that batch and length if given."""
    check_floats(name, x)
    check_whole("size", size)
    if x.dim() != 3 or x.shape[2] != size or batch not in (None, x.shape[0]) or length not in (None, x.shape[1]):
        required = ["B" if batch is None else batch, "N" if length is None else length, size]
        raise BlockError(f"{name} of shape {tuple(x.shape)} must be of shape [{', '.join(map(str, required))}]")
    return x


def causal_lens(x: Tensor, valid_lens: Tensor | None, causal: bool) -> Tensor | None:
    """Lengths for keys of which each position of x [B, N, features] sees those up to its own, if `causal`.

    As [B, N], within valid_lens of shape [B] or [B, N]; without `causal` valid_lens as they are.
    Raises `BlockError` for lengths of another shape or kind.
    """
    check_flag("causal", causal)
    check_shape("input", x, ("B", "N", "features"))
    check_devices(x, valid_lens=valid_lens)
    check_lens(x.shape[0], x.shape[1], valid_lens)
    if not causal:
        return valid_lens
    lens = torch.arange(1, x.shape[1] + 1, device=x.device).expand(x.shape[0], -1)
    if valid_lens is None:
        return lens
    return lens.minimum(valid_lens if valid_lens.dim() == 2 else valid_lens[:, None])
