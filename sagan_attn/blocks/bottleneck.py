"""Two convolutions instead of attention: the control with as many parameters."""

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.checks import number, positive
from sagan_attn.blocks.pointwise import Pointwise
from sagan_attn.errors import BlockError


class Bottleneck2d(nn.Module):
    """Residual 1x1 bottleneck: `x + gamma * expand(relu(squeeze(x)))`.

    A block that computes with every position for itself, with as many parameters as an attention block. Its hidden
    channels, and which of the two convolutions have biases, are chosen so that the number of its parameters is the
    nearest to that of `SelfAttention2d` with the same channels: within 2 % from 16 channels on. Input and output
    [B, in_channels, H, W], same dtype and strides; gamma starts at 0.

    Source: the bottleneck of He et al., 2015 (arXiv:1512.03385), without its 3x3 convolution, norms and last ReLU,
    behind the gate of SAGAN.

    Args:
        in_channels: channels of the map.
        parameters: how many parameters to come near to; None for those of `SelfAttention2d`.
        gamma_init: first value of gamma, a parameter of shape [1].

    Raises:
        BlockError: an option out of range, or fewer parameters than one hidden channel has; in forward, an input
            with other channels.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        parameters: int | None = None,
        gamma_init: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(in_channels=in_channels)
        number(gamma_init=gamma_init)
        if parameters is not None:
            positive(parameters=parameters)
            if parameters < 2 * in_channels + 1:
                raise BlockError(
                    f"parameters ({parameters}) must be at least {2 * in_channels + 1}, those of one hidden channel "
                    f"for in_channels ({in_channels})"
                )
        hidden, *biases = _nearest(in_channels, _of_attention(in_channels) if parameters is None else parameters)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.squeeze = Pointwise(in_channels, hidden, bool(biases[0]), **dd)
        self.expand = Pointwise(hidden, in_channels, bool(biases[1]), **dd)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init), **dd))

    def forward(self, x: Tensor) -> Tensor:
        return functional.gated_residual(x, self.expand(self.squeeze(x).relu()), self.gamma)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, hidden={self.squeeze.out_channels}"


def _of_attention(channels: int) -> int:
    """Parameters of `SelfAttention2d` with its defaults."""
    narrow = max(1, channels // 8)
    return 2 * narrow * (channels + 1) + channels * (channels + 1) + 1


def _nearest(channels: int, target: int) -> tuple[int, int, int]:
    """Hidden channels, and 1 for a bias of `squeeze` and of `expand`, with the number of parameters nearest to target.

    Of several the one with more biases.
    """
    found = []
    for squeeze_bias, expand_bias in product((1, 0), repeat=2):
        rest, of_each = target - 1 - channels * expand_bias, 2 * channels + squeeze_bias
        for hidden in (max(1, rest // of_each), max(1, rest // of_each + 1)):
            found.append((abs(rest - hidden * of_each), -squeeze_bias - expand_bias, hidden, squeeze_bias, expand_bias))
    return min(found)[2:]
