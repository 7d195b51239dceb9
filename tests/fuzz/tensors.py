"""Tensors as nobody sends them on purpose: every dtype, layout, stride, device and rank."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["DTYPES", "FLOATS", "masks", "odd", "shaped", "tensors"]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int64, torch.uint8, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)


def shaped(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Small finite numbers of that dtype."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x > 0 if dtype == torch.bool else (2 * x).to(dtype)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x


def _strided(x: Tensor) -> Tensor:
    """Every second entry of a larger tensor, behind an offset."""
    if not x.dim():
        return x
    room = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1] + 1))
    room[..., 1::2] = x
    return room[..., 1::2]


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.dim() and x.shape[0] else x


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _flipped(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float8_e4m3fn else x.flip(tuple(range(x.dim())))


WAYS = {
    "plain": lambda x: x,
    "channels last": _last,
    "transposed": _transposed,
    "with holes": _strided,
    "expanded": _expanded,
    "flipped": _flipped,
    "leaf": lambda x: x.requires_grad_() if x.is_floating_point() or x.is_complex() else x,
    "conjugate": lambda x: x.conj() if x.is_complex() else x,
    "negative": lambda x: torch.ops.aten._neg_view(x) if x.dtype in FLOATS else x,
}
USELESS = {
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse() if x.dtype in (torch.float32, torch.float64) else x.to("meta"),
}


@st.composite
def tensors(
    draw: st.DrawFn,
    shapes: st.SearchStrategy[tuple[int, ...]],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    useless: bool = True,
) -> Tensor:
    """Tensors of these shapes in many layouts; with `useless` also without values, or without strides."""
    x = shaped(draw(shapes), draw(st.sampled_from(dtypes)), draw(st.integers(0, 3)))
    ways = WAYS | (USELESS if useless else {})
    return ways[draw(st.sampled_from(list(ways)))](x)


def odd(rank: int = 5, side: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of up to so many dimensions, sides of 0 and 1 included."""
    return st.lists(st.integers(0, side), max_size=rank).map(tuple)


def masks(*shapes: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """No mask, one of these shapes, one of any shape or dtype, or no tensor."""
    fitting = st.sampled_from(shapes)
    return st.one_of(
        st.none(),
        tensors(fitting, (torch.bool,)),
        tensors(fitting | odd(), (torch.bool, torch.int64, torch.float32)),
        st.sampled_from(["mask", 1, [True], True]),
    )
