"""The progress bar."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from sagan_attn.training.mean import ImageMean

__all__ = ["SecondBar"]

SECONDS = 1.0


class SecondBar(RichProgressBar):
    """Lightning's bar, brought up to date once a second and at the end of an epoch, with the epoch's mean loss so far.

    Lightning's own is brought up to date, with every metric read back from the device, after every batch.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1, leave=True)
        self._due = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_enabled and self._is_due(trainer.is_last_batch):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.is_enabled and self._is_due(batch_idx + 1 == self.total_val_batches_current_dataloader):
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        running = getattr(pl_module, "train_loss", None)
        mean = running.mean() if isinstance(running, ImageMean) else None
        if mean is not None and trainer.state.fn == "fit":
            metrics["train/loss"] = mean.item()  # waits for the device, but only as often as the bar is drawn
        return metrics

    def _is_due(self, at_end: bool) -> bool:
        now = time.monotonic()
        if now < self._due and not at_end:
            return False
        self._due = now + SECONDS
        return True
