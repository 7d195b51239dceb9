"""Attention to oneself alone: the control that has everything of an attention block but the attention."""

from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.checks import narrowed, number
from sagan_attn.blocks.pointwise import Pointwise


class IdentityAttention2d(nn.Module):
    """`SelfAttention2d` with the identity for its matrix of weights: `x + gamma * value(x)`.

    Every position sees itself alone, so whatever this control gains is not from looking elsewhere. Parameters have
    the names, the number and, for one random state, the first values of those of `SelfAttention2d` with the same
    reduction. `query` and `key` can change nothing and require no gradients: optimizers and
    `DistributedDataParallel` are not to wait for them. There are no weights of attention to look at, to prune or to
    intervene in, and no keys a mask could hide. Input and output [B, in_channels, H, W], same dtype and strides;
    gamma starts at 0.

    Source: the design of controls is this library's own.

    Args:
        in_channels: channels of the map.
        reduction: see `SelfAttention2d`.
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
        hidden = narrowed(in_channels, "reduction", min(8, in_channels) if reduction is None else reduction)
        number(gamma_init=gamma_init)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.query = Pointwise(in_channels, hidden, **dd).requires_grad_(False)
        self.key = Pointwise(in_channels, hidden, **dd).requires_grad_(False)
        self.value = Pointwise(in_channels, in_channels, **dd)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init), **dd))

    def forward(self, x: Tensor) -> Tensor:
        return functional.gated_residual(x, self.value(x), self.gamma)

    def extra_repr(self) -> str:
        return f"{self.in_channels}"
