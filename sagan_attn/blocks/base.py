"""What all attention blocks on maps share: from maps to rows of queries, keys and values, and back."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.checks import is_number, one_of, positive, probability
from sagan_attn.blocks.pointwise import Pointwise, can_be_joined
from sagan_attn.errors import BlockError
from sagan_attn.functional.attention import Normalize, Score
from sagan_attn.functional.paths import PATHS, Path, obstacle_to

__all__ = ["Intervention", "MapAttention", "Position", "resolve_scale"]

Scored = tuple[Tensor, Tensor, dict[str, Any]]
Intervention = Callable[[Tensor, Tensor, dict[str, Any]], Scored]
Position = Literal["relative", "relative_scaled", "sinusoidal"]


class MapAttention(nn.Module):
    """Attention between the positions of one map, or from those of one map to those of another, without a residual.

    Subclasses set `query`, `key`, `value` and `output` (1x1 convolutions; None for the map as it is) and add `branch`
    to the input in their own way.

    Args:
        in_channels: channels of the map whose positions ask.
        heads: number of heads.
        scale: factor on the scores.
        context_channels: channels of the map that keys and values come from.
        head_size: d.
        score, normalize: see `functional.attention_weights`.
        pool: max-pooling window and stride on keys and values.
        pool_first: pool before the convolutions of keys and values instead of after them.
        pool_ceil: whether windows that hang over the edge count; see `functional.pool_map`.
        position: see `CrossAttention2d`.
        position_size: height and width that the tables of relative positions are made for; None for 14.
        dropout: of weights, in training.
        path: see `functional.attend`.
    """

    query: Pointwise | None
    key: Pointwise | None
    value: Pointwise
    output: Pointwise | None
    intervention: Intervention | None = None  # what `surgery.interventions` puts in the place of `scored`

    def __init__(
        self,
        in_channels: int,
        *,
        heads: int,
        scale: float,
        context_channels: int,
        head_size: int,
        score: Score = "dot",
        normalize: Normalize = "softmax",
        pool: int = 1,
        pool_first: bool = False,
        pool_ceil: bool = True,
        position: Position | None = None,
        position_size: int | tuple[int, int] | None = None,
        dropout: float = 0.0,
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(pool=pool)
        probability(dropout=dropout)
        one_of("path", path, PATHS)
        how = {"score": score, "normalize": normalize, "position": position if position != "sinusoidal" else None}
        if obstacle := obstacle_to(path, dropout, how):
            raise BlockError(f"path {path!r} cannot serve {obstacle}")
        one_of("position", position, (None, *get_args(Position)))
        self.in_channels = in_channels
        self.heads = heads
        self.scale = scale
        self.context_channels = context_channels
        self.score: Score = score
        self.normalize: Normalize = normalize
        self.pool = pool
        self.pool_first = pool_first
        self.pool_ceil = pool_ceil
        self.position = position
        self.dropout = dropout
        self.path: Path = path
        self.intervention = None  # an attribute of its own, which compiled code looks at each time
        dd: Mapping[str, Any] = {"device": device, "dtype": dtype}
        self.score_vector = None
        if score != "dot":
            length = head_size if score == "additive" else 2 * head_size
            self.score_vector = nn.Parameter(torch.empty(heads, length, **dd))
            nn.init.uniform_(self.score_vector, -(length**-0.5), length**-0.5)  # as a convolution to 1 channel
        self.height_rel = self.width_rel = None
        if position in ("relative", "relative_scaled"):
            if pool > 1:
                raise BlockError(f"position ({position!r}) needs keys at the positions of the queries: pool must be 1")
            height, width = _pair(14 if position_size is None else position_size)
            self.height_rel = _offset_table(height, head_size, dd)
            self.width_rel = _offset_table(width, head_size, dd)
        elif position_size is not None:
            found = f"position_size ({position_size!r:.100})"
            raise BlockError(f"{found} goes with relative positions, not with {position!r}")
        for channels in (in_channels, context_channels):
            if position == "sinusoidal" and channels % 4:
                raise BlockError(f"position ('sinusoidal') needs channels in fours, not {channels}")

    def branch(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attention from the positions of x to those of the context, projected: [B, C, H, W] for x [B, C, H, W].

        context: [B, context_channels, Hc, Wc]; None for x itself. mask: boolean [B, Hc, Wc], True at positions to
        attend to; None for all. A sample without any gets a weighted sum of 0.
        """
        own = context is None  # asked first, because a tracer hides what context_of gives
        context = self._context_of(x, context)
        if own and self._reads_one_map() and can_be_joined((self.query, self.key, self.value)):
            query, key, value = self._joined(x, mask)
        else:
            query, key = self.query_and_key(x, context, mask)
            value = functional.split_heads(self._keys_of(self.value, context, mask), self.heads)  # [B, h, M, D]
        dropout = self.dropout if self.training else 0.0
        query, key, how = self.scored(query, key, self._how(x, context, mask))
        rows = functional.attend(query, key, value, dropout=dropout, path=self.path, **how)  # [B, h, N, D]
        branch = functional.merge_heads(rows, x)  # [B, h*D, H, W]
        return branch if self.output is None else self.output(branch)

    def _reads_one_map(self) -> bool:
        """Whether queries, keys and values are convolutions of the very same map, where it is its own context."""
        same = self.context_channels == self.in_channels and self.position != "sinusoidal"
        return same and not (self.pool_first and self.pool > 1)

    def _joined(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, h, N, d], keys [B, h, M, d] and values [B, h, M, D] from one product with the map."""
        convs = [conv for conv in (self.query, self.key, self.value) if conv is not None]
        query, key, value = functional.pointwise_each(
            x, [conv.used_weight() for conv in convs], [conv.bias for conv in convs]
        )
        key, value = (functional.pool_map(part, self.pool, mask, self.pool_ceil) for part in (key, value))
        query, key, value = (functional.split_heads(part, self.heads) for part in (query, key, value))
        return query, key, value

    def query_and_key(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries [B, h, N, d] of a map and keys [B, h, M, d] of the context."""
        if self.position == "sinusoidal":
            x, context = functional.add_sinusoids(x), functional.add_sinusoids(context)
        query = functional.split_heads(x if self.query is None else self.query(x), self.heads)
        return query, functional.split_heads(self._keys_of(self.key, context, mask), self.heads)

    def attention_weights(
        self,
        x: Tensor,
        queries: Tensor | None = None,
        *,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Weights of the block on a map x [B, C, H, W], as [B, h, Q, M], before any dropout.

        queries: row-major positions (row * W + column), [Q] or one set a sample [B, Q]; None for all N. The keys are
        the positions of the context in row-major order, after pooling. context, mask: as in `branch`. Raises
        `BlockError` for positions outside of the map.
        """
        context = self._context_of(x, context)
        query, key = self.query_and_key(x, context, mask)
        query, key, how = self.scored(query, key, self._how(x, context, mask))
        if queries is not None:
            check_positions(queries, query.shape[0], query.shape[2])
            index = queries.expand(len(x), -1)  # [B, Q]
            query = query.take_along_dim(index[:, None, :, None], dim=2)
            how["index"] = index
        return functional.attention_weights(query, key, **how)

    def scored(self, query: Tensor, key: Tensor, how: dict[str, Any]) -> Scored:
        """What all weights are made of: queries [B, h, N, d], keys [B, h, M, d] and how, with the scale in it.

        how: the arguments of `functional.attention_weights`.
        """
        how = {"scale": self.scale, **how}
        return (query, key, how) if self.intervention is None else self.intervention(query, key, how)

    def __getstate__(self) -> dict[str, Any]:
        # A copy made during an intervention would keep it for ever.
        return {**self.__dict__, "intervention": None}

    def attention_shape(
        self, height: int, width: int, context_size: tuple[int, int] | None = None
    ) -> tuple[int, int, int]:
        """Heads, queries and keys (h, N, M) on a map of that size, with a context of that height and width."""
        sides = context_size or (height, width)
        if self.pool_ceil or min(sides) < self.pool:
            rows, columns = (-(-side // self.pool) for side in sides)
        else:
            rows, columns = (side // self.pool for side in sides)
        return self.heads, height * width, rows * columns

    def _context_of(self, x: Tensor, context: Tensor | None) -> Tensor:
        same_size = self.height_rel is not None
        return functional.context_of(x, context, self.in_channels, self.context_channels, same_size)

    def _keys_of(self, projection: Pointwise | None, context: Tensor, mask: Tensor | None) -> Tensor:
        """The map of keys or values, pooled: [B, h*d, Hc, Wc]."""
        if projection is None:
            return functional.pool_map(context, self.pool, mask, self.pool_ceil)
        if self.pool_first:
            return projection(functional.pool_map(context, self.pool, mask, self.pool_ceil))
        return functional.pool_map(projection(context), self.pool, mask, self.pool_ceil)

    def _how(self, x: Tensor, context: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """The arguments of `functional.attention_weights` beside query, key and scale."""
        how: dict[str, Any] = {"mask": functional.key_mask(context, self.pool, mask, self.pool_ceil)}
        if self.score != "dot":
            how |= {"score": self.score, "vector": self.score_vector}
        if self.normalize != "softmax":
            how["normalize"] = self.normalize
        if self.height_rel is not None and self.width_rel is not None:
            factor = self.scale if self.position == "relative_scaled" else 1.0
            how["position"] = functional.relative_tables(self.height_rel, self.width_rel, x, factor)
        return how

    def extra_repr(self) -> str:
        options = {"heads": self.heads, "scale": f"{self.scale:g}", "pool": self.pool}
        options |= {"position": self.position} if self.position else {}
        options |= {"path": self.path} if self.path != "auto" else {}
        return ", ".join([str(self.in_channels), *(f"{name}={value}" for name, value in options.items())])


def _offset_table(size: int, features: int, dd: Mapping[str, Any]) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(2 * size - 1, features, **dd), std=features**-0.5))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(pair) != 2:
        raise BlockError(f"position_size ({size!r:.100}) must be one whole number, or height and width")
    for side in pair:
        positive(position_size=side)
    return pair


def check_positions(queries: Tensor, batch: int, n: int) -> None:
    """Raise `BlockError` unless queries are whole numbers from 0 to n - 1, of shape [Q] or [batch, Q]."""
    if not isinstance(queries, Tensor) or queries.dtype in (torch.bool, torch.complex64, torch.complex128):
        found = f"of {queries.dtype}" if isinstance(queries, Tensor) else f"({type(queries).__name__})"
        raise BlockError(f"queries {found} must be a tensor of whole numbers of shape [Q] or [{batch}, Q]")
    if queries.is_floating_point() or queries.dim() not in (1, 2) or (queries.dim() == 2 and len(queries) != batch):
        found = f"{tuple(queries.shape)} and {queries.dtype}"
        raise BlockError(f"queries of shape {found} must be whole numbers of shape [Q] or [{batch}, Q]")
    if queries.numel() and not 0 <= int(queries.min()) <= int(queries.max()) < n:
        raise BlockError(f"queries ({queries.tolist()}) must be positions of the map, from 0 to {n - 1}")


def resolve_scale(scale: float | str | None, size: int, words: str = "'sqrt'") -> float:
    """The factor on the scores for heads of `size` features. Raises `BlockError` for an unknown word, naming words."""
    if scale is None:
        return 1.0
    if isinstance(scale, str) and scale == "sqrt":
        return size**-0.5
    if isinstance(scale, str) or not is_number(scale):
        raise BlockError(f"scale ({scale!r:.100}) must be a number, {words} or None")
    return float(scale)
