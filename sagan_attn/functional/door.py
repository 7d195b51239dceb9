"""The one door from here to the fused kernels: what they need, and the arguments they take.

Triton is imported behind it, on the first call.
"""

import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sagan_attn.errors import BlockError
from sagan_attn.functional.attention import check_lens, check_mask
from sagan_attn.functional.positions import relative_logits
from sagan_attn.functional.precision import no_autocast

__all__ = ["kernels_serve", "obstacle_to_kernels", "through_kernels"]

CAPABILITY = 8  # the first with bfloat16 products, and with enough shared memory for the tiles
# What a program holds at once: features of queries, of values (in slices), rows or columns of a map with a position.
WIDTHS = {"query": 128, "value": 1024}
SIDE = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch, with which it takes tensors on the CPU
_warned: set[str] = set()


def kernels_serve(query: Tensor, key: Tensor, value: Tensor, how: Mapping[str, Any]) -> bool:
    """Whether there are no `obstacle_to_kernels`. Where it is the machine's fault, that is said once, as a warning."""
    missing = _missing(query.device)
    if missing and missing not in _warned and not torch.compiler.is_compiling():
        _warned.add(missing)
        warnings.warn(f"attention takes slower paths, because its kernels cannot serve {missing}", stacklevel=4)
    return not missing and _too_large(query, key, value, how) is None


def obstacle_to_kernels(query: Tensor, key: Tensor, value: Tensor, how: Mapping[str, Any]) -> str | None:
    """What keeps the fused kernels from serving these tensors; None if nothing does."""
    return _missing(query.device) or _too_large(query, key, value, how)


def _missing(device: torch.device) -> str | None:
    if not TRITON:
        return "a machine without Triton"
    if device.type == "cpu" and INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"tensors on {'an AMD GPU' if device.type == 'cuda' else device.type}: an NVIDIA GPU is required"
    found = torch.cuda.get_device_properties(device)
    if found.major < CAPABILITY:
        return f"a GPU of compute capability {found.major}.{found.minor}: at least {CAPABILITY}.0 is required"
    return None


def _too_large(query: Tensor, key: Tensor, value: Tensor, how: Mapping[str, Any]) -> str | None:
    for x in (query, key, value):
        if x.dtype not in DTYPES:
            return f"tensors of {x.dtype}"
    for name, size in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if size > WIDTHS[name]:
            return f"a {name} {size} wide: at most {WIDTHS[name]}"
    sides = [(table.shape[0] + 1) // 2 for table in how.get("position") or ()]
    if sides and max(sides) > SIDE:
        return f"a position on maps of {sides[0]} x {sides[1]}: at most {SIDE} a side"
    return None


def through_kernels(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, how: Mapping[str, Any]
) -> Tensor:
    """`attend` by the fused kernels, for tensors that are not empty."""
    from sagan_attn.kernels.op import fused_attention

    b, heads, n, _ = query.shape
    lens, mask, position = (how.get(name) for name in ("valid_lens", "mask", "position"))
    check_lens(b, n, lens)
    check_mask((b, heads, n, key.shape[2]), mask)
    if position is not None:
        height_rel, width_rel = position
        position = _factors(query, key, height_rel, width_rel, how.get("index"))
    return fused_attention(query, key, value, float(scale), mask=mask, lens=lens, position=position, dropout=dropout)


def _factors(
    query: Tensor, key: Tensor, height_rel: Tensor, width_rel: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`relative_logits` as two parts whose sum they are, [B, h, N, H] and [B, h, N, W].

    They are those of a map of one column, and of a map of one row. Raises `BlockError` where the keys are not the
    positions of the map.
    """
    height, width = (height_rel.shape[0] + 1) // 2, (width_rel.shape[0] + 1) // 2
    if height * width != key.shape[2]:
        raise BlockError(f"position, for a map of {height} x {width}, does not fit {key.shape[2]} keys")
    precise = torch.promote_types(query.dtype, torch.float32)
    with no_autocast(query):
        query, none = query.to(precise), query.new_zeros(1, query.shape[-1], dtype=precise)
        index = torch.arange(query.shape[2], device=query.device) if index is None else index
        by_row = relative_logits(query, height_rel.to(precise), none, index // width)
        return by_row, relative_logits(query, none, width_rel.to(precise), index % width)
