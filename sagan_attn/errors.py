"""The library's own errors. Every message names what was asked, what was found and what to do."""

__all__ = [
    "BlockError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FormatError",
    "GraftError",
    "NonFiniteError",
    "SaganAttnError",
    "first_line",
    "one_line",
]


class SaganAttnError(Exception):
    """Base of every error this library raises on purpose."""


class BlockError(SaganAttnError, ValueError):
    """An attention block was given options or an input it cannot serve."""


class GraftError(SaganAttnError, ValueError):
    """A graft was refused; the model is as it was before the call."""


class DataError(SaganAttnError):
    """A data set is missing, incomplete or unreadable."""


class ConfigError(SaganAttnError, ValueError):
    """A training configuration contradicts itself, the data or the model."""


class CheckpointError(SaganAttnError):
    """A checkpoint or run folder is missing, foreign or does not fit the model."""


class FormatError(CheckpointError):
    """A checkpoint or run folder was written by a later version of the library, in a format this one does not read."""


class NonFiniteError(SaganAttnError):
    """A run met a NaN or an infinite number in its images, its loss, its gradients or its weights."""


def first_line(error: BaseException) -> str:
    """What an exception of another library says first, or its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(text: object) -> str:
    """Words for a terminal, on one line: what it would obey, such as an escape in a file's name, becomes a `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))
