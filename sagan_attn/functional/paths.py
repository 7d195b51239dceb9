"""One door to attention, and the ways through it: the same numbers, other memory and time."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sagan_attn.errors import BlockError
from sagan_attn.functional.attention import allowed_keys, attention_output, attention_weights, check_lens, check_mask
from sagan_attn.functional.precision import no_autocast

__all__ = ["PATHS", "Path", "attend", "obstacle_to_factoring"]

Path = Literal["auto", "materialised", "chunked", "factored"]
PATHS = get_args(Path)

MATERIALISED_SCORES = 2**24  # 64 MB in float32; from there on the chunked path is no slower on two cores
CHUNK_SCORES = 2**22  # held at a time by the chunked path
CHUNK_ROWS = 64  # fewer queries at a time waste the multiplication, so rather fewer samples


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    dropout: float = 0.0,
    path: Path = "auto",
    **how: Any,
) -> Tensor:
    """Attention: each query's sum of values, weighted by `attention_weights(query, key, scale, **how)`.

    query [B, h, N, d], key [B, h, M, d], value [B, h, M, D]; returns [B, h, N, D] in the dtype of value.

    Args:
        scale, how: see `attention_weights`.
        dropout: probability of a weight to be set to 0, the others growing by 1 / (1 - dropout).
        path: "materialised" holds all B*h*N*M weights, and keeps as many numbers again for the backward pass.
            "chunked" goes through the queries in groups and computes their weights once more in the backward pass:
            memory grows linearly with N. It is not for `torch.func.grad`, which knows no checkpoints. "factored",
            q (k^T v) instead of (q k^T) v, is linear in time as well; it serves the dot score with normalize="mean",
            without position or dropout, and masks over keys alone.
            "auto" is factored where that serves, chunked from 17 million scores on (tanh features of the
            additive score), else materialised; `torch.export` gets no chunks, whose number would be fixed.

    Raises:
        BlockError: an unknown path, or one that cannot serve what is asked; see also `attention_weights`.
    """
    if path not in PATHS:
        raise BlockError(f"path ({path!r}) must be one of {', '.join(PATHS)}")
    obstacle = obstacle_to_factoring(dropout, how)
    if path == "factored" and obstacle:
        raise BlockError(f"path 'factored' cannot serve {obstacle}")
    if path == "factored" or (path == "auto" and not obstacle):
        return _factored(query, key, value, scale, **how)
    large = path == "auto" and _scores(query, key, how) >= MATERIALISED_SCORES
    if torch.compiler.is_exporting() or query.is_meta:  # no fixed number of chunks there, and no memory to save here
        large = False
    if path == "chunked" or large:
        return _chunked(query, key, value, scale, dropout, how)
    return _materialised(query, key, value, scale, dropout, how)


def _scores(query: Tensor, key: Tensor, how: Mapping[str, Any]) -> int:
    """How many numbers the scores of all queries take."""
    b, heads, n, d = query.shape
    return b * heads * n * key.shape[2] * (d if how.get("score") == "additive" else 1)


def _materialised(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, how: Mapping[str, Any]
) -> Tensor:
    weights = attention_weights(query, key, scale, **how)
    weights = F.dropout(weights, dropout) if dropout else weights
    if how.get("normalize") == "mean":  # weights without bound, which half precision may not hold
        with no_autocast(query):
            return attention_output(weights, value.to(weights.dtype)).to(value.dtype)
    return attention_output(weights, value)


def _chunked(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, how: Mapping[str, Any]) -> Tensor:
    b, heads, n, _ = query.shape
    check_lens(b, n, how.get("valid_lens"))
    check_mask((b, heads, n, key.shape[2]), how.get("mask"))
    if b == 0 or heads == 0 or n == 0:
        return _materialised(query, key, value, scale, dropout, how)
    a_row = max(1, _scores(query, key, how) // (b * n))  # of one sample
    samples = max(1, CHUNK_SCORES // (a_row * min(n, CHUNK_ROWS)))
    rows = max(1, CHUNK_SCORES // (a_row * min(samples, b)))
    how = dict(how)
    if how.get("position") is not None and how.get("index") is None:
        how["index"] = torch.arange(n, device=query.device)
    run = partial(checkpoint, _materialised, use_reentrant=False) if torch.is_grad_enabled() else _materialised
    done = []
    for i in (slice(start, start + samples) for start in range(0, b, samples)):
        parts = (slice(start, start + rows) for start in range(0, n, rows))
        done.append(
            torch.cat([run(query[i, :, j], key[i], value[i], scale, dropout, _part(how, i, j)) for j in parts], dim=2)
        )
    return torch.cat(done)


def _part(how: Mapping[str, Any], samples: slice, rows: slice) -> dict[str, Any]:
    """The arguments of `attention_weights` for a part of the samples and queries."""
    index, lens, mask = (how.get(name) for name in ("index", "valid_lens", "mask"))
    own = dict(how)
    if index is not None:
        own["index"] = index[rows] if index.dim() == 1 else index[samples, rows]
    if lens is not None:
        own["valid_lens"] = lens[samples] if lens.dim() == 1 else lens[samples, rows]
    if mask is not None:
        mask = mask[samples] if mask.shape[0] > 1 else mask
        own["mask"] = mask[:, :, rows] if mask.shape[2] > 1 else mask
    return own


def obstacle_to_factoring(dropout: float, how: Mapping[str, Any]) -> str | None:
    """What keeps the sum over keys from being done before the queries come in; None if nothing does."""
    if how.get("score", "dot") != "dot" or how.get("normalize") != "mean":
        return f"score {how.get('score', 'dot')!r} with normalize {how.get('normalize', 'softmax')!r}"
    if how.get("position") is not None or dropout:
        return "a position in the scores" if not dropout else "dropout of weights"
    lens, mask = how.get("valid_lens"), how.get("mask")
    if (lens is not None and lens.dim() > 1) or (mask is not None and mask.dim() == 4 and mask.shape[2] > 1):
        return "a mask that differs from query to query"
    return None


def _factored(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    valid_lens: Tensor | None = None,
    mask: Tensor | None = None,
    **how: Any,
) -> Tensor:
    if unknown := how.keys() - {"score", "normalize", "vector", "position", "index"}:
        raise TypeError(f"attend() has no argument {', '.join(map(repr, sorted(unknown)))}")
    b, heads, n, _ = query.shape
    m = key.shape[2]
    precise = torch.promote_types(query.dtype, torch.float32)
    allowed = allowed_keys((b, heads, n, m), key.device, valid_lens, mask)
    with no_autocast(query):
        key = key.to(precise)
        count: Tensor | int = max(m, 1)
        if allowed is not None:
            key = key.masked_fill(~allowed.transpose(-2, -1), 0)
            count = allowed.sum(-1, keepdim=True).clamp(min=1)  # [B or 1, h or 1, 1, 1]
        summary = torch.matmul(key.transpose(-2, -1), value.to(precise))  # [B, h, d, D]
        return (torch.matmul(query.to(precise), summary) * scale / count).to(value.dtype)
