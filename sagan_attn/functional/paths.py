"""One door to attention, and the ways through it: the same numbers, other memory and time."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sagan_attn.errors import BlockError
from sagan_attn.functional.attention import (
    allowed_keys,
    attention_output,
    attention_weights,
    check_lens,
    check_mask,
    check_position,
    check_rows,
)
from sagan_attn.functional.checks import check_devices, check_number
from sagan_attn.functional.chunks import chunked_attention
from sagan_attn.functional.door import kernels_serve, obstacle_to_kernels, through_kernels
from sagan_attn.functional.precision import no_autocast, product_dtype

__all__ = ["PATHS", "Path", "attend", "chosen_path", "obstacle_to"]

Path = Literal["auto", "materialised", "chunked", "factored", "fused", "sdpa", "sdpa_padded", "flex"]
PATHS = get_args(Path)

# The rule of "auto", as measured by `python -m sagan_attn bench block` on two cores (benchmarks/block_cpu.json): from
# so many scores (B*h*N*M) on it is chunked, softmax of dot products by `chunks.py` and the rest through checkpoints;
CHUNKED_FROM = {"dot": 2**23, "any": 2**24}
# but without gradients, for values up to so wide and so many scores a map, torch's fused kernel is as fast or faster.
PADDED_WIDTH, PADDED_FROM = 64, 2**24
# Not measured: on a GPU the kernels are for scores that would take memory (64 MB in float32, and twice that to train);
# benchmarks/gpu.py says whether they should serve smaller maps too. Where they cannot, chunks only save memory.
FUSED_FROM, CHUNKED_FROM_ON_GPU = 2**24, 2**27
CHUNK_SCORES = 2**22  # held at a time through checkpoints
CHUNK_ROWS = 64  # fewer queries at a time waste the multiplication, so rather fewer samples
# torch's fused kernel on the CPU takes a query whose scores are all NaN for a masked one, and gives 0, where there are
# fewer keys than numbers in a vector register (torch 2.15); with a mask it does not.
FEW_KEYS = 64


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
        path: how it is computed.
            "materialised": all B*h*N*M weights in memory, and as many numbers again for the backward pass.
            "chunked": a group of queries at a time, whose weights are computed once more in the backward pass: memory
            grows linearly with N. Second derivatives hold all weights.
            "factored": q (k^T v) instead of (q k^T) v, linear in time as well; for the dot score with
            normalize="mean", without position or dropout, and masks over keys alone.
            "fused": one kernel on an NVIDIA GPU (Triton; compute capability 8.0), made for narrow queries and wide
            values: nothing of size N x M, also with a position, masks, valid_lens and dropout. For softmax of dot
            products, d up to 128 and D up to 1024, not in float64. Second derivatives hold all weights, and are
            refused with dropout.
            "sdpa": `F.scaled_dot_product_attention` as it is; "sdpa_padded": with queries and keys padded with zeros
            to the width of the values, or the other way round, and all in rows, as its fused kernels want it. For
            softmax of dot products without position. Second derivatives are refused by torch where a fused kernel ran.
            "flex": torch's compiled FlexAttention; as "sdpa", without masks and dropout, and not on the CPU.
            "auto": factored where that serves; for many scores fused on a GPU, and chunked elsewhere (or
            "sdpa_padded", for narrow values without gradients on the CPU); else materialised. `torch.export` gets
            neither chunks nor kernels, because its graphs serve other backends too.

    Raises:
        BlockError: an unknown path, or one that cannot serve what is asked; see also `attention_weights`.
    """
    check_rows(query, key, value)
    check_devices(query, **how)
    if how.get("position") is not None:
        check_position(query, key, how["position"], how.get("index"))
    check_number("scale", scale)
    check_number("dropout", dropout)
    if not 0 <= dropout <= 1:
        raise BlockError(f"dropout ({dropout}) must be a number from 0 to 1")
    if not isinstance(path, str) or path not in PATHS:
        raise BlockError(f"path ({path!r:.100}) must be one of {', '.join(PATHS)}")
    if path == "auto":
        path = chosen_path(query, key, value, dropout, how)
    elif obstacle := obstacle_to(path, dropout, how) or _obstacle_here(path, query, key, value, how):
        raise BlockError(f"path {path!r} cannot serve {obstacle}")
    return _WAYS[path](query, key, value, scale, dropout, how)


def chosen_path(query: Tensor, key: Tensor, value: Tensor, dropout: float, how: Mapping[str, Any]) -> Path:
    """What "auto" means for these tensors, of which it looks at no number; see `attend`."""
    if not obstacle_to("factored", dropout, how):
        return "factored"
    if torch.compiler.is_exporting() or query.is_meta:  # no memory to save there
        return "materialised"
    scores = _scores(query, key, how)
    many = query.device.type == "cuda" and scores >= FUSED_FROM
    if many and not obstacle_to("fused", dropout, how) and kernels_serve(query, key, value, how):
        return "fused"
    if query.device.type != "cpu":
        return "chunked" if scores >= CHUNKED_FROM_ON_GPU else "materialised"
    if _obstacle_to_groups(dropout, how):
        return "chunked" if scores >= CHUNKED_FROM["any"] else "materialised"
    if scores < CHUNKED_FROM["dot"]:
        return "materialised"
    padded = (
        not torch.is_grad_enabled() and value.shape[-1] <= PADDED_WIDTH and query.shape[2] * key.shape[2] >= PADDED_FROM
    )
    return "sdpa_padded" if padded else "chunked"


def _scores(query: Tensor, key: Tensor, how: Mapping[str, Any]) -> int:
    """How many numbers the scores of all queries take."""
    b, heads, n, d = query.shape
    return b * heads * n * key.shape[2] * (d if how.get("score") == "additive" else 1)


def obstacle_to(path: Path, dropout: float, how: Mapping[str, Any]) -> str | None:
    """What keeps a path from serving attention of that kind; None if nothing does."""
    if path in ("auto", "materialised", "chunked"):
        return None
    score, normalize = how.get("score", "dot"), how.get("normalize", "softmax")
    if score != "dot" or normalize != ("mean" if path == "factored" else "softmax"):
        return f"score {score!r} with normalize {normalize!r}"
    if path == "fused":
        return None
    if how.get("position") is not None:
        return "a position in the scores"
    if dropout and path in ("factored", "flex"):
        return "dropout of weights"
    lens, mask = how.get("valid_lens"), how.get("mask")
    for_each = _has_rows(lens) or (isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] > 1)
    if path == "factored" and for_each:
        return "a mask that differs from query to query"
    if path == "flex" and (lens is not None or mask is not None):
        return "masks"
    return None


def _obstacle_here(path: Path, query: Tensor, key: Tensor, value: Tensor, how: Mapping[str, Any]) -> str | None:
    """What keeps FlexAttention or the fused kernels from serving these tensors."""
    if path == "fused":
        return obstacle_to_kernels(query, key, value, how)
    if path != "flex":
        return None
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return "empty tensors"
    if query.device.type == "cpu":  # torch 2.15: rows 4 to 7 of 40 were wrong for d = 16 and D = 32
        return "tensors on the CPU, where FlexAttention has no backward pass and gives wrong rows at some sizes"
    return None


def _materialised(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, how: Mapping[str, Any]
) -> Tensor:
    weights = attention_weights(query, key, scale, **how)
    weights = F.dropout(weights, dropout) if dropout else weights
    # Means are weights without bound, which half precision may not hold.
    dtype = weights.dtype if how.get("normalize") == "mean" else product_dtype(value)
    with no_autocast(query):
        return attention_output(weights.to(dtype), value.to(dtype)).to(value.dtype)


def _chunked(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, how: Mapping[str, Any]) -> Tensor:
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return _materialised(query, key, value, scale, dropout, how)
    if _obstacle_to_groups(dropout, how) or torch.compiler.is_exporting():  # whose graphs serve other backends
        return _through_checkpoints(query, key, value, scale, dropout, how)
    _refuse_unknown(how)
    shape = (*query.shape[:3], key.shape[2])
    mask = allowed_keys(shape, query.device, how.get("valid_lens"), how.get("mask"))
    return chunked_attention(query, key, value, float(scale), mask)


def _obstacle_to_groups(dropout: float, how: Mapping[str, Any]) -> bool:
    """Whether chunks have to go through checkpoints, because `chunked_attention` does not know what is asked."""
    return bool(obstacle_to("sdpa", dropout, how)) or dropout > 0 or _has_rows(how.get("valid_lens"))


def _has_rows(lens: Any) -> bool:
    """Whether there is a length for each query. What is no tensor is refused where it is used."""
    return isinstance(lens, Tensor) and lens.dim() > 1


def _through_checkpoints(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, how: Mapping[str, Any]
) -> Tensor:
    b, heads, n, _ = query.shape
    check_lens(b, n, how.get("valid_lens"))
    check_mask((b, heads, n, key.shape[2]), how.get("mask"))
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
        done.append([run(query[i, :, j], key[i], value[i], scale, dropout, _part(how, i, j)) for j in parts])
    with no_autocast(query):  # which refuses to join half-precision tensors on the CPU
        return torch.cat([torch.cat(outputs, dim=2) for outputs in done])


def _part(how: Mapping[str, Any], samples: slice, rows: slice) -> dict[str, Any]:
    """The arguments of `attention_weights` for a part of the samples and queries."""
    index, lens, mask = (how.get(name) for name in ("index", "valid_lens", "mask"))
    own = dict(how)
    if index is not None and how.get("position") is not None:
        own["index"] = index[rows] if index.dim() == 1 else index[samples, rows]
    if lens is not None:
        own["valid_lens"] = lens[samples] if lens.dim() == 1 else lens[samples, rows]
    if mask is not None:
        mask = mask[samples] if mask.shape[0] > 1 else mask
        own["mask"] = mask[:, :, rows] if mask.shape[2] > 1 else mask
    return own


def _factored(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, how: Mapping[str, Any]
) -> Tensor:
    _refuse_unknown(how)
    b, heads, n, _ = query.shape
    m = key.shape[2]
    precise = torch.promote_types(query.dtype, torch.float32)
    allowed = allowed_keys((b, heads, n, m), key.device, how.get("valid_lens"), how.get("mask"))
    with no_autocast(query):
        key = key.to(precise)
        count: Tensor | int = max(m, 1)
        if allowed is not None:
            key = key.masked_fill(~allowed.transpose(-2, -1), 0)
            count = allowed.sum(-1, keepdim=True).clamp(min=1)  # [B or 1, h or 1, 1, 1]
        summary = torch.matmul(key.transpose(-2, -1), value.to(precise))  # [B, h, d, D]
        return (torch.matmul(query.to(precise), summary) * scale / count).to(value.dtype)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, how: Mapping[str, Any]) -> Tensor:
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return _materialised(query, key, value, scale, dropout, how)
    _refuse_unknown(how)
    return through_kernels(query, key, value, scale, dropout, how)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, how: Mapping[str, Any]) -> Tensor:
    _refuse_unknown(how)
    shape = (*query.shape[:3], key.shape[2])
    mask = allowed_keys(shape, query.device, how.get("valid_lens"), how.get("mask"))
    few = query.device.type == "cpu" and not torch.compiler.is_exporting() and key.shape[2] < FEW_KEYS
    if mask is None and few:
        mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool)
    query, key = query.to(value.dtype), key.to(value.dtype)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)


def _sdpa_padded(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, how: Mapping[str, Any]
) -> Tensor:
    size = max(query.shape[-1], value.shape[-1])
    # A last dimension that is not contiguous sends torch to the road without a fused kernel.
    q, k, v = (F.pad(x, (0, size - x.shape[-1])).contiguous() for x in (query, key, value))
    return _sdpa(q, k, v, scale, dropout, how)[..., : value.shape[-1]]


def _flex(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, how: Mapping[str, Any]) -> Tensor:
    _refuse_unknown(how)
    return _compiled_flex()(query.to(value.dtype), key.to(value.dtype), value, scale=scale)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    return torch.compile(flex_attention)


def _refuse_unknown(how: Mapping[str, Any]) -> None:
    """`attention_weights` does it where it is called."""
    if unknown := how.keys() - {"score", "normalize", "vector", "position", "index", "valid_lens", "mask"}:
        raise TypeError(f"attend() has no argument {', '.join(map(repr, sorted(unknown)))}")


_WAYS = {
    "materialised": _materialised,
    "chunked": _chunked,
    "factored": _factored,
    "fused": _fused,
    "sdpa": _sdpa,
    "sdpa_padded": _sdpa_padded,
    "flex": _flex,
}
