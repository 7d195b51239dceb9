"""Blocks by name: what `graft(..., block="<name>")`, YAML files and the contract tests go by.

A name is a class and the options that make it a published form; a form is data, not a class of its own.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sagan_attn.blocks.bottleneck import Bottleneck2d
from sagan_attn.blocks.channel import GCBlock2d, SqueezeExcite2d
from sagan_attn.blocks.checks import positive
from sagan_attn.blocks.context import GlobalContext2d
from sagan_attn.blocks.identity import IdentityAttention2d
from sagan_attn.blocks.multihead import CrossAttention2d, MultiHeadAttention2d
from sagan_attn.blocks.nonlocal_ import NonLocal2d
from sagan_attn.blocks.sagan import SelfAttention2d
from sagan_attn.blocks.transformer import DecoderBlock2d, EncoderBlock2d
from sagan_attn.errors import BlockError, first_line

BlockFactory = Callable[..., nn.Module]


@dataclass(frozen=True)
class Form:
    """A named block: a factory that takes the channels first, and the options the name stands for.

    An option that depends on the channels is a function of their number.
    """

    factory: BlockFactory
    options: Mapping[str, Any] = field(default_factory=dict)


def _at_most(reduction: int) -> Callable[[int], int]:
    """A reduction by that factor, or to 1 channel where there are fewer channels."""
    return lambda channels: min(reduction, channels)


FORMS: dict[str, Form] = {
    "sagan": Form(SelfAttention2d),
    "sagan-paper": Form(SelfAttention2d, {"value_reduction": _at_most(8), "bias": False}),
    "biggan": Form(SelfAttention2d, {"value_reduction": _at_most(2), "bias": False, "pool": 2, "spectral_norm": True}),
    "fastai": Form(SelfAttention2d, {"bias": False, "spectral_norm": True}),
    "botnet": Form(
        SelfAttention2d,
        {
            "heads": 4,
            "reduction": 1,
            "scale": "sqrt",
            "bias": False,
            "position": "relative",
            "init": "trunc_normal",
        },
    ),
    "nonlocal": Form(NonLocal2d),
    "nonlocal-caffe2": Form(NonLocal2d, {"scale": "sqrt", "pool": 2, "pool_first": True, "init": "normal"}),
    "nonlocal-alexhex7": Form(NonLocal2d, {"pool": 2}),
    "nonlocal-mmcv": Form(NonLocal2d, {"scale": "sqrt", "norm": False, "init": "normal"}),
    "nonlocal-timm": Form(NonLocal2d, {"scale": "input", "reduction": 8, "divisor": 8, "init": "kaiming"}),
    "multihead": Form(MultiHeadAttention2d),
    "additive": Form(MultiHeadAttention2d, {"score": "additive", "heads": 1, "reduction": _at_most(8)}),
    "cross": Form(CrossAttention2d),
    "encoder": Form(EncoderBlock2d),
    "decoder": Form(DecoderBlock2d),
    "context-max": Form(GlobalContext2d, {"reduce": "max"}),
    "context-mean": Form(GlobalContext2d, {"reduce": "mean"}),
    "identity": Form(IdentityAttention2d),
    "conv": Form(Bottleneck2d),
    "se": Form(SqueezeExcite2d),
    "gc": Form(GCBlock2d),
}


def block_names() -> list[str]:
    """The registered names."""
    return list(FORMS)


def get_form(name: str) -> Form:
    """The form of that name. Raises `BlockError` with near names for an unknown one."""
    if not isinstance(name, str) or name not in FORMS:
        near = difflib.get_close_matches(str(name), FORMS) or list(FORMS)
        raise BlockError(f"unknown block {name!r:.100}; did you mean {' or '.join(near)}? (all: {', '.join(FORMS)})")
    return FORMS[name]


def create_block(name: str, in_channels: int, **options: Any) -> nn.Module:
    """The block of that name for maps with so many channels; options override those of the name.

    `functools.partial(create_block, name)` goes wherever a class of blocks does, as in timm's `attn_layer`.

    Raises:
        BlockError: an unknown name, an option the block does not have, or one it refuses.
    """
    form = get_form(name)
    check_options(name, form.factory, options)
    positive(in_channels=in_channels)
    own = {option: v(in_channels) if callable(v) else v for option, v in form.options.items() if option not in options}
    try:
        return form.factory(in_channels, **own, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what torch says to sizes that no memory has room for
        raise BlockError(
            f"block {name!r} for in_channels ({in_channels}) and {options!r:.200} cannot be made: {first_line(error)}"
        ) from error


def check_options(name: str, factory: BlockFactory, options: Mapping[str, Any]) -> None:
    """Raise `BlockError` for a factory without arguments or signature, or options that its signature does not have."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError) as error:
        raise BlockError(f"block {name!r} cannot be called with the channels: {first_line(error)}") from error
    if not parameters:
        raise BlockError(f"block {name!r} takes no argument; a factory is called with the channels")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    valid = [p.name for p in parameters[1:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    unknown = [option for option in options if option not in valid]
    if unknown:
        raise BlockError(
            f"block {name!r} has no option {', '.join(map(repr, unknown))}; it has {', '.join(valid) or 'none'}"
        )
