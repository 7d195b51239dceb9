"""Checks of block options, with one wording."""

import math
from numbers import Integral, Real
from typing import Any

from sagan_attn.errors import BlockError


def positive(**options: int) -> None:
    """Raise `BlockError` unless each option is a whole number of at least 1."""
    for name, value in options.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise BlockError(f"{name} ({value!r}) must be a whole number of at least 1")


def divides(name: str, divisor: int, what: str, value: int) -> None:
    """Raise `BlockError` unless divisor, the option `name`, divides value, described as `what`."""
    if value % divisor:
        raise BlockError(f"{name} ({divisor}) must divide {what} ({value})")


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise `BlockError` unless value, the option `name`, is one of the choices."""
    if value not in choices:
        raise BlockError(f"{name} ({value!r}) must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}")


def probability(**options: float) -> None:
    """Raise `BlockError` unless each option is at least 0 and below 1."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
            raise BlockError(f"{name} ({value!r}) must be a number of at least 0 and below 1")


def number(**options: float) -> None:
    """Raise `BlockError` unless each option is a finite number."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise BlockError(f"{name} ({value!r}) must be a finite number")


def flags(**options: bool) -> None:
    """Raise `BlockError` unless each option is True or False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise BlockError(f"{name} ({value!r}) must be True or False")


def narrowed(in_channels: int, name: str, reduction: int) -> int:
    """`in_channels // reduction`, the option `name`. Raises `BlockError` where that is no whole number above 0."""
    positive(in_channels=in_channels, **{name: reduction})
    if reduction > in_channels:
        raise BlockError(f"{name} ({reduction}) leaves 0 channels of in_channels ({in_channels})")
    return in_channels // reduction
