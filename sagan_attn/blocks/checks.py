"""Checks of block options, with one wording."""

from numbers import Integral, Real
from typing import Any

from sagan_attn.errors import BlockError

LARGEST = 2**31 - 1  # so that products of two are whole numbers that torch takes
LARGEST_FLOAT = 3.4028234663852886e38  # of float32


def positive(**options: int) -> None:
    """Raise `BlockError` unless each option is a whole number of at least 1, and of no more than torch takes."""
    for name, value in options.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise BlockError(f"{name} ({value!r:.100}) must be a whole number of at least 1")
        if value > LARGEST:
            raise BlockError(f"{name} ({value!r:.100}) must be at most {LARGEST}")


def divides(name: str, divisor: int, what: str, value: int) -> None:
    """Raise `BlockError` unless divisor, the option `name`, divides value, described as `what`."""
    if value % divisor:
        raise BlockError(f"{name} ({divisor}) must divide {what} ({value})")


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise `BlockError` unless value, the option `name`, is one of the choices, which are words or None."""
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise BlockError(f"{name} ({value!r:.100}) must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}")


def probability(**options: float) -> None:
    """Raise `BlockError` unless each option is at least 0 and below 1."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
            raise BlockError(f"{name} ({value!r:.100}) must be a number of at least 0 and below 1")


def number(**options: float) -> None:
    """Raise `BlockError` unless each option is a finite number, in float32 too."""
    for name, value in options.items():
        if not is_number(value):
            raise BlockError(f"{name} ({value!r:.100}) must be a finite number, of at most {LARGEST_FLOAT:.3g}")


def is_number(value: Any) -> bool:
    """Whether value is a finite number, in float32 too."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    limit: Any = LARGEST_FLOAT
    return value <= limit and -value <= limit  # neither of which NaN is


def flags(**options: bool) -> None:
    """Raise `BlockError` unless each option is True or False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise BlockError(f"{name} ({value!r:.100}) must be True or False")


def narrowed(in_channels: int, name: str, reduction: int) -> int:
    """`in_channels // reduction`, the option `name`. Raises `BlockError` where that is no whole number above 0."""
    positive(in_channels=in_channels, **{name: reduction})
    if reduction > in_channels:
        raise BlockError(f"{name} ({reduction}) leaves 0 channels of in_channels ({in_channels})")
    return in_channels // reduction
