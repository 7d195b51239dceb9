"""The library's own errors. Every message names what was asked, what was found and what to do."""

__all__ = ["BlockError", "CheckpointError", "ConfigError", "DataError", "GraftError", "SaganAttnError"]


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
