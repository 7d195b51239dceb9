"""Transformer layers on sequences, and stacks of them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.checks import positive
from sagan_attn.blocks.layer import Activation, TransformerLayer
from sagan_attn.blocks.sequence import MultiHeadAttention
from sagan_attn.functional.paths import Path


class EncoderLayer(TransformerLayer):
    """Transformer encoder layer on a sequence [B, N, num_hiddens]: self-attention, then the ffn.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); norm_first as in Xiong et al. 2020 (arXiv:2002.04745). The numbers
    are those of `nn.TransformerEncoderLayer(batch_first=True)`, whose options go by other names.

    Args:
        num_hiddens: features of a position.
        num_heads: must divide num_hiddens.
        ffn_hiddens: features inside the ffn.
        dropout: in training, of attention weights, inside the ffn, and of what each step adds.
        norm_first: x + part(norm(x)); otherwise norm(x + part(x)).
        activation: "relu" or "gelu".
        bias: whether linear maps and norms have biases.
        path: how attention is computed; see `functional.attend`.

    Raises:
        BlockError: an option out of range, heads that do not divide; in forward, lengths or a mask that do not fit.
    """

    def __init__(
        self,
        num_hiddens: int,
        num_heads: int,
        ffn_hiddens: int,
        dropout: float = 0.0,
        norm_first: bool = False,
        activation: Activation = "relu",
        bias: bool = True,
        *,
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(norm_first, activation, dropout)
        positive(num_hiddens=num_hiddens, ffn_hiddens=ffn_hiddens)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention = _attention(num_hiddens, num_heads, dropout, bias, path, dd)
        self.linear1 = nn.Linear(num_hiddens, ffn_hiddens, bias, **dd)
        self.linear2 = nn.Linear(ffn_hiddens, num_hiddens, bias, **dd)
        self.norm1 = nn.LayerNorm(num_hiddens, bias=bias, **dd)
        self.norm2 = nn.LayerNorm(num_hiddens, bias=bias, **dd)

    def forward(
        self, x: Tensor, valid_lens: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """x [B, N, num_hiddens], as is the result; lengths and mask as in `MultiHeadAttention`.

        causal: each position sees those up to its own.
        """
        lens = functional.causal_lens(x, valid_lens, causal)
        x = self.step(self.norm1, lambda x: self.attention(x, x, x, lens, mask), x)
        return self.step(self.norm2, self.ffn, x)


class DecoderLayer(EncoderLayer):
    """Transformer decoder layer: self-attention, attention to an encoder's memory, ffn.

    x [B, N, num_hiddens], memory [B, M, num_hiddens]. Options, source and errors as in `EncoderLayer`; the numbers
    are those of `nn.TransformerDecoderLayer(batch_first=True)`.
    """

    def __init__(
        self,
        num_hiddens: int,
        num_heads: int,
        ffn_hiddens: int,
        dropout: float = 0.0,
        norm_first: bool = False,
        activation: Activation = "relu",
        bias: bool = True,
        *,
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_hiddens, num_heads, ffn_hiddens, dropout, norm_first, activation, bias, path=path, **dd)
        self.cross = _attention(num_hiddens, num_heads, dropout, bias, path, dd)
        self.norm3 = nn.LayerNorm(num_hiddens, bias=bias, **dd)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        valid_lens: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        memory_valid_lens: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """The result is of the shape of x; lengths, mask and causal are those of self-attention."""
        lens = functional.causal_lens(x, valid_lens, causal)
        x = self.step(self.norm1, lambda x: self.attention(x, x, x, lens, mask), x)
        x = self.step(self.norm2, lambda x: self.cross(x, memory, memory, memory_valid_lens, memory_mask), x)
        return self.step(self.norm3, self.ffn, x)


class Encoder(nn.Module):
    """A stack of encoder layers, each made with the same options, and a norm behind them.

    num_layers layers `EncoderLayer(num_hiddens, num_heads, ffn_hiddens, **options)`; input and arguments as theirs.
    final_norm: whether there is a norm behind the last layer; None for one where the layers' norms come first.
    `nn.Transformer` has one in any case.
    """

    layer = EncoderLayer

    def __init__(
        self,
        num_layers: int,
        num_hiddens: int,
        num_heads: int,
        ffn_hiddens: int,
        *,
        final_norm: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        positive(num_layers=num_layers)
        layers = [self.layer(num_hiddens, num_heads, ffn_hiddens, **options) for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers)
        final_norm = layers[0].norm_first if final_norm is None else final_norm
        self.norm = copy.deepcopy(layers[0].norm1) if final_norm else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *args, **kwargs)
        return x if self.norm is None else self.norm(x)


class Decoder(Encoder):
    """A stack of decoder layers; see `Encoder` and `DecoderLayer`."""

    layer = DecoderLayer


def _attention(
    num_hiddens: int, num_heads: int, dropout: float, bias: bool, path: Path, dd: dict[str, Any]
) -> MultiHeadAttention:
    sizes = (num_hiddens, num_hiddens, num_hiddens)
    return MultiHeadAttention(*sizes, num_hiddens, num_heads, dropout=dropout, bias=bias, path=path, **dd)
