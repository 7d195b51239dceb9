"""Checks of block options, with one wording."""

from sagan_attn.errors import BlockError


def positive(**options: int) -> None:
    """Raise `BlockError` unless each option is a whole number of at least 1."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BlockError(f"{name} ({value!r}) must be a whole number of at least 1")


def divides(name: str, divisor: int, what: str, value: int) -> None:
    """Raise `BlockError` unless divisor, the option `name`, divides value, described as `what`."""
    if value % divisor:
        raise BlockError(f"{name} ({divisor}) must divide {what} ({value})")
