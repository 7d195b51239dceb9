"""Making a block for a place: from its name, class or factory, seeded, and checked."""

import copy
import hashlib
import json
import keyword
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sagan_attn.blocks.gate import Gated
from sagan_attn.blocks.registry import check_options, create_block, get_form
from sagan_attn.errors import BlockError, GraftError, SaganAttnError, first_line
from sagan_attn.surgery.point import Spec

__all__ = ["BlockLike", "build_block", "check_identity", "check_mapping", "default_name", "spec_of", "try_block"]

BlockLike = str | Callable[..., nn.Module]


def build_block(
    block: BlockLike,
    channels: int,
    options: Mapping[str, Any],
    *,
    seed: int,
    gate: bool = False,
    device: torch.device | None = None,
) -> nn.Module:
    """A new block in float32, whose initial weights depend on `seed` alone.

    Built on the CPU (or on `device` "meta", without weights), whatever the default device and dtype; the global
    random state is put back.

    Raises:
        BlockError: an unknown name or option, a factory that refuses its arguments, fails or makes no module.
    """
    default_dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), device or torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
        torch.set_default_dtype(torch.float32)
        try:
            if isinstance(block, str):
                module = create_block(block, channels, **options)
            else:
                check_options(default_name(block), block, options)
                module = _made(block, channels, options)
        finally:
            torch.set_default_dtype(default_dtype)
        if not isinstance(module, nn.Module):
            raise BlockError(f"block factory {block!r} made a {type(module).__name__}, not a torch.nn.Module")
        return Gated(module) if gate else module


def _made(factory: Callable[..., nn.Module], channels: int, options: Mapping[str, Any]) -> nn.Module:
    """What somebody's factory makes. Raises `BlockError` from what it raises itself."""
    try:
        return factory(channels, **options)
    except (SaganAttnError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # somebody else's code may raise anything
        raise BlockError(
            f"block {default_name(factory)!r} for {channels} channels and options {dict(options)!r:.200} cannot be "
            f"made: {first_line(error)} ({type(error).__name__})"
        ) from error


def spec_of(block: BlockLike, options: Mapping[str, Any], *, gate: bool, channels: int) -> Spec:
    """How that block is made, in words. Options that JSON has no words for are named and left out."""
    written, unwritable = {}, []
    for option, value in options.items():
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            unwritable.append((option, _no_json(str(error))))
            continue
        if json.loads(text) == _tuples_as_lists(value):
            written[option] = json.loads(text)
        else:  # keys of a dictionary that are no strings
            unwritable.append((option, _no_json(f"{value!r:.100} would come back as {text:.100}")))
    registered = block if isinstance(block, str) else None
    made_by = "" if registered else _qualified(block if hasattr(block, "__qualname__") else type(block))
    return Spec(registered, made_by, json.dumps(written), tuple(unwritable), gate, channels)


def _no_json(why: str) -> str:
    return f"JSON has no words for it ({why}). Bind it in a factory, as functools.partial does, and graft that"


def _qualified(maker: Any) -> str:
    return f"{getattr(maker, '__module__', '?')}.{maker.__qualname__}"


def _tuples_as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_as_lists(inner) for key, inner in value.items()}
    return [_tuples_as_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def derive_seed(seed: int, *words: str) -> int:
    """A seed for one block, so that blocks at different places differ and none depends on which others there are."""
    digest = hashlib.sha256(":".join([str(seed), *words]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_mapping(name: str, options: Mapping[str, Any]) -> None:
    """Raise `GraftError` unless options are a mapping from words."""
    if not isinstance(options, Mapping) or not all(isinstance(option, str) for option in options):
        raise GraftError(f"{name} ({options!r:.100}) must be a mapping from names of options to values")


def check_block(block: BlockLike, options: Mapping[str, Any]) -> None:
    """Raise `BlockError` for an unknown name, an unknown option, or something that cannot make a block."""
    if isinstance(block, str):
        check_options(block, get_form(block).factory, options)
    elif callable(block) and not isinstance(block, nn.Module):
        check_options(default_name(block), block, options)
    else:
        raise BlockError(f"block ({block!r:.100}) must be a registered name, a class or a factory (channels) -> Module")


def check_identity(block: nn.Module, channels: int, height: int, width: int, must_be_identity: bool) -> None:
    """Try a copy of a block on a random map [2, channels, height, width].

    Raises:
        BlockError: it fails on that map.
        GraftError: it does not keep shape and dtype, or it must start as the identity, in eval and in train mode,
            and does not.
    """
    for training in (False, True) if must_be_identity else (False,):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            x = torch.randn(2, channels, height, width, dtype=torch.float32, device="cpu")
            y = try_block(copy.deepcopy(block).train(training), x.clone())  # a clone, because a block may work in place
        _check_kept(block, x, y, must_be_identity)
    if isinstance(block, Gated) and must_be_identity and any(True for _ in block.block.parameters()):
        _check_reachable(block, x)


def try_block(block: nn.Module, x: torch.Tensor) -> Any:
    """What a block puts out. Raises `BlockError` from what the code of somebody else's block raises."""
    try:
        return block(x)
    except (SaganAttnError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # somebody else's code may raise anything
        raise BlockError(
            f"block {_class(block)} does not take a map of shape {tuple(x.shape)}: {first_line(error)} "
            f"({type(error).__name__})"
        ) from error


def _check_reachable(block: Gated, x: torch.Tensor) -> None:
    """Raise `GraftError` for a block that is the identity already: behind a gate of 0 nothing would ever learn."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        inner = copy.deepcopy(block.block).train()
        if torch.equal(try_block(inner, x.clone()), x):
            raise GraftError(
                f"block {_class(block)} starts as the identity by itself: behind a second gate of 0 neither would ever "
                "get a gradient. Leave gate out"
            )


def _check_kept(block: nn.Module, x: torch.Tensor, y: Any, must_be_identity: bool) -> None:
    found = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, torch.Tensor) else f"a {type(y).__name__}"
    if not isinstance(y, torch.Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        raise GraftError(f"block {_class(block)} does not keep the shape of its input: {tuple(x.shape)} gave {found}")
    if must_be_identity and isinstance(block, Gated) and not torch.equal(x, y):
        raise GraftError(
            f"block {_class(block)} is not the identity even behind a gate of 0: it changes its input in place, or "
            "puts out NaN or inf"
        )
    if must_be_identity and not torch.equal(x, y):
        last = getattr(block, "norm_first", True) is False  # the word of torch's layers and ours
        why = "; a post-norm layer (norm_first=False) ends in a normalisation and never does" if last else ""
        raise GraftError(
            f"block {_class(block)} does not start as the identity, so it would change what the model knows{why}. Pass "
            "gate=True to wrap it as x + gamma * (block(x) - x), or gate=False to put it in as it is"
        )


def default_name(block: BlockLike) -> str:
    """A module name for a graft of that block: the registered name, or that of the class or factory."""
    name = block if isinstance(block, str) else getattr(block, "__name__", type(block).__name__)
    name = "".join(letter if letter.isalnum() else "_" for letter in name).strip("_").lower()
    if keyword.iskeyword(name):  # "nonlocal": traced code could not name it
        return name + "_"
    return name if name and name != "lambda" else "block"


def _class(block: nn.Module) -> str:
    return type(block.block if isinstance(block, Gated) else block).__name__
