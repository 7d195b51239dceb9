"""The one check that most numeric options of the data sets share."""

from sagan_attn.errors import DataError

__all__ = ["require_at_least"]


def require_at_least(name: str, value: object, least: int) -> None:
    """Refuse an option that is not a whole number of at least `least`.

    Raises:
        DataError: names the option, its value and what is required.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{name} ({value!r}) must be a whole number of at least {least}")
