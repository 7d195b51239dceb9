"""Checks of tensors, with one wording.

They look at shapes, dtypes, layouts and devices, never at values, so that nobody waits for a device and traced graphs
hold nothing of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sagan_attn.errors import BlockError

__all__ = [
    "check_alike",
    "check_devices",
    "check_flag",
    "check_floats",
    "check_heads",
    "check_map",
    "check_number",
    "check_shape",
    "check_whole",
]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_floats(name: str, x: Tensor) -> None:
    """Raise `BlockError` unless x is a dense tensor of floating-point numbers that torch computes with."""
    if not isinstance(x, Tensor):
        raise BlockError(f"{name} must be a tensor, not a {type(x).__name__}")
    if x.dtype not in FLOATS or x.layout != torch.strided:
        raise BlockError(
            f"{name} of {x.dtype} and {x.layout} must be dense and of torch.float32, float64, float16 or bfloat16"
        )


def check_shape(name: str, x: Tensor, shape: Sequence[int | str]) -> None:
    """Raise `BlockError` unless x is a tensor as in `check_floats` of that shape, in which words stand for any side."""
    check_floats(name, x)
    if x.dim() != len(shape) or any(
        size != asked for size, asked in zip(x.shape, shape, strict=True) if not isinstance(asked, str)
    ):
        raise BlockError(f"{name} of shape {tuple(x.shape)} must be of shape [{', '.join(map(str, shape))}]")


def check_map(x: Tensor, channels: int | None = None) -> None:
    """Raise `BlockError` unless x is a map of floats [B, C, H, W], with so many channels if told."""
    check_floats("input", x)
    if x.dim() != 4 or channels not in (None, x.shape[1]):
        words = "C" if channels is None else channels
        raise BlockError(f"input of shape {tuple(x.shape)} does not fit: a map [B, {words}, H, W] is required")


def check_alike(x: Tensor, **others: Tensor | None) -> None:
    """Raise `BlockError` unless the others have device and dtype of x. Autocast takes care of other dtypes."""
    check_devices(x, **others)
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype and not _cast(x, other):
            raise BlockError(
                f"{name} of {other.dtype} does not go with an input of {x.dtype}: convert one of the two with .to(), "
                "or run under autocast"
            )


def _cast(x: Tensor, other: Tensor) -> bool:
    """Whether autocast is on for x's device and converts both, which it does not for float64."""
    if x.is_meta or torch.float64 in (x.dtype, other.dtype):
        return False
    return torch.is_autocast_enabled(x.device.type)


def check_devices(x: Tensor, **others: Any) -> None:
    """Raise `BlockError` unless those of the others that are tensors are on the device of x."""
    for name, other in others.items():
        if isinstance(other, Tensor) and other.device != x.device:
            raise BlockError(f"{name} on {other.device} and the input on {x.device} must be on one device")


def check_heads(name: str, heads: int, size: int) -> None:
    """Raise `BlockError` unless heads is a whole number of at least 1 that divides size, described as `name`."""
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or size % heads:
        raise BlockError(f"heads ({heads!r:.100}) must be a whole number of at least 1 that divides {name} ({size})")


def check_flag(name: str, value: bool) -> None:
    """Raise `BlockError` unless value is True or False."""
    if not isinstance(value, bool):
        raise BlockError(f"{name} ({value!r:.100}) must be True or False")


def check_whole(name: str, value: int, least: int = 1) -> None:
    """Raise `BlockError` unless value is a whole number, of at least `least`."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < least:
        raise BlockError(f"{name} ({value!r:.100}) must be a whole number of at least {least}")


def check_number(name: str, value: float) -> None:
    """Raise `BlockError` unless value is a number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise BlockError(f"{name} ({value!r:.100}) must be a number")
