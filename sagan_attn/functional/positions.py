"""Where queries and keys are on the map, as part of the scores or of the features."""

import torch
from torch import Tensor

from sagan_attn.errors import BlockError
from sagan_attn.functional.checks import check_devices, check_map, check_number, check_shape
from sagan_attn.functional.precision import no_autocast

__all__ = ["relative_logits", "relative_tables", "sinusoids"]


def relative_tables(height_rel: Tensor, width_rel: Tensor, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tables of relative positions for the size of a map x [B, C, H, W], from tables made for any size.

    height_rel [2*H0-1, d] and width_rel [2*W0-1, d], row o belonging to the offset o - (H0-1) from query to key;
    returns [2*H-1, d] and [2*W-1, d], times scale. At the size they were made for the tables are left as they are; at
    another one, an offset takes the vector at the same part of the side, linearly interpolated. Raises `BlockError` for
    tables of another shape or an even number of rows.
    """
    check_map(x)
    for name, table in (("height_rel", height_rel), ("width_rel", width_rel)):
        check_shape(name, table, ("2*side - 1", "d"))
        if table.shape[0] % 2 == 0:
            raise BlockError(f"{name} has {table.shape[0]} rows: 2 * side - 1 are required")
    check_devices(x, height_rel=height_rel, width_rel=width_rel)
    check_number("scale", scale)
    return _resized(height_rel, x.shape[2]) * scale, _resized(width_rel, x.shape[3]) * scale


def _resized(table: Tensor, size: int) -> Tensor:
    centre = (len(table) - 1) // 2
    precise = torch.promote_types(table.dtype, torch.float32)
    offsets = torch.arange(1 - size, max(size, 1), device=table.device, dtype=precise)  # none for a side of 0
    place = centre + offsets * centre / max(size - 1, 1)
    low = place.floor().long().clamp(0, 2 * centre)
    high = (low + 1).clamp(max=2 * centre)
    return torch.lerp(table[low], table[high], (place - low).to(table.dtype)[:, None])


def relative_logits(query: Tensor, height_rel: Tensor, width_rel: Tensor, index: Tensor | None = None) -> Tensor:
    """q . (height_rel[row of key - row of query] + width_rel[column of key - column of query]).

    query [B, h, Q, d]; height_rel [2*H-1, d], width_rel [2*W-1, d] from `relative_tables`; index the row-major
    positions of the queries, [Q] or [B, Q], None for all N. Returns [B, h, Q, N], without ever holding more than
    2*H + 2*W numbers a query beside it.

    Source: Srinivas et al., Bottleneck Transformers, 2021 (arXiv:2101.11605).
    """
    height, width = (height_rel.shape[0] + 1) // 2, (width_rel.shape[0] + 1) // 2  # len() would fix dynamic sizes
    if index is None:
        index = torch.arange(query.shape[2], device=query.device)
    rows = torch.arange(height, device=query.device) - (index // width)[..., None] + height - 1  # [Q, H] or [B, Q, H]
    columns = (
        torch.arange(width, device=query.device) - (index - index // width * width)[..., None] + width - 1
    )  # [Q, W] or [B, Q, W]
    by_row = _pick(query @ height_rel.T, rows)  # [B, h, Q, H]
    by_column = _pick(query @ width_rel.T, columns)  # [B, h, Q, W]
    return (by_row[..., :, None] + by_column[..., None, :]).flatten(-2)


def _pick(logits: Tensor, index: Tensor) -> Tensor:
    """Of [B, h, Q, offsets] those of each query, by index [Q, K] or [B, Q, K]: [B, h, Q, K]."""
    if index.dim() == 3:
        index = index[:, None]
    return logits.gather(-1, index.expand(*logits.shape[:-1], index.shape[-1]))


def sinusoids(channels: int, height: int, width: int, like: Tensor) -> Tensor:
    """Sine and cosine of row and column at channels / 4 wavelengths from 2 pi to 10000 * 2 pi, [channels, H, W].

    In the order sine of row, sine of column, cosine of row, cosine of column, as timm's `build_sincos2d_pos_embed`.
    In float32 or more, on the device of `like`. channels must be a multiple of 4.

    Source: Vaswani et al., Attention Is All You Need, 2017 (arXiv:1706.03762), for one dimension.
    """
    precise = torch.promote_types(like.dtype, torch.float32)
    with no_autocast(like):
        count = channels // 4
        frequency = 10000.0 ** -(torch.arange(count, device=like.device, dtype=precise) / count)
        row = (frequency[:, None] * torch.arange(height, device=like.device))[:, :, None].expand(-1, -1, width)
        column = (frequency[:, None] * torch.arange(width, device=like.device))[:, None, :].expand(-1, height, -1)
        return torch.cat([row.sin(), column.sin(), row.cos(), column.cos()])
