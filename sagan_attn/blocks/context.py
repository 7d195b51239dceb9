"""Global context without attention: the control an attention block has to beat."""

from typing import Literal

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.checks import positive
from sagan_attn.blocks.pointwise import Pointwise
from sagan_attn.errors import BlockError


class GlobalContext2d(nn.Module):
    """One summary of the whole map, the same for every position: `x + gamma * reduce(features(x))`.

    Long-range information without pairwise attention. features(x) = value(x) + expand(relu(squeeze(x))) are 1x1
    convolutions, and `reduce` takes their maximum or mean over all positions. Apart from the key bias of
    `SelfAttention2d`, which a softmax cancels, the number of parameters equals that of `SelfAttention2d` with the
    same channels and reduction, so that a difference in accuracy is not one of size. Input and output
    [B, channels, H, W], same dtype and strides; gamma starts at 0.

    Source: the design of controls is this library's own; compare the global context block of Cao et al., GCNet, 2019
    (arXiv:1904.11492), which found the attention of many non-local blocks to be the same for every query.

    Raises:
        BlockError: an option out of range; in forward, an input with other channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduce: Literal["max", "mean"] = "max",
        reduction: int = 8,
        gamma_init: float = 0.0,
    ) -> None:
        super().__init__()
        positive(channels=channels, reduction=reduction)
        if reduce not in ("max", "mean"):
            raise BlockError(f"reduce ({reduce!r}) must be 'max' or 'mean'")
        hidden = max(1, channels // reduction)
        self.reduce = reduce
        self.value = Pointwise(channels, channels)
        self.squeeze = Pointwise(channels, hidden)
        self.expand = Pointwise(hidden, channels, bias=False)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init)))

    def forward(self, x: Tensor) -> Tensor:
        features = self.value(x) + self.expand(self.squeeze(x).relu())  # [B, C, H, W]
        context = functional.summarize(features, self.reduce)  # [B, C, 1, 1]
        return functional.gated_residual(x, context.expand_as(x), self.gamma)

    def extra_repr(self) -> str:
        return f"channels={self.value.in_channels}, reduce={self.reduce}"
