"""Between state dicts of other implementations and those of our blocks."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from torch import Tensor

from sagan_attn.blocks.converters import gated, nonlocals, sequences
from sagan_attn.blocks.converters.layout import Layout
from sagan_attn.blocks.converters.parts import OWN
from sagan_attn.errors import BlockError

__all__ = ["Converter", "convert", "convert_back", "sources"]


@dataclass(frozen=True)
class Converter:
    """Another implementation.

    Args:
        name: what `convert` calls it.
        description: what it is, and the block of ours that takes it.
        layouts: the ways it names its tensors. Recognised are exactly the keys of one of them, with fitting shapes.
            What is written is the first one that holds all of ours.
        stacks: whether `layers.<i>.` before the keys, and a last `norm`, make a stack.
        lacking: keys of theirs without a counterpart, and what they are.
    """

    name: str
    description: str
    layouts: tuple[Layout, ...]
    stacks: bool = False
    lacking: Mapping[str, str] = field(default_factory=dict)

    def layouts_for(self, keys: Iterable[str]) -> tuple[Layout, ...]:
        """The layouts, for as many layers as there are among the keys."""
        layers = {match[1] for key in keys if (match := re.match(r"layers\.(\d+)\.", key))} if self.stacks else ()
        if not layers:
            return self.layouts
        return tuple(stack for layout in self.layouts for stack in sequences.stacked(layout, len(layers)))


_ADDED = {"bias_k": "a key added to every sequence (add_bias_kv)", "bias_v": "a value added to it"}
CONVERTERS = {
    converter.name: converter
    for converter in (
        Converter("sagan", "query, key, value and gamma, as in SelfAttention2d itself", gated.sagan("", OWN)),
        Converter("sagan-conv", "query_conv, key_conv, value_conv and gamma: SelfAttention2d", gated.sagan("_conv")),
        Converter(
            "biggan",
            "theta, phi, g, o and gamma, plain or with spectral norms, those of BigGAN-PyTorch too: block 'biggan'",
            gated.biggan(),
        ),
        Converter("fastai", "SelfAttention of fastai 1 and 2, query and key exchanged: block 'fastai'", gated.fastai()),
        Converter("timm-bottleneck", "timm's BottleneckAttn: block 'botnet' with gamma 1", gated.bottleneck()),
        Converter("timm-nonlocal", "timm's NonLocalAttn: block 'nonlocal-timm'", nonlocals.timm()),
        Converter("nonlocal-alexhex7", "AlexHex7/Non-local_pytorch: block 'nonlocal-alexhex7'", nonlocals.alexhex7()),
        Converter("nonlocal-mmcv", "mmcv's NonLocal1d, 2d and 3d: block 'nonlocal-mmcv'", nonlocals.mmcv()),
        Converter(
            "torch-multihead",
            "nn.MultiheadAttention: MultiHeadAttention, MultiHeadAttention2d, CrossAttention2d",
            sequences.torch_multihead(),
            lacking=_ADDED,
        ),
        Converter("d2l-multihead", "MultiHeadAttention of Dive into Deep Learning: the same blocks", sequences.d2l()),
        Converter(
            "torch-encoder-layer",
            "nn.TransformerEncoderLayer and stacks of it: EncoderLayer, EncoderBlock2d, Encoder",
            sequences.torch_layer(decoder=False),
            stacks=True,
        ),
        Converter(
            "torch-decoder-layer",
            "nn.TransformerDecoderLayer and stacks of it: DecoderLayer, DecoderBlock2d, Decoder",
            sequences.torch_layer(decoder=True),
            stacks=True,
        ),
    )
}


def sources() -> dict[str, str]:
    """Names of the implementations that can be converted, and what they are."""
    return {name: converter.description for name, converter in CONVERTERS.items()}


def convert(state_dict: Mapping[str, Tensor], source: str = "auto", *, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of one of our blocks for that of another implementation; see `sources`.

    With it loaded, a block with the options of that implementation has the same outputs and gradients. Keys and shapes
    do not tell these options: heads, scale, pooling, the mode of a non-local block, whether norms come first. The
    tensors are copies, of the same dtype and device; the state dict is left as it is.

    - Weights come as convolutions for blocks on maps, and as matrices, which blocks on maps load as well, for
      attention that exists on sequences.
    - Where a spectral norm has no right singular vector (BigGAN-PyTorch's `u0`, `weight_u` alone), one step of power
      iteration from the left one gives both. Evaluation is the same; in training such codes and torch's
      `torch.nn.utils.spectral_norm` improve the vectors in another order than ours, and the estimates, not the
      singular value they go to, differ. torch's parametrization is the same in training too.
    - "timm-bottleneck" is an attention without a residual; as a block it is given gamma 1. As many values as input
      channels are assumed: a layer with another dim_out is refused where its tables show it, else misread.
    - Criss-cross attention, which is another function, has the keys and shapes of "sagan-conv".
    - "nonlocal-mmcv" with a norm has no bias before it; ours is 0.
    - A last norm of a stack has a place in ours where norms come first, and with final_norm=True.

    Args:
        state_dict: keys and tensors of the other module, all of them and no others.
        source: a name in `sources`; "auto" finds it by keys and shapes.
        prefix: take the keys that start with it, and leave it out.

    Raises:
        BlockError: an unknown source; a value that is no tensor; keys that fit no source, or not the one named, or
            more than one; shapes that do not fit.
    """
    theirs = _tensors(state_dict, prefix)
    layouts = {name: converter.layouts_for(theirs) for name, converter in _chosen(source).items()}
    fitting = [(name, layout) for name, own in layouts.items() for layout in own if layout.gap(theirs) == ([], [])]
    if not fitting:
        raise BlockError(_nearest(source, layouts, theirs))
    found: dict[str, dict[str, Tensor]] = {}
    errors = []
    for name, layout in fitting:
        try:
            found[name] = layout.to_ours(theirs)
        except BlockError as error:
            errors.append(f"state dict as {name!r}: {error}")
    if not found:
        raise BlockError("; ".join(errors))
    if len(found) > 1:
        raise BlockError(f"the state dict fits {' and '.join(map(repr, found))}: name its source")
    return found.popitem()[1]


def convert_back(
    state_dict: Mapping[str, Tensor], source: str, *, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state dict of another implementation for that of one of our blocks, the inverse of `convert`.

    Where the other side has several ways to name and shape its tensors, the result is in that of `like`; without it

    - "sagan", "sagan-conv": convolutions; spectral norms as torch's parametrization;
    - "biggan": spectral norms as BigGAN-PyTorch's `u0`, our left singular vector, and `sv0`, our estimate of the
      singular value; its own estimate is one step of power iteration further on;
    - "fastai": that of version 2 with `torch.nn.utils.spectral_norm`;
    - "nonlocal-alexhex7", "nonlocal-mmcv": two dimensions, no pooling;
    - "torch-multihead": `in_proj_weight` where queries, keys and values have one size.

    Two things are folded into others, which changes no output: gamma into the values for "timm-bottleneck", and a bias
    before a norm into its running mean for "nonlocal-mmcv". Copies, dtype and device as in `convert`.

    Args:
        state_dict: that of our block, all of it.
        source: a name in `sources`.
        like: a state dict of the module that is to load the result.

    Raises:
        BlockError: an unknown source; a value that is no tensor; what the other side has no place for.
    """
    ours = _tensors(state_dict)
    layouts = _named(source).layouts_for(ours)
    if like is not None:
        like = _tensors(like)
        layouts = tuple(layout for layout in _named(source).layouts_for(like) if layout.gap(like) == ([], []))
        if not layouts:
            reason = _nearest(source, {source: _named(source).layouts_for(like)}, like)
            raise BlockError(f"like: {reason}")
    fitting = [layout for layout in layouts if layout.our_gap(ours) == ([], [])]
    if not fitting:
        missing, unexpected = _smallest(layout.our_gap(ours) for layout in layouts)
        raise BlockError(
            f"the block cannot be expressed as {source!r}"
            + (f", which has no counterpart of {_listed(unexpected)}" if unexpected else "")
            + (f"; the block lacks {_listed(missing)}" if missing else "")
        )
    errors = []
    for layout in fitting:
        try:
            return layout.to_theirs(ours, like)
        except BlockError as error:
            errors.append(str(error))
    raise BlockError(f"the block cannot be expressed as {source!r}: {'; or '.join(dict.fromkeys(errors))}")


def _tensors(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """What starts with the prefix, without it and without gradients."""
    if not isinstance(state_dict, Mapping):
        raise BlockError(f"a state dict is required, not {type(state_dict).__name__}")
    for key in state_dict:
        if not isinstance(key, str):
            raise BlockError(f"a state dict has words as keys, not {key!r:.100}")
    chosen = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if prefix and not chosen:
        raise BlockError(f"no key starts with the prefix {prefix!r}; there are {_listed(state_dict)}")
    if not chosen:
        raise BlockError("the state dict is empty")
    for key, value in chosen.items():
        if not isinstance(value, Tensor):
            raise BlockError(f"{prefix + key!r} holds {type(value).__name__}, but a tensor is required")
    return {key: value.detach() for key, value in chosen.items()}


def _chosen(source: str) -> Mapping[str, Converter]:
    return CONVERTERS if isinstance(source, str) and source == "auto" else {source: _named(source)}


def _named(source: str) -> Converter:
    if not isinstance(source, str) or source not in CONVERTERS:
        near = difflib.get_close_matches(str(source), CONVERTERS) or list(CONVERTERS)
        names = ", ".join(CONVERTERS)
        raise BlockError(f"unknown source {source!r:.100}; did you mean {' or '.join(near)}? (all: {names})")
    return CONVERTERS[source]


def _nearest(source: str, layouts: Mapping[str, tuple[Layout, ...]], keys: Collection[str]) -> str:
    """What separates keys from the layout that they fit best."""
    name, (missing, unexpected) = min(
        ((name, _smallest(layout.gap(keys) for layout in own)) for name, own in layouts.items()),
        key=lambda candidate: _length(candidate[1]),
    )
    words = "no source fits the state dict; the nearest is" if source == "auto" else "the state dict does not fit"
    words = f"{words} {name!r}"
    if missing:
        words += f"; missing: {_listed(missing)}"
    if unexpected:
        words += f"; unexpected: {_listed(unexpected)}"
    for key in unexpected:
        if key in CONVERTERS[name].lacking:
            words += f"; {key!r} has no counterpart: {CONVERTERS[name].lacking[key]}"
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*(key.split(".") for key in keys), strict=False))
    prefix = "".join(f"{level[0]}." for level in shared)
    if prefix and len(unexpected) == len(keys):
        words += f"; all keys start with {prefix!r}: is it a prefix?"
    return words


Gap = tuple[list[str], list[str]]


def _smallest(gaps: Iterable[Gap]) -> Gap:
    return min(gaps, key=_length)


def _length(gap: Gap) -> int:
    return len(gap[0]) + len(gap[1])


def _listed(keys: Iterable[str], most: int = 12) -> str:
    """The first keys."""
    names = [repr(key) for key in keys]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
