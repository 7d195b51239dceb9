"""The same attention on sequences."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.checks import divides, flags, one_of, positive, probability
from sagan_attn.functional.paths import PATHS, Path


class MultiHeadAttention(nn.Module):
    """Multi-head attention on sequences: output(concatenation of heads), without a residual.

    queries [B, N, query_size], keys [B, M, key_size], values [B, M, value_size]; returns [B, N, num_hiddens].
    `query`, `key`, `value` and `output` are linear maps; each head has num_hiddens / num_heads features.

    Source: Vaswani et al., Attention Is All You Need, 2017 (arXiv:1706.03762); the additive score, with a vector of
    its own for each head, is that of Bahdanau et al. 2014 (arXiv:1409.0473). Same numbers as d2l's class of this name
    and, with bias, as torch's `nn.MultiheadAttention`, whose boolean masks are True where a key is to be *ignored*.

    Args:
        query_size, key_size, value_size: features of queries, keys and values.
        num_hiddens: features of all heads together and of the output.
        num_heads: must divide num_hiddens.
        score: "dot", query.key / sqrt(d); or "additive", vector . tanh(query + key).
        dropout: probability of an attention weight to be set to 0, in training.
        bias: whether the linear maps have biases.
        path: how attention is computed; see `functional.attend`.

    Raises:
        BlockError: an option out of range, heads that do not divide; in forward, lengths or a mask that do not fit.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        value_size: int,
        num_hiddens: int,
        num_heads: int,
        score: Literal["dot", "additive"] = "dot",
        dropout: float = 0.0,
        bias: bool = False,
        *,
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(query_size=query_size, key_size=key_size, value_size=value_size)
        positive(num_hiddens=num_hiddens, num_heads=num_heads)
        divides("num_heads", num_heads, "num_hiddens", num_hiddens)
        one_of("score", score, ("dot", "additive"))
        one_of("path", path, tuple(name for name in PATHS if name not in ("factored", "flex")))
        probability(dropout=dropout)
        flags(bias=bias)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        size = num_hiddens // num_heads
        self.num_heads = num_heads
        self.dropout = dropout
        self.path: Path = path
        self.query = nn.Linear(query_size, num_hiddens, bias, **dd)
        self.key = nn.Linear(key_size, num_hiddens, bias, **dd)
        self.value = nn.Linear(value_size, num_hiddens, bias, **dd)
        self.output = nn.Linear(num_hiddens, num_hiddens, bias, **dd)
        self.scale = size**-0.5 if score == "dot" else 1.0
        self.score_vector = None
        if score == "additive":
            self.score_vector = nn.Parameter(torch.empty(num_heads, size, **dd))
            nn.init.uniform_(self.score_vector, -(size**-0.5), size**-0.5)  # as a linear map to one feature

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        valid_lens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention, [B, N, num_hiddens].

        valid_lens: how many of the keys, from the first one, may be attended to; [B] or, for each query, [B, N].
        mask: boolean, True at keys that may be attended to; [B, 1, M], [1, N, M], [B, N, M] or [B, h, N, M]. A query
        without any key gets a weighted sum of 0 (and of it the output's bias), where torch can give NaN.
        """
        query, key = self._query_and_key(queries, keys)
        values = functional.sequence_of(values, "values", self.value.in_features, keys.shape[0], keys.shape[1])
        rows = functional.attend(
            query,
            key,
            functional.split_features(self.value(values), self.num_heads),
            self.scale,
            dropout=self.dropout if self.training else 0.0,
            path=self.path,
            valid_lens=valid_lens,
            mask=functional.sequence_mask(mask),
            **self._score(),
        )  # [B, h, N, D]
        return self.output(functional.merge_features(rows))

    def attention_weights(
        self, queries: Tensor, keys: Tensor, valid_lens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Weights before any dropout, [B * num_heads, N, M], the heads of a sample next to each other."""
        query, key = self._query_and_key(queries, keys)
        return functional.attention_weights(
            query,
            key,
            self.scale,
            valid_lens=valid_lens,
            mask=functional.sequence_mask(mask),
            **self._score(),
        ).flatten(0, 1)

    def _query_and_key(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        queries = functional.sequence_of(queries, "queries", self.query.in_features)
        keys = functional.sequence_of(keys, "keys", self.key.in_features, queries.shape[0])
        query = functional.split_features(self.query(queries), self.num_heads)
        return query, functional.split_features(self.key(keys), self.num_heads)

    def _score(self) -> dict[str, Any]:
        return {} if self.score_vector is None else {"score": "additive", "vector": self.score_vector}
