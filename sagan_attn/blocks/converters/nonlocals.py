"""Codes of non-local blocks, for `NonLocal2d`. Keys do not tell its dot product from the embedded Gaussian."""

import torch
from torch import Tensor

from sagan_attn.blocks.converters.entry import Entry
from sagan_attn.blocks.converters.layout import Implied, Layout
from sagan_attn.blocks.converters.parts import linear, norm, tensor

__all__ = ["alexhex7", "mmcv", "timm"]

RANKS = (4, 3, 5)
"""Convolutions over maps, sequences and volumes: of size 1 they hold the same numbers."""


def alexhex7() -> tuple[Layout, ...]:
    """Pooled projections, and an output before a norm, are the first of a sequence."""
    layouts = []
    for pooled in ("", ".0"):
        for mode in ("embedded", "gaussian", "concatenation"):
            projections = _projections("", pooled, mode, "concat_project.0.weight")
            layouts.append(Layout((*projections, *_output("W.0"), *norm("W.1", "norm", "C", running=True))))
            layouts.append(Layout((*projections, *_output("W"))))
    return tuple(layouts)


def mmcv() -> tuple[Layout, ...]:
    """An output before a norm has no bias, where ours has one."""
    shift = Implied("output.bias", "C", _no_bias, _fold_bias)
    layouts = []
    for pooled in ("", ".0"):
        for mode in ("embedded", "gaussian", "concatenation"):
            projections = _projections(".conv", pooled, mode, "concat_project.conv.weight")
            bn = norm("conv_out.bn", "norm", "C", running=True)
            layouts.append(Layout((*projections, *_output("conv_out.conv"))))
            layouts.append(Layout((*projections, *_output("conv_out.conv", bias=False), *bn), (shift,)))
    return tuple(layouts)


def timm() -> tuple[Layout, ...]:
    entries = [
        entry
        for theirs, ours in (("t", "query"), ("p", "key"), ("g", "value"))
        for entry in linear(theirs, ours, "i", "C", bias=True)
    ]
    return (Layout((*entries, *linear("z", "output", "C", "i", bias=True), *norm("norm", "norm", "C", running=True))),)


def _projections(inner: str, pooled: str, mode: str, score: str) -> list[Entry]:
    """theta, phi and g; the first two are not in Gaussian blocks. inner and pooled: what follows these names."""
    names = {"g": "value"} if mode == "gaussian" else {"theta": "query", "phi": "key", "g": "value"}
    entries = []
    for theirs, ours in names.items():
        name = theirs + ("" if theirs == "theta" else pooled) + inner
        entries += linear(name, ours, "i", "C", bias=True, ranks=RANKS)
    if mode == "concatenation":
        entries.append(tensor(score, "score_vector", 1, "2i", ranks=RANKS))
    return entries


def _output(theirs: str, bias: bool = True) -> tuple[Entry, ...]:
    return linear(theirs, "output", "C", "i", bias=bias, ranks=RANKS)


def _no_bias(tensors: dict[str, Tensor]) -> None:
    tensors["output.bias"] = torch.zeros_like(tensors["norm.bias"])


def _fold_bias(tensors: dict[str, Tensor]) -> None:
    """The batch norm takes the mean off, and with it a bias."""
    tensors["norm.running_mean"] = tensors["norm.running_mean"] - tensors.pop("output.bias")
