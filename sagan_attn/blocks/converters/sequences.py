"""Codes of multi-head attention and transformer layers, for ours on sequences and on maps."""

from dataclasses import replace

from sagan_attn.blocks.converters.entry import Entry, prefixed
from sagan_attn.blocks.converters.layout import Layout
from sagan_attn.blocks.converters.parts import ROWS, linear, norm

__all__ = ["d2l", "stacked", "torch_layer", "torch_multihead"]


def torch_multihead() -> tuple[Layout, ...]:
    return tuple(
        Layout((*_in_proj(bias, fused), *_linear("out_proj", "output", "E", "E", bias)))
        for fused in (True, False)
        for bias in (True, False)
    )


def d2l() -> tuple[Layout, ...]:
    names = {
        "W_q": ("query", "E", "Q"),
        "W_k": ("key", "E", "K"),
        "W_v": ("value", "E", "V"),
        "W_o": ("output", "E", "E"),
    }
    return tuple(
        Layout(tuple(entry for theirs, part in names.items() for entry in _linear(theirs, *part, bias)))
        for bias in (False, True)
    )


def torch_layer(decoder: bool) -> tuple[Layout, ...]:
    """nn.TransformerEncoderLayer, or nn.TransformerDecoderLayer."""
    attentions = {"self_attn.": "attention.", "multihead_attn.": "cross."} if decoder else {"self_attn.": "attention."}
    layouts = []
    for bias in (True, False):
        entries = []
        for theirs, ours in attentions.items():
            attention = (*_in_proj(bias, fused=True), *_linear("out_proj", "output", "E", "E", bias))
            entries += [prefixed(entry, theirs, ours) for entry in attention]
        entries += _linear("linear1", "linear1", "F", "E", bias)
        entries += _linear("linear2", "linear2", "E", "F", bias)
        for name in ("norm1", "norm2", "norm3")[: len(attentions) + 1]:
            entries += norm(name, name, "E", bias=bias)
        layouts.append(Layout(tuple(entries)))
    return tuple(layouts)


def stacked(layout: Layout, layers: int) -> tuple[Layout, Layout]:
    """So many layers of a layout, without and with a norm behind them."""
    entries = [
        prefixed(entry, f"layers.{layer}.", f"layers.{layer}.") for layer in range(layers) for entry in layout.entries
    ]
    last = [_renamed(entry) for entry in layout.entries if entry.theirs.startswith("norm1.")]
    return Layout(tuple(entries)), Layout((*entries, *last))


def _linear(theirs: str, ours: str, rows: str, columns: str, bias: bool) -> tuple[Entry, ...]:
    return linear(theirs, ours, rows, columns, bias=bias, ranks=(2,), our_ranks=ROWS)


def _in_proj(bias: bool, fused: bool) -> list[Entry]:
    """Weights of queries, keys and values in one, or each its own where keys or values have another size."""
    names = ("query", "key", "value")
    if fused:
        weights = tuple(f"{name}.weight" for name in names)
        entries = [Entry("in_proj_weight", weights, ("E", "E", "E"), ("E",), (2,), ROWS)]
    else:
        entries = [
            Entry(f"{name[0]}_proj_weight", (f"{name}.weight",), ("E",), (columns,), (2,), ROWS)
            for name, columns in zip(names, "EKV", strict=True)
        ]
    if bias:
        biases = tuple(f"{name}.bias" for name in names)
        entries.append(Entry("in_proj_bias", biases, ("E", "E", "E"), (), (1,), (1,)))
    return entries


def _renamed(entry: Entry) -> Entry:
    """An entry of norm1 as one of norm."""
    return replace(entry, theirs=entry.theirs.replace("norm1", "norm"), ours=(entry.ours[0].replace("norm1", "norm"),))
