"""The mean of a loss over an epoch's images, kept where the loss is."""

import torch
from torch import Tensor

__all__ = ["ImageMean"]


class ImageMean:
    """Mean over images of losses given batch by batch.

    Adding is one operation on the losses' device and nobody waits for it; Lightning's `log`, called for every step,
    was the largest single cost of its loop.
    """

    def __init__(self) -> None:
        self.images = 0
        self._total: Tensor | None = None

    def add(self, loss: Tensor, images: int) -> None:
        """Count `loss`, the mean over `images` images."""
        loss = loss.detach()
        if self._total is None or self._total.device != loss.device:  # a checkpoint's is on the CPU
            self._total = self._on(loss.device)
        self._total.add_(loss, alpha=images)
        self.images += images

    def mean(self) -> Tensor | None:
        """The mean so far, float32 on the losses' device; None before the first batch."""
        return None if self._total is None or not self.images else (self._total / self.images).float()

    def reset(self) -> None:
        """Forget everything."""
        self.images, self._total = 0, None

    def total(self, device: torch.device) -> Tensor:
        """Sum and number of images [2]: what adds up over processes and goes into a checkpoint."""
        total = self._on(device)
        return torch.stack([total, torch.full_like(total, self.images)])

    def restore(self, total: Tensor) -> None:
        """Go on from what `total` gave."""
        self._total, self.images = total[0].clone(), round(total[1].item())

    def _on(self, device: torch.device) -> Tensor:
        # a sum over many steps; MPS has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros((), dtype=dtype, device=device) if self._total is None else self._total.to(device, dtype)
