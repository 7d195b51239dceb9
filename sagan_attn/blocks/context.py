"""Global context without attention: the control an attention block has to beat."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.checks import narrowed, number, one_of
from sagan_attn.blocks.pointwise import Pointwise


class GlobalContext2d(nn.Module):
    """One summary of the whole map, the same for every position: `x + gamma * reduce(features(x))`.

    Long-range information without pairwise attention. features(x) = value(x) + expand(relu(squeeze(x))) are 1x1
    convolutions, and `reduce` takes their maximum or mean over all positions. Apart from the key bias of
    `SelfAttention2d`, which a softmax cancels, the number of parameters equals that of `SelfAttention2d` with the
    same channels and reduction, so that a difference in accuracy is not one of size. Input and output
    [B, in_channels, H, W], same dtype and strides; gamma starts at 0.

    Source: the design of controls is this library's own; compare the global context block of Cao et al., GCNet, 2019
    (arXiv:1904.11492), which found the attention of many non-local blocks to be the same for every query.

    Raises:
        BlockError: an option out of range; in forward, an input with other channels.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        reduce: Literal["max", "mean"] = "max",
        reduction: int | None = None,
        gamma_init: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = narrowed(in_channels, "reduction", min(8, in_channels) if reduction is None else reduction)
        number(gamma_init=gamma_init)
        one_of("reduce", reduce, ("max", "mean"))
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.reduce = reduce
        self.value = Pointwise(in_channels, in_channels, **dd)
        self.squeeze = Pointwise(in_channels, hidden, **dd)
        self.expand = Pointwise(hidden, in_channels, bias=False, **dd)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init), **dd))

    def forward(self, x: Tensor) -> Tensor:
        features = self.value(x) + self.expand(self.squeeze(x).relu())  # [B, C, H, W]
        context = functional.summarize(features, self.reduce)  # [B, C, 1, 1]
        return functional.gated_residual(x, context.expand_as(x), self.gamma)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, reduce={self.reduce}"
