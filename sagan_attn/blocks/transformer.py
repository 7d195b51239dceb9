"""Transformer layers on feature maps."""

from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.base import Position
from sagan_attn.blocks.checks import positive
from sagan_attn.blocks.layer import Activation, TransformerLayer
from sagan_attn.blocks.multihead import CrossAttention2d, MultiHeadAttention2d
from sagan_attn.blocks.norms import ChannelNorm
from sagan_attn.blocks.pointwise import Pointwise
from sagan_attn.functional.paths import Path


class EncoderBlock2d(TransformerLayer):
    """Transformer encoder layer on a map: x + attention(norm1(x)), and to that + ffn(norm2(.)).

    Input and output [B, in_channels, H, W], same dtype and strides; an optional mask, boolean [B, H, W], is True at
    the positions that may be attended to. ffn is linear2(activation(linear1(x))), two 1x1 convolutions; the norms are
    layer norms over the channels of a position. What the steps add ends in a convolution that starts at 0, so a fresh
    block is the identity.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), norm1(x + attention(x)) there, which is norm_first=False; Xiong et
    al. 2020 (arXiv:2002.04745) for the norm first. Numbers as `nn.TransformerEncoderLayer` on rows of positions. With
    the norm last a layer cannot start as the identity, whatever its weights: `graft` refuses it without a gate.

    Args:
        in_channels: channels of the map.
        heads: number of heads; must divide in_channels.
        expansion: the ffn is expansion * in_channels wide.
        norm_first: whether the norms come before attention and ffn, or after the sums.
        activation: "relu" or "gelu".
        bias: whether convolutions and norms have biases.
        position, position_size: see `CrossAttention2d`.
        dropout: in training, of attention weights, inside the ffn, and of what each step adds.
        zero_init: whether the last convolutions of attention and ffn start at 0.
        path: how attention is computed; see `functional.attend`.

    Raises:
        BlockError: an option out of range, heads that do not divide; in forward, a map or mask that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        heads: int = 4,
        expansion: int = 4,
        norm_first: bool = True,
        activation: Activation = "gelu",
        bias: bool = True,
        position: Position | None = None,
        position_size: int | tuple[int, int] | None = None,
        dropout: float = 0.0,
        zero_init: bool = True,
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(norm_first, activation, dropout)
        positive(in_channels=in_channels, expansion=expansion)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.attention = MultiHeadAttention2d(
            in_channels,
            heads=heads,
            bias=bias,
            position=position,
            position_size=position_size,
            dropout=dropout,
            zero_init=zero_init,
            path=path,
            **dd,
        )
        self.linear1 = Pointwise(in_channels, expansion * in_channels, bias, **dd)
        self.linear2 = Pointwise(expansion * in_channels, in_channels, bias, **dd)
        self.norm1 = ChannelNorm(in_channels, bias=bias, **dd)
        self.norm2 = ChannelNorm(in_channels, bias=bias, **dd)
        if zero_init:
            for parameter in self.linear2.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.step(self.norm1, lambda x: self.attention.branch(x, mask=mask), x)
        return self.step(self.norm2, self.ffn, x)

    def attention_weights(self, x: Tensor, queries: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Weights on a map x [B, C, H, W], as [B, h, Q, M]; see `MapAttention.attention_weights`."""
        return self.attention.attention_weights(self.norm1(x) if self.norm_first else x, queries, mask=mask)

    def attention_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Heads, queries and keys (h, N, M) on a map of that size."""
        return self.attention.attention_shape(height, width)


class DecoderBlock2d(EncoderBlock2d):
    """Transformer decoder layer on a map: self-attention, attention to a second map, ffn.

    As `EncoderBlock2d`, with a step `cross` behind `norm2` between its two, and `norm3` for the ffn. The context
    [B, context_channels, Hc, Wc] may have any size and is not normalised; without one, as in a graft, cross attends
    to its own input. context_mask, boolean [B, Hc, Wc], is True at the positions of the context that
    may be attended to; without a context it is the mask. Numbers as `nn.TransformerDecoderLayer`.

    Args:
        context_channels: channels of the context; None for in_channels.
        others: see `EncoderBlock2d`; the position is that of self-attention.

    Raises:
        BlockError: as `EncoderBlock2d`; in forward, a context that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        context_channels: int | None = None,
        *,
        heads: int = 4,
        expansion: int = 4,
        norm_first: bool = True,
        activation: Activation = "gelu",
        bias: bool = True,
        position: Position | None = None,
        position_size: int | tuple[int, int] | None = None,
        dropout: float = 0.0,
        zero_init: bool = True,
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        common: dict[str, Any] = {
            "heads": heads,
            "bias": bias,
            "dropout": dropout,
            "zero_init": zero_init,
            "path": path,
            "device": device,
            "dtype": dtype,
        }
        super().__init__(
            in_channels,
            expansion=expansion,
            norm_first=norm_first,
            activation=activation,
            position=position,
            position_size=position_size,
            **common,
        )
        self.cross = CrossAttention2d(in_channels, context_channels, **common)
        self.norm3 = ChannelNorm(in_channels, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        x = self.step(self.norm1, lambda x: self.attention.branch(x, mask=mask), x)
        hidden = functional.context_mask_of(context, mask, context_mask)
        x = self.step(self.norm2, lambda x: self.cross.branch(x, context, hidden), x)
        return self.step(self.norm3, self.ffn, x)
