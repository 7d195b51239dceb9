"""Norms inside the blocks."""

import torch
from torch import Tensor, nn

from sagan_attn import functional


class BranchNorm(nn.BatchNorm2d):
    """Batch norm for any map: one value a channel, which has no variance, is normalised by the running statistics.

    `nn.BatchNorm2d` fails there in training, and so does what `nn.SyncBatchNorm.convert_sync_batchnorm` makes of this
    one; a block must take every map its host takes. Input and output [B, C, H, W].
    """

    def __init__(
        self, num_features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(num_features, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return functional.branch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            self.momentum,
            self.eps,
        )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of a map. Input and output [B, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.channel_norm(input, self.weight, self.bias, self.eps)
