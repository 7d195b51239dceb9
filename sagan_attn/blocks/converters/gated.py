"""Codes of self-attention behind a gate, for `SelfAttention2d`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sagan_attn.blocks.converters.entry import Entry
from sagan_attn.blocks.converters.layout import Implied, Layout
from sagan_attn.blocks.converters.parts import (
    HOOK,
    HOOK_U,
    MAP,
    PARAMETRIZATION,
    PLAIN,
    U0,
    Style,
    linear,
    singular,
    tensor,
)

__all__ = ["biggan", "bottleneck", "fastai", "sagan"]

ALONE = {"query": ("d", "C"), "key": ("d", "C"), "value": ("C", "C")}
PROJECTED = {"query": ("d", "C"), "key": ("d", "C"), "value": ("D", "C"), "output": ("C", "D")}


def sagan(suffix: str, *own: Style) -> tuple[Layout, ...]:
    """`query`, `key` and `value` with a suffix; own: a further way that spectral norms are stored.

    A Conv1d with a spectral norm is left to fastai, whose softmax is over the other side.
    """
    names = {name: name + suffix for name in ALONE}
    return tuple(
        _gated(names, ALONE, style, bias=bias, ranks=MAP if style is PLAIN else (4, 2), gamma=(1, 0))
        for style in (PLAIN, PARAMETRIZATION, HOOK, HOOK_U, *own)
        for bias in (True, False)
    )


def biggan() -> tuple[Layout, ...]:
    names = {"query": "theta", "key": "phi", "value": "g", "output": "o"}
    styles = (U0, PLAIN, PARAMETRIZATION, HOOK, HOOK_U)
    return tuple(_gated(names, PROJECTED, style, bias=False, ranks=(4,), gamma=(0, 1)) for style in styles)


def fastai() -> tuple[Layout, ...]:
    """Version 2 wraps each convolution in a sequence, version 1 does not."""
    return tuple(
        _gated(
            {"query": "key" + inner, "key": "query" + inner, "value": "value" + inner},
            ALONE,
            style,
            bias=False,
            ranks=(3,),
            gamma=(1, 0),
        )
        for inner in (".0", "")
        for style in (HOOK, PARAMETRIZATION, HOOK_U, PLAIN)
    )


def bottleneck() -> tuple[Layout, ...]:
    """timm's convolution for queries, keys and values in one; as many values as input channels are assumed."""
    stacked = ("query", "key", "value")
    weights, biases = (tuple(f"{name}.{kind}" for name in stacked) for kind in ("weight", "bias"))
    weight = Entry("qkv.weight", weights, ("d", "d", "C"), ("C",), (4,), MAP)
    bias = Entry("qkv.bias", biases, ("d", "d", "C"), (), (1,), (1,))
    tables = [tensor(f"pos_embed.{name}", name, size, "e") for name, size in (("height_rel", "h"), ("width_rel", "w"))]
    gate = Implied("gamma", 1, _open_gate, _fold_gate)
    return tuple(Layout((*qkv, *tables), (gate,), _bad_heads) for qkv in ((weight,), (weight, bias)))


def _gated(
    names: Mapping[str, str],
    sizes: Mapping[str, tuple[str, str]],
    style: Style,
    *,
    bias: bool,
    ranks: tuple[int, ...],
    gamma: tuple[int, ...],
) -> Layout:
    """Convolutions of these names and sizes, and a gate with one of these numbers of dimensions."""
    entries: list[Entry] = []
    for ours, (rows, columns) in sizes.items():
        entries += linear(names[ours], ours, rows, columns, bias=bias, style=style, ranks=ranks)
    incomplete = "weight_u" in style.values() and "weight_v" not in style.values()
    vectors = tuple(singular(ours, columns) for ours, (_, columns) in sizes.items()) if incomplete else ()
    return Layout((*entries, tensor("gamma", "gamma", 1, ranks=gamma)), vectors)


def _open_gate(tensors: dict[str, Tensor]) -> None:
    tensors["gamma"] = torch.ones_like(tensors["value.weight"].flatten()[:1])


def _fold_gate(tensors: dict[str, Tensor]) -> None:
    """gamma * attention is the attention with values times gamma."""
    gamma = tensors.pop("gamma")
    for key in ("value.weight", "value.bias"):
        if key in tensors:
            tensors[key] = (tensors[key] * gamma).to(tensors[key].dtype)


def _bad_heads(ours: Mapping[str, Tensor]) -> str | None:
    """Tables without a middle, or with features that no number of heads explains."""
    for key in ("height_rel", "width_rel"):
        if len(ours[key]) % 2 == 0:
            return f"{key!r} has {len(ours[key])} rows, but an odd number is required: offsets to both sides, and 0"
    if ours["height_rel"].shape[1] != ours["width_rel"].shape[1]:
        return "'height_rel' and 'width_rel' must have the same features"
    size, features, channels = ours["height_rel"].shape[1], len(ours["query.weight"]), len(ours["value.weight"])
    heads = features // size
    if features % size or channels % heads:
        return (
            f"'height_rel' has {size} features a head, which does not go with {features} query and {channels} value "
            "features; as many values as input channels are assumed"
        )
    return None
