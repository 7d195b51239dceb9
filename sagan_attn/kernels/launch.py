"""Which tiles a kernel works on, and its launch."""

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sagan_attn.kernels import backward as _backward
from sagan_attn.kernels import forward as _forward
from sagan_attn.kernels.layout import output_like
from sagan_attn.kernels.tables import LARGE_ROOM, Tiles, choose, padded

__all__ = ["Limits", "backward", "forward"]

forward_: Any = _forward  # kernels, whose launches have no types
backward_: Any = _backward
LOG2_E = math.log2(math.e)
ROW_SUM_TILES = (32, 64)  # queries and features; bound by memory
# A weight is about 1/M, and float16 loses bits below 2^-14; weights this much larger still end at 2^14, below its end.
RAISED = 2.0**14


@dataclass(frozen=True)
class Limits:
    """What else decides over the weights, all of it optional.

    mask: boolean, each side that of [B, h, N, M] or 1. lens: int32 [B, N], how many keys each query attends to. rows
    and columns: float32 [B, h, N, height] and [B, h, N, width], added to the scores of keys of that row and column.
    dropout: share of weights to drop, with a seed [1] on the device.
    """

    mask: Tensor | None = None
    lens: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None

    def arguments(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Those of the kernels, for scores of that shape."""
        mask, rows, columns = self.mask, self.rows, self.columns
        each = mask is not None and mask.shape[2] > 1
        mask = None if mask is None else mask.expand(shape).view(torch.uint8)
        return {
            "MASK": mask,
            "mask_strides": (0, 0, 0, 0) if mask is None else mask.stride(),
            "EACH": each,
            "LENS": self.lens,
            "lens_strides": (0, 0) if self.lens is None else self.lens.stride(),
            "ROWS": None if rows is None else rows.contiguous(),
            "COLUMNS": None if columns is None else columns.contiguous(),
            "height": 1 if rows is None else rows.shape[-1],
            "width": 1 if columns is None else columns.shape[-1],
            "SEED": self.seed,
            "dropped": min(round(self.dropout * 2**31), 2**31 - 1),
            "grown": 1 / (1 - self.dropout) if self.dropout < 1 else 0.0,
        }


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, limits: Limits) -> tuple[Tensor, Tensor]:
    """Output [B, h, N, D], and the log-sum-exp of each query's scores [B, h, N] as a power of 2."""
    (b, heads, n, d), (m, size) = query.shape, value.shape[2:]
    out = output_like(value, n)
    lse = torch.empty(b, heads, n, device=query.device, dtype=torch.float32)
    tiles = _tiles("forward", query, value, limits)
    programs = _parts(n, tiles.queries) * _parts(size, tiles.values) * b * heads
    with _on(query.device):
        forward_.forward[(programs,)](
            query, key, value, out, lse,
            q_strides=query.stride(), k_strides=key.stride(), v_strides=value.stride(), out_strides=out.stride(),
            heads=heads, N=n, M=m, d=d, D=size, scale=scale * LOG2_E,
            PRECISION=_precision(value, query), **limits.arguments((b, heads, n, m)), **tiles.arguments(d),
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, limits: Limits
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, and of rows and columns of the limits.

    The gradient of the queries is summed with atomic additions, but where one program sees all keys, where there is a
    position, and where `torch.use_deterministic_algorithms` asks for sums in one order.
    """
    (b, heads, n, d), (m, size) = query.shape, value.shape[2:]
    tiles = _tiles("backward", query, value, limits)
    joint, blocks = size <= tiles.values, _parts(m, tiles.keys)
    by_queries = limits.rows is not None or (blocks > 1 and torch.are_deterministic_algorithms_enabled())
    add = blocks > 1 and not by_queries
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    total = torch.zeros(query.shape, device=query.device, dtype=torch.float32) if add else dq
    delta = torch.empty_like(lse)
    given = limits.arguments((b, heads, n, m))
    common = {
        "Q": query, "K": key, "V": value, "GRAD": grad, "LSE": lse, "DELTA": delta,
        "q_strides": query.stride(), "k_strides": key.stride(), "v_strides": value.stride(),
        "grad_strides": grad.stride(), "dq_strides": total.stride(),
        "heads": heads, "N": n, "M": m, "d": d, "D": size, "scale": scale * LOG2_E, "factor": scale,
        "WIDEN": query.dtype == torch.float16, "PRECISION": _precision(value, query),
        "NARROW": "tf32" if query.dtype == torch.float16 else _precision(value, query), **given,
    }  # fmt: skip
    of_keys = {
        "dk_strides": dk.stride(), "dv_strides": dv.stride(),
        "ADD": add, "RAISED": RAISED if value.dtype == torch.float16 else 1.0, **common,
    }  # fmt: skip
    with _on(query.device):
        rows, features = ROW_SUM_TILES
        backward_.row_sums[(_parts(n, rows) * b * heads,)](
            grad, out, delta, grad.stride(), out.stride(), heads, n, size,
            BLOCK_N=rows, BLOCK_V=features, enable_fp_fusion=True,
        )  # fmt: skip
        first = {"DQ": None if by_queries else total, "DK": dk}
        if not joint:
            wide = _tiles("forward", query, value, limits).turned()
            programs = _parts(m, wide.keys) * _parts(size, wide.values) * b * heads
            backward_.of_keys[(programs,)](DQ=None, DK=None, DV=dv, WHOLE=False, **of_keys, **wide.arguments(d))
        backward_.of_keys[(blocks * b * heads,)](
            DV=dv if joint else None, WHOLE=joint, **first, **of_keys, **tiles.arguments(d)
        )
        drows = dcolumns = None
        if by_queries:
            if limits.rows is not None and limits.columns is not None:
                drows, dcolumns = torch.empty_like(given["ROWS"]), torch.empty_like(given["COLUMNS"])
            tiles = _tiles("of queries", query, value, limits)
            if max(given["height"], given["width"]) > 64:  # whose sums take as many registers as dQ for wide queries
                tiles = replace(tiles, warps=8)
            backward_.of_queries[(_parts(n, tiles.queries) * b * heads,)](
                DQ=dq, DROWS=drows, DCOLUMNS=dcolumns, WHOLE=size <= tiles.values,
                BLOCK_H=padded(given["height"]), BLOCK_W=padded(given["width"]), **common, **tiles.arguments(d),
            )  # fmt: skip
    return dq.copy_(total) if add else dq, dk, dv, drows, dcolumns


def _tiles(table: str, query: Tensor, value: Tensor, limits: Limits) -> Tiles:
    tiles = choose(
        table,
        max(query.element_size(), value.element_size()),
        query.shape[-1],
        value.shape[-1],
        _room(query.device),
        query.dtype == torch.float16,
    )
    # What a position adds to a tile of scores would be loaded ahead as well, and is as large as a tile.
    return tiles if limits.rows is None else replace(tiles, stages=1)


def _room(device: torch.device) -> int:
    """Bytes of shared memory a program may have; in the interpreter, as much as on an H100."""
    if device.type != "cuda":
        return LARGE_ROOM
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _parts(size: int, of: int) -> int:
    return -(-size // of)


def _precision(*inputs: Tensor) -> str:
    """How float32 is multiplied: as torch's own products on a GPU are allowed to."""
    if all(x.dtype != torch.float32 for x in inputs):
        return "ieee"
    matmul = torch.backends.cuda.matmul
    allowed = getattr(matmul, "fp32_precision", None)  # torch 2.9; older: a flag
    return "tf32" if allowed == "tf32" or (allowed is None and matmul.allow_tf32) else "ieee"


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
