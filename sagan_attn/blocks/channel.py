"""Channel attention behind the gate: squeeze-and-excitation and the global context block, as controls."""

from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.checks import narrowed, number, positive
from sagan_attn.blocks.norms import ChannelNorm
from sagan_attn.blocks.pointwise import Pointwise

__all__ = ["GCBlock2d", "SqueezeExcite2d"]


class SqueezeExcite2d(nn.Module):
    """Squeeze-and-excitation behind a gate: `x + gamma * (se(x) - x)`.

    se(x) = x * sigmoid(expand(relu(squeeze(mean of x over positions)))): channels are weighed, and positions are not.
    Input and output [B, in_channels, H, W], same dtype and strides; gamma starts at 0, and at 1 the block is se.

    Source: Hu et al., Squeeze-and-Excitation Networks, 2018 (arXiv:1709.01507), which has no gate. Numbers as timm's
    `SEModule`, whose `fc1` and `fc2` are here `squeeze` and `expand`, and which rounds in_channels / 16 to eights.

    Args:
        in_channels: channels of the map.
        reduction: in_channels // reduction hidden channels; None for 16, and at least 8 channels.
        gamma_init: first value of gamma, a parameter of shape [1].

    Raises:
        BlockError: an option out of range; in forward, an input with other channels.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        reduction: int | None = None,
        gamma_init: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        number(gamma_init=gamma_init)
        hidden = _hidden(in_channels, reduction)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.squeeze = Pointwise(in_channels, hidden, **dd)
        self.expand = Pointwise(hidden, in_channels, **dd)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init), **dd))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.context_of(x, None, self.in_channels, self.in_channels)  # refuses what is no map with them
        weights = self.expand(self.squeeze(functional.summarize(x, "mean")).relu()).sigmoid()  # [B, C, 1, 1]
        return functional.gated_residual(x, functional.difference(x * weights, x), self.gamma)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, hidden={self.squeeze.out_channels}"


class GCBlock2d(nn.Module):
    """Global context block: `x + gamma * expand(relu(norm(squeeze(context))))`, the same for every position.

    The context is the mean of x over its positions, weighed by the softmax of the 1x1 convolution `score`: one set of
    weights for all queries, and so no pairwise attention. Input and output [B, in_channels, H, W], same dtype and
    strides; gamma starts at 0.

    Source: Cao et al., GCNet, 2019 (arXiv:1904.11492), fusion by addition; its last convolution starts at 0, and it
    has no gate. Numbers at gamma 1 as timm's `GlobalContext(fuse_add=True, fuse_scale=False)`, whose `conv_attn`,
    `mlp_add.fc1`, `mlp_add.norm` and `mlp_add.fc2` are here `score`, `squeeze`, `norm` and `expand`; there the norm's
    eps is 1e-6 instead of the authors' 1e-5, and the hidden channels are in_channels / 8 unless told otherwise.

    Args:
        in_channels: channels of the map.
        reduction: in_channels // reduction hidden channels; None for 16, and at least 8 channels. A norm of a single
            one gives its bias, whatever the map.
        gamma_init: first value of gamma, a parameter of shape [1].

    Raises:
        BlockError: an option out of range; in forward, an input with other channels.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        reduction: int | None = None,
        gamma_init: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        number(gamma_init=gamma_init)
        hidden = _hidden(in_channels, reduction)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.score = Pointwise(in_channels, 1, **dd)
        self.squeeze = Pointwise(in_channels, hidden, **dd)
        self.norm = ChannelNorm(hidden, **dd)
        self.expand = Pointwise(hidden, in_channels, **dd)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init), **dd))

    def forward(self, x: Tensor) -> Tensor:
        context = functional.weighted_mean(x, self.score(x))  # [B, C, 1, 1]
        branch = self.expand(self.norm(self.squeeze(context)).relu())
        return functional.gated_residual(x, branch.expand_as(x), self.gamma)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, hidden={self.squeeze.out_channels}"


def _hidden(in_channels: int, reduction: int | None) -> int:
    positive(in_channels=in_channels)
    return max(8, in_channels // 16) if reduction is None else narrowed(in_channels, "reduction", reduction)
