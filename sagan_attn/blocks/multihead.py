"""Multi-head attention on maps: to another map, and to the map itself."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.base import MapAttention, Position, resolve_scale
from sagan_attn.blocks.checks import divides, flags, narrowed, one_of, positive
from sagan_attn.blocks.pointwise import Pointwise
from sagan_attn.functional.paths import Path


class CrossAttention2d(MapAttention):
    """Multi-head attention from one map to another: `x + output(attention(x, context))`.

    x [B, query_channels, H, W] asks, a context [B, context_channels, Hc, Wc] of any size answers; the result has
    shape, dtype and strides of x. Without a context, as in a graft, the map attends to itself. An optional mask,
    boolean [B, Hc, Wc], is True at the positions of the context that may be attended to. A fresh block is the
    identity: `output` starts at 0. On the first step only `output` gets a gradient other than 0.

    Source: Vaswani et al., Attention Is All You Need, 2017 (arXiv:1706.03762), with 1x1 convolutions for the linear
    maps, which are the same thing position by position; the additive score is that of Bahdanau et al. 2014
    (arXiv:1409.0473), with a vector of its own for each head. torch's `nn.MultiheadAttention` has biases.

    Args:
        query_channels: channels of x.
        context_channels: channels of the context; None for query_channels.
        heads: number of heads; must divide query_channels // reduction.
        reduction: queries, keys and values have query_channels // reduction channels over all heads.
        score: "dot", or "additive": vector . tanh(query + key).
        scale: factor on dot scores; "sqrt" for 1 / sqrt(d); None for none. Additive scores have none.
        bias: whether the convolutions have biases.
        position: None; "sinusoidal": sine and cosine of row and column are added to the inputs of queries and keys;
            "relative": query . (learned vector of the row offset + of the column offset) is added to the scores, as
            in BoTNet, which needs a context of the size of x; "relative_scaled": the same, times scale.
        position_size: height and width, or one number for both, that the tables of relative positions are made for.
            None for 14. Maps of another size work: an offset takes the vector at the same part of the side.
        dropout: probability of an attention weight to be set to 0, in training.
        zero_init: whether `output` starts at 0; otherwise as a torch convolution.
        path: how attention is computed; see `functional.attend`.

    Raises:
        BlockError: an option out of range, heads that do not divide; in forward, maps or a mask that do not fit.
    """

    def __init__(
        self,
        query_channels: int,
        context_channels: int | None = None,
        *,
        heads: int = 4,
        reduction: int = 1,
        score: Literal["dot", "additive"] = "dot",
        scale: float | Literal["sqrt"] | None = "sqrt",
        bias: bool = False,
        position: Position | None = None,
        position_size: int | tuple[int, int] | None = None,
        dropout: float = 0.0,
        zero_init: bool = True,
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        positive(query_channels=query_channels, heads=heads)
        flags(bias=bias, zero_init=zero_init)
        context_channels = query_channels if context_channels is None else context_channels
        positive(context_channels=context_channels)
        one_of("score", score, ("dot", "additive"))
        inner = narrowed(query_channels, "reduction", reduction)
        divides("heads", heads, "the inner channels", inner)
        factor = resolve_scale(scale, inner // heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            query_channels,
            heads=heads,
            scale=factor if score == "dot" else 1.0,
            context_channels=context_channels,
            head_size=inner // heads,
            score=score,
            position=position,
            position_size=position_size,
            dropout=dropout,
            path=path,
            **dd,
        )
        self.query = Pointwise(query_channels, inner, bias, **dd)
        self.key = Pointwise(context_channels, inner, bias, **dd)
        self.value = Pointwise(context_channels, inner, bias, **dd)
        self.output = Pointwise(inner, query_channels, bias, **dd)
        if zero_init:
            for parameter in self.output.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return functional.residual(x, self.branch(x, context, mask))


class MultiHeadAttention2d(CrossAttention2d):
    """Multi-head self-attention over the positions of a feature map: `x + output(attention(x))`.

    Input and output [B, in_channels, H, W], same dtype and strides; an optional mask, boolean [B, H, W], is True at
    the positions that may be attended to. Options, first weights, source and errors as in `CrossAttention2d`.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        heads: int = 4,
        reduction: int = 1,
        score: Literal["dot", "additive"] = "dot",
        scale: float | Literal["sqrt"] | None = "sqrt",
        bias: bool = False,
        position: Position | None = None,
        position_size: int | tuple[int, int] | None = None,
        dropout: float = 0.0,
        zero_init: bool = True,
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            heads=heads,
            reduction=reduction,
            score=score,
            scale=scale,
            bias=bias,
            position=position,
            position_size=position_size,
            dropout=dropout,
            zero_init=zero_init,
            path=path,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.residual(x, self.branch(x, mask=mask))
