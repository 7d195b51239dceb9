"""Convolutional self-attention as in SAGAN."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.base import MapAttention, Position, resolve_scale
from sagan_attn.blocks.checks import divides, flags, narrowed, number, positive
from sagan_attn.blocks.pointwise import Init, Pointwise, SpectralPointwise, initialise
from sagan_attn.functional.paths import Path


class SelfAttention2d(MapAttention):
    """Self-attention over the positions of a feature map: `x + gamma * attention(x)`.

    Queries, keys and values are 1x1 convolutions of the map; every position attends to every position. Input and
    output [B, in_channels, H, W], same dtype and strides; B, H and W may be anything, 0 and 1 included. gamma starts
    at 0, so a fresh block is the identity: on the first step only gamma gets a gradient other than 0. An optional
    mask, boolean [B, H, W], is True at the positions that may be attended to.

    Source: Zhang et al., Self-Attention Generative Adversarial Networks, 2019 (arXiv:1805.08318). The defaults are
    the form most PyTorch code uses: `query` and `key` to in_channels // 8, `value` to in_channels, with biases,
    softmax of unscaled scores, no pooling. It differs from the paper's text, whose values also have in_channels // 8
    features and pass a last 1x1 convolution (registered as `sagan-paper`), and from the authors' TensorFlow code,
    which in addition max-pools keys and values 2x2, has no biases, gives values in_channels // 2 features and
    normalises every weight spectrally (`biggan`, whose public PyTorch code fails on odd maps). fastai's layer
    (`fastai`) has no biases, spectral norms, and takes the softmax over the other side of the scores: the same
    function with the names of query and key exchanged. With 4 heads, reduction 1, scale "sqrt" and relative
    positions it is the attention of BoTNet, Srinivas et al. 2021 (arXiv:2101.11605), behind a gate (`botnet`).

    Args:
        in_channels: channels of the map.
        heads: number of heads; must divide the query and the value channels.
        reduction: queries and keys have in_channels // reduction channels over all heads; None for 8, and 1 channel
            where there are fewer than 8.
        value_reduction: None for in_channels values that are the output as they are; a number for
            in_channels // value_reduction values and a 1x1 convolution `output` back to in_channels.
        scale: factor on the scores; "sqrt" for 1 / sqrt(d); None for unscaled scores.
        pool: max-pooling window and stride on the maps of keys and values; 1 for none.
        bias: whether the convolutions have biases.
        spectral_norm: divide every weight by its spectral norm.
        position, position_size: see `CrossAttention2d`.
        init: first weights of the convolutions; see `initialise`.
        gamma_init: first value of gamma, a parameter of shape [1].
        path: how attention is computed; see `functional.attend`.

    Raises:
        BlockError: an option out of range, or heads that do not divide; in forward, an input with other channels.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        heads: int = 1,
        reduction: int | None = None,
        value_reduction: int | None = None,
        scale: float | Literal["sqrt"] | None = None,
        pool: int = 1,
        bias: bool = True,
        spectral_norm: bool = False,
        position: Position | None = None,
        position_size: int | tuple[int, int] | None = None,
        init: Init = "torch",
        gamma_init: float = 0.0,
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        positive(in_channels=in_channels, heads=heads)
        flags(bias=bias, spectral_norm=spectral_norm)
        number(gamma_init=gamma_init)
        query_channels = narrowed(in_channels, "reduction", min(8, in_channels) if reduction is None else reduction)
        divides("heads", heads, "the query channels, in_channels // reduction", query_channels)
        value_channels = in_channels
        if value_reduction is not None:
            value_channels = narrowed(in_channels, "value_reduction", value_reduction)
        divides("heads", heads, "the value channels", value_channels)
        size = query_channels // heads
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            in_channels,
            heads=heads,
            scale=resolve_scale(scale, size),
            context_channels=in_channels,
            head_size=size,
            pool=pool,
            position=position,
            position_size=position_size,
            path=path,
            **dd,
        )
        conv = SpectralPointwise if spectral_norm else Pointwise
        self.query = conv(in_channels, query_channels, bias, **dd)
        self.key = conv(in_channels, query_channels, bias, **dd)
        self.value = conv(in_channels, value_channels, bias, **dd)
        self.output = None if value_reduction is None else conv(value_channels, in_channels, bias, **dd)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init), **dd))
        initialise((self.query, self.key, self.value, self.output), init)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.gated_residual(x, self.branch(x, mask=mask), self.gamma)
