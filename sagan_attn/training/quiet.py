"""What other libraries say on the terminal and should not."""

import logging
import warnings

__all__ = ["quieten"]


def quieten() -> None:
    """Keep advertisements and notes on Lightning's own inside from the terminal."""
    for message in (
        ".*treespec, LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*many workers.*",
        "Checkpoint directory .* not empty",
        "The dirpath has changed from",  # a run folder may be moved
        r"`ModelCheckpoint\(monitor='val/accuracy'\)` could not find",  # a run without validation has no best
        "You're using the WeightAveraging callback with a model that overrides",  # it is of one device
        "The default weight initialization of GoogleNet",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_no_advertisement)  # one function, which is not added twice


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()
