"""Convolutional self-attention as in SAGAN."""

from typing import Literal

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.checks import divides, positive
from sagan_attn.blocks.pointwise import Pointwise, SpectralPointwise
from sagan_attn.errors import BlockError


class SelfAttention2d(nn.Module):
    """Self-attention over the positions of a feature map: `x + gamma * attention(x)`.

    Queries, keys and values are 1x1 convolutions of the map; every position attends to every position. Input and
    output [B, channels, H, W], same dtype and strides; B, H and W may be anything, 0 and 1 included. gamma starts at
    0, so a fresh block is the identity: on the first step only gamma gets a gradient other than 0.

    Source: Zhang et al., Self-Attention Generative Adversarial Networks, 2019 (arXiv:1805.08318). The defaults are
    the form most PyTorch code uses: `query` and `key` to channels // 8, `value` to channels, with biases, softmax of
    unscaled scores, no pooling. It differs from the paper's text, whose values also have channels // 8 features and
    pass a last 1x1 convolution, and from the authors' TensorFlow code, which in addition max-pools keys and values
    2x2, has no biases, gives values channels // 2 features and normalises every weight spectrally.

    Args:
        channels: channels of the map.
        heads: number of heads; must divide the query and the value channels.
        reduction: queries and keys have max(1, channels // reduction) channels over all heads.
        value_channels: None for `channels` values that are the output as they are; a number for that many values
            and a 1x1 convolution `output` back to `channels`.
        scale: factor on the scores; "sqrt" for 1 / sqrt(d); None for unscaled scores.
        pool: max-pooling window and stride on the maps of keys and values; 1 for none.
        bias: whether the convolutions have biases.
        spectral_norm: divide every weight by its spectral norm.
        gamma_init: first value of gamma, a parameter of shape [1].

    Raises:
        BlockError: an option out of range, or heads that do not divide; in forward, an input with other channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 1,
        reduction: int = 8,
        value_channels: int | None = None,
        scale: float | Literal["sqrt"] | None = None,
        pool: int = 1,
        bias: bool = True,
        spectral_norm: bool = False,
        gamma_init: float = 0.0,
    ) -> None:
        super().__init__()
        positive(channels=channels, heads=heads, reduction=reduction, pool=pool)
        query_channels = max(1, channels // reduction)
        divides("heads", heads, f"the query channels ({channels} // {reduction})", query_channels)
        if value_channels is None:
            divides("heads", heads, "channels", channels)
        else:
            positive(value_channels=value_channels)
            divides("heads", heads, "value_channels", value_channels)
        conv = SpectralPointwise if spectral_norm else Pointwise
        self.channels = channels
        self.heads = heads
        self.pool = pool
        self.scale = resolve_scale(scale, query_channels // heads)
        self.query = conv(channels, query_channels, bias)
        self.key = conv(channels, query_channels, bias)
        self.value = conv(channels, value_channels or channels, bias)
        self.output = conv(value_channels, channels, bias) if value_channels else None
        self.gamma = nn.Parameter(torch.full((1,), float(gamma_init)))

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query_and_key(x)
        value = functional.split_heads(functional.pool_map(self.value(x), self.pool), self.heads)  # [B, h, M, D]
        rows = functional.attend(query, key, value, self.scale)  # [B, h, N, D]
        branch = functional.merge_heads(rows, x)  # [B, h*D, H, W]
        if self.output is not None:
            branch = self.output(branch)  # [B, C, H, W]
        return functional.gated_residual(x, branch, self.gamma)

    def query_and_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, h, N, d] and keys [B, h, M, d] of a map."""
        query = functional.split_heads(self.query(x), self.heads)
        key = functional.split_heads(functional.pool_map(self.key(x), self.pool), self.heads)
        return query, key

    def attention_weights(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """Weights of the block on a map x [B, C, H, W], as [B, h, Q, M].

        queries: row-major positions (row * W + column), [Q] or one set a sample [B, Q]; None for all N. The keys are
        the positions of the map in row-major order, M = ceil(H/pool) * ceil(W/pool).
        """
        query, key = self.query_and_key(x)
        if queries is not None:
            index = queries.expand(len(x), -1)[:, None, :, None]  # [B, 1, Q, 1]
            query = query.take_along_dim(index, dim=2)
        return functional.attention_weights(query, key, self.scale)

    def attention_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Heads, queries and keys (h, N, M) of the block on a map of that size."""
        return self.heads, height * width, -(-height // self.pool) * -(-width // self.pool)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, heads={self.heads}, scale={self.scale:g}, pool={self.pool}"


def resolve_scale(scale: float | str | None, size: int) -> float:
    """The factor on the scores for heads of `size` features. Raises `BlockError` for an unknown word."""
    if scale is None:
        return 1.0
    if scale == "sqrt":
        return size**-0.5
    if isinstance(scale, (str, bool)):
        raise BlockError(f"scale ({scale!r}) must be a number, 'sqrt' or None")
    return float(scale)
