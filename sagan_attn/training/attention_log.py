"""What the attention does while it is trained: figures of its heads and sheets, every k epochs."""

import io
import math
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from sagan_attn.errors import ConfigError
from sagan_attn.viz.look import Look, look
from sagan_attn.viz.sheets import attention_sheet

__all__ = ["FIGURES", "AttentionLog"]

FIGURES = ("entropy_share", "self_weight", "distance", "query_independence", "agreement")


class AttentionLog(L.Callback):
    """Looks at the first validation images every few epochs, without changing the training by a bit.

    Logs `attention/<figure>/<path>/head<i>` to every logger of the run, metrics.csv and TensorBoard among them (see
    `viz.head_figures.COLUMNS` for what the figures are; those without meaning are left out), and a sheet of the same
    images to TensorBoard. In a config:

        trainer:
          callbacks:
            - class_path: sagan_attn.training.attention_log.AttentionLog
              init_args: {every_n_epochs: 5}

    Args:
        every_n_epochs: epochs from one look to the next; the last epoch is looked at in any case.
        images: how many of the first validation batch.
        at: site, name or path of grafts; None for all with attention.
        queries: points of the sheet, as parts of the width and height of the image.
        max_bytes: the most that the weights of all heads and images may take; see `record_attention`.
        sheets: whether to draw for TensorBoard.

    Raises:
        ConfigError: a number out of range; when training starts, no validation images to look at.
        GraftError: in the first look, no attention of that name, or more than max_bytes.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        images: int = 4,
        at: str | list[str] | None = None,
        queries: list[tuple[float, float]] | None = None,
        max_bytes: int = 1 << 28,
        sheets: bool = True,
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("images", images)):
            if value < 1:
                raise ConfigError(f"{name} ({value}) must be at least 1")
        self.every_n_epochs = every_n_epochs
        self.images = images
        self.at = at
        self.queries = [(0.5, 0.5), (0.25, 0.25)] if queries is None else queries
        if not self.queries or not all(0 <= part <= 1 for point in self.queries for part in point):
            raise ConfigError(f"queries ({queries}) must be points x, y from 0 to 1, at least one")
        self.max_bytes = max_bytes
        self.sheets = sheets
        self._inputs: Tensor | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.enable_validation:
            raise ConfigError("AttentionLog looks at validation images, and this run has none: give data.val_fraction")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and dataloader_idx == 0 and self._due(trainer):
            self._inputs = batch[0][: self.images].clone()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        inputs, self._inputs = self._inputs, None
        if inputs is None or not trainer.is_global_zero:
            return
        pictures = _pictures(inputs, trainer.datamodule.preprocess)  # type: ignore[attr-defined]
        captions = [f"validation {index}" for index in range(len(pictures))]
        if pl_module.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with trainer.precision_plugin.forward_context():
            seen = look(pl_module.network, inputs, pictures, captions, at=self.at, max_bytes=self.max_bytes)
        for path in seen.records:
            for one in seen.figures(path):
                for name in FIGURES:
                    value = getattr(one, name)
                    if not math.isnan(value):
                        key = f"attention/{name}/{path}/head{one.head}"
                        pl_module.log(key, value, rank_zero_only=True, batch_size=len(inputs))
            if self.sheets:
                self._draw(trainer, seen, path)

    def _due(self, trainer: L.Trainer) -> bool:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return False
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs
        return epoch % self.every_n_epochs == 0 or epoch == last

    def _draw(self, trainer: L.Trainer, seen: Look, path: str) -> None:
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not boards:
            return
        height, width = seen.places.image_size
        cells, _ = seen.cells(path)
        queries = list(dict.fromkeys(cells.at(x * width, y * height) for x, y in self.queries))
        out = io.BytesIO()
        attention_sheet(seen, path, queries).savefig(out, format="png", dpi=100)
        with Image.open(out) as image:
            pixels = np.asarray(image.convert("RGB"))
        for board in boards:
            board.experiment.add_image(f"attention/{path}", pixels, trainer.global_step, dataformats="HWC")


def _pictures(inputs: Tensor, preprocess: Any) -> Tensor:
    """Normalised images [B, 3, H, W] as uint8 pictures."""
    mean, std = (torch.tensor(part, device=inputs.device)[:, None, None] for part in (preprocess.mean, preprocess.std))
    return ((inputs.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).cpu()
