"""The command line with a clock on its training epochs."""

import time
from typing import Any

import lightning as L

from sagan_attn.training.cli import SaganCLI


class EpochClock(L.Callback):
    """Seconds of each training epoch, validation left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


class TimedCLI(SaganCLI):
    clock: EpochClock

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        self.clock = EpochClock()
        trainer.callbacks.insert(0, self.clock)  # type: ignore[attr-defined]
        return trainer
