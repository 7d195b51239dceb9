"""A learnable gate that turns any shape-keeping module into a residual which starts as the identity."""

import torch
from torch import Tensor, nn

from sagan_attn import functional


class Gated(nn.Module):
    """`x + gamma * (block(x) - x)`: the identity at gamma 0, the block itself at gamma 1.

    Input and output [B, C, H, W], same dtype and strides. Raises `BlockError` in forward when the block does not
    keep the shape.
    """

    def __init__(self, block: nn.Module, gamma_init: float = 0.0) -> None:
        super().__init__()
        self.block = block
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init)))

    def forward(self, x: Tensor) -> Tensor:
        return functional.gated_residual(x, functional.difference(self.block(x), x), self.gamma)
