"""Scores, weights and output of attention on rows of positions [B, h, N, d]."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from sagan_attn.errors import BlockError
from sagan_attn.functional.checks import check_devices, check_number, check_shape
from sagan_attn.functional.positions import relative_logits
from sagan_attn.functional.precision import no_autocast

__all__ = [
    "Normalize",
    "Score",
    "allowed_keys",
    "attention_output",
    "attention_weights",
    "check_lens",
    "check_mask",
    "check_position",
    "check_rows",
]

Score = Literal["dot", "additive", "concatenation"]
Normalize = Literal["softmax", "mean"]


def attention_weights(
    query: Tensor,
    key: Tensor,
    scale: float = 1.0,
    *,
    score: Score = "dot",
    normalize: Normalize = "softmax",
    vector: Tensor | None = None,
    position: tuple[Tensor, Tensor] | None = None,
    index: Tensor | None = None,
    valid_lens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The weight each query gives to each key, [B, h, N, M].

    Computed and returned in float32 (float64 for float64 inputs), under autocast too: unscaled scores pass the
    largest float16, 65504, easily. Weights at masked keys are exactly 0, and so are all weights of a query without
    any valid key (torch's `nn.MultiheadAttention` can give NaN there); masked scores take no part in anything, but a
    NaN in a masked *value* still spoils the output, because 0 * NaN is NaN.

    Args:
        query: [B, h, N, d].
        key: [B, h, M, d].
        scale: factor on the scores.
        score: "dot" q.k; "additive" v.tanh(q + k) with v the vector [h, d] (Bahdanau et al. 2014,
            arXiv:1409.0473); "concatenation" relu(w.[q; k]) with w the vector [h, 2*d] (Wang et al. 2018,
            arXiv:1711.07971). The first and the last never hold more than N*M numbers a head, the additive score N*M*d.
        normalize: "softmax" over the keys; "mean" divides the scores by the number of valid keys.
        vector: learned vector of the additive and concatenation scores.
        position: tables [2*H-1, d] and [2*W-1, d] of relative positions for a map whose positions are the keys; adds
            `relative_logits` of the queries, not scaled, to the scores.
        index: which positions of that map the queries are, [N] or [B, N]; None for all in order.
        valid_lens: number of valid keys, which come first; [B] or, for each query its own, [B, N].
        mask: boolean, True at keys that may be attended to; of 4 dimensions, broadcast to [B, h, N, M].

    Raises:
        BlockError: an unknown score or normalize, a missing vector, a tensor of another shape, kind or device.
    """
    check_rows(query, key)
    check_number("scale", scale)
    check_devices(query, vector=vector, index=index, valid_lens=valid_lens, mask=mask)
    if not isinstance(normalize, str) or normalize not in get_args(Normalize):
        raise BlockError(f"normalize ({normalize!r:.100}) must be one of {', '.join(get_args(Normalize))}")
    if position is not None:
        check_position(query, key, position, index)
    precise = torch.promote_types(query.dtype, torch.float32)
    with no_autocast(query):
        query, key = query.to(precise), key.to(precise)
        scores = _scores(query, key, scale, score, vector)  # [B, h, N, M]
        if position is not None:
            height_rel, width_rel = position
            scores = scores + relative_logits(query, height_rel.to(precise), width_rel.to(precise), index)
        allowed = allowed_keys(scores.shape, scores.device, valid_lens, mask)
        if normalize == "mean":
            if allowed is None:
                return scores / max(key.shape[2], 1)
            return scores.masked_fill(~allowed, 0) / allowed.sum(-1, keepdim=True).clamp(min=1)
        if allowed is None:
            return scores.softmax(dim=-1)
        # The lowest number instead of -inf: a row of -inf alone would become NaN, and its gradient too.
        scores = scores.masked_fill(~allowed, torch.finfo(precise).min)
        return scores.softmax(dim=-1).masked_fill(~allowed, 0)


def check_rows(query: Tensor, key: Tensor, *value: Tensor) -> None:
    """Raise `BlockError` unless query [B, h, N, d], key [B, h, M, d], value [B, h, M, D] are floats on one device."""
    check_shape("query", query, ("B", "h", "N", "d"))
    b, heads, _, d = query.shape
    check_shape("key", key, (b, heads, "M", d))
    check_devices(query, key=key)
    for one in value:
        check_shape("value", one, (b, heads, key.shape[2], "D"))
        check_devices(query, value=one)


def check_position(query: Tensor, key: Tensor, position: tuple[Tensor, Tensor], index: Tensor | None) -> None:
    """Raise `BlockError` for tables or an index that do not fit; see `attention_weights`.

    Values of the index are looked at on the CPU alone: elsewhere the host would have to wait for them.
    """
    if not isinstance(position, (tuple, list)) or len(position) != 2:
        raise BlockError(f"position ({type(position).__name__}) must be a table of row and one of column offsets")
    sides = []
    for name, table in zip(("height", "width"), position, strict=True):
        check_shape(f"position of {name}", table, ("2*side - 1", query.shape[3]))
        check_devices(query, position=table)
        if table.shape[0] and table.shape[0] % 2 == 0:
            raise BlockError(f"position of {name} has {table.shape[0]} rows: 2 * side - 1 are required")
        sides.append((table.shape[0] + 1) // 2)
    height, width = sides
    if height * width != key.shape[2]:
        raise BlockError(f"position, for a map of {height} x {width}, does not fit {key.shape[2]} keys")
    b, _, n, _ = query.shape
    if index is None:
        if n > height * width:
            raise BlockError(f"position, for a map of {height} x {width}, does not fit {n} queries: an index is needed")
        return
    whole = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if not whole or tuple(index.shape) not in ((n,), (b, n)):
        found = f"of shape {tuple(index.shape)} and {index.dtype}" if isinstance(index, Tensor) else repr(index)[:100]
        raise BlockError(f"index {found} must be whole numbers of shape ({n},) or ({b}, {n})")
    known = index.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and n and not 0 <= int(index.min()) <= int(index.max()) < height * width:
        raise BlockError(f"index must be positions of a map of {height} x {width}, from 0 to {height * width - 1}")


def _scores(query: Tensor, key: Tensor, scale: float, score: Score, vector: Tensor | None) -> Tensor:
    if not isinstance(score, str) or score not in get_args(Score):
        raise BlockError(f"score ({score!r:.100}) must be one of {', '.join(get_args(Score))}")
    if score == "dot":
        return torch.matmul(query if scale == 1.0 else query * scale, key.transpose(-2, -1))
    if vector is None:
        raise BlockError(f"score {score!r} needs a vector")
    check_shape("vector", vector, (query.shape[1], query.shape[3] * (1 if score == "additive" else 2)))
    vector = vector.to(query.dtype)
    if score == "additive":
        features = (query[:, :, :, None] + key[:, :, None]).tanh()  # [B, h, N, M, d]
        return (features @ vector[:, None, :, None])[..., 0] * scale
    of_query, of_key = vector[:, None].chunk(2, dim=-1)  # [h, 1, d] each
    both = (query * of_query).sum(-1)[..., None] + (key * of_key).sum(-1)[:, :, None]  # [B, h, N, M]
    return both.relu() * scale


def allowed_keys(
    shape: Sequence[int], device: torch.device, valid_lens: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """Which keys may be attended to, by valid_lens and mask of `attention_weights` for scores of that shape.

    Of 4 dimensions: M keys, and the others as large as those of the scores or 1. None for all keys.
    """
    check_lens(shape[0], shape[2], valid_lens)
    check_mask(shape, mask)
    allowed = None
    if valid_lens is not None:
        lens = valid_lens[:, None, None, None] if valid_lens.dim() == 1 else valid_lens[:, None, :, None]
        allowed = torch.arange(shape[3], device=device) < lens  # [B, 1, 1 or N, M]
    if mask is not None:
        allowed = mask if allowed is None else allowed & mask
    return None if allowed is None else allowed.expand(*allowed.shape[:-1], shape[3])


def check_lens(b: int, n: int, valid_lens: Tensor | None) -> None:
    """Raise `BlockError` unless valid_lens are None or whole numbers [B] or [B, N]."""
    if valid_lens is None:
        return
    if not isinstance(valid_lens, Tensor):
        raise BlockError(f"valid_lens must be a tensor of whole numbers, not a {type(valid_lens).__name__}")
    whole = not (valid_lens.is_floating_point() or valid_lens.is_complex() or valid_lens.dtype == torch.bool)
    whole = whole and valid_lens.layout == torch.strided
    if not whole or tuple(valid_lens.shape) not in ((b,), (b, n)):
        raise BlockError(
            f"valid_lens of shape {tuple(valid_lens.shape)} and {valid_lens.dtype} must be whole numbers of shape "
            f"({b},) or ({b}, {n})"
        )


def check_mask(shape: Sequence[int], mask: Tensor | None) -> None:
    """Raise `BlockError` unless the mask is None or boolean and broadcasts to that shape of scores."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise BlockError(f"mask must be a boolean tensor, not a {type(mask).__name__}")
    fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, shape, strict=True))
    if mask.dtype != torch.bool or mask.layout != torch.strided or not fits:
        raise BlockError(
            f"mask of shape {tuple(mask.shape)} and {mask.dtype} must be boolean, True at keys to attend to, and "
            f"broadcast to [B, h, N, M] = {tuple(shape)}"
        )


def attention_output(weights: Tensor, value: Tensor) -> Tensor:
    """Each query's weighted sum of values. weights [B, h, N, M], value [B, h, M, D]; returns [B, h, N, D].

    In the dtype of value, and laid out as it is: columns of a map give columns. Raises `BlockError` for others.
    """
    check_shape("value", value, ("B", "h", "M", "D"))
    check_shape("weights", weights, (*value.shape[:2], "N", value.shape[2]))
    check_devices(value, weights=weights)
    weights = weights.to(value.dtype)
    if value.stride(-1) != 1 and value.stride(-2) == 1:
        return torch.matmul(value.mT, weights.mT).mT
    return torch.matmul(weights, value)
