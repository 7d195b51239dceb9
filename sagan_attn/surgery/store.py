"""save_grafts, load_grafts: the grafts of a model without the model."""

import difflib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn.errors import GraftError
from sagan_attn.files import write_whole
from sagan_attn.surgery.build import BlockLike, build_block, check_block
from sagan_attn.surgery.graft import carry_out, grafts_of
from sagan_attn.surgery.graft_file import Entry, pack, read_grafts
from sagan_attn.surgery.grafts import Graft, Grafts
from sagan_attn.surgery.plan import Insertion, Request, check_name, insertion, locate
from sagan_attn.surgery.point import CHILD, GraftPoint
from sagan_attn.surgery.select import anchor_of, host_names
from sagan_attn.surgery.sites import Maps

__all__ = ["load_grafts", "save_grafts"]

# What a block says to options it was not made for. They come from a file, so they can be anything.
_BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def save_grafts(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the grafts of the model, and nothing of the host, to a safetensors file.

    The file holds each block's state dict in its dtype, and how to rebuild it: site, name, registered block, options
    (tuples as lists), gate, layout and channels. Sites are named as in `grafts_of`: as seen from the model that
    `graft` was given. A block of a class or factory has no registered name, so `load_grafts` asks for it. The file is
    written as a whole: on any failure the old one is still there.

    Raises:
        GraftError: no grafts; an option that JSON has no words for; a block that is no longer what its name and
            options make; two grafts of one name at sites of one name, in models grafted apart; a path that cannot be
            written.
    """
    grafts = grafts_of(model)
    if not grafts:
        raise GraftError(f"{type(model).__name__} has no grafts to save; graft first")
    entries = [_describe(graft) for graft in grafts]
    _check_distinct(
        entries, f"{type(model).__name__} contains models that were grafted apart: save the grafts of each by itself"
    )
    tensors = {}
    for graft, entry in zip(grafts, entries, strict=True):
        state = _state(graft)
        if entry.block is not None:
            _check_unchanged(entry, graft.block, state)
        tensors |= {entry.prefix + key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    data = pack(entries, tensors)
    try:
        write_whole(Path(path), data)
    except OSError as error:
        raise GraftError(f"the grafts cannot be written to {os.fspath(path)!r}: {error}") from error


def load_grafts(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_input: Any = None,
    blocks: Mapping[str, BlockLike] | None = None,
) -> Grafts:
    """Graft what `save_grafts` wrote: the same blocks at the same places, in the same order, with their weights.

    The blocks take device, dtype and mode of their places, as in `graft`; where the dtype is that of the saved model,
    outputs are bit-identical to its. Everything is checked before the model is touched. Blocks need not start as the
    identity. No code of the file is run and the global random state is untouched.

    Args:
        model: a host with the sites of the saved one, of the same channels and layout there.
        path: of the file.
        example_input: as in `graft`.
        blocks: for grafts made from a class or factory: graft name or path -> that class or factory, which is called
            with the channels and the saved options. A name stands for every such graft of that name; a path, as in
            `Graft.path`, for one, and goes before the name.

    Raises:
        GraftError: a file that is missing, damaged or foreign; a block that is not registered, not in `blocks`, or
            refuses the options; tensors that are not those of the blocks; a host without the sites, or with others; a
            graft of that name there already; what `graft` refuses about a place. Nothing was changed.
    """
    entries, tensors = read_grafts(Path(path))
    _check_distinct(entries, f"{os.fspath(path)!r} is no file of `save_grafts`")
    for entry in entries:
        check_name(entry.name)
    makers = _makers(entries, _paths(model, entries), blocks or {})
    for entry in entries:
        if entry.block is not None:  # without weights first: a file may ask for blocks of any size
            _check_tensors(entry, _built(entry, torch.device("meta")).state_dict(), _own(entry, tensors))
    _check_names(entries, tensors)
    requests = [
        Request(entry.site, maker, entry.name, entry.gate, entry.options, must_be_identity=False)
        for entry, maker in zip(entries, makers, strict=True)
    ]
    places = locate(model, requests, example_input)
    for entry in entries:
        _check_maps(entry, places[entry.site][2])
    plan = [
        _rebuilt(model, entry, request, places[entry.site], _own(entry, tensors))
        for entry, request in zip(entries, requests, strict=True)
    ]
    return carry_out(plan)


def _describe(graft: Graft) -> Entry:
    spec = graft.point.specs.get(graft.name)
    if spec is None:
        raise GraftError(
            f"graft {graft.name!r} at {graft.site!r} was made by a version that did not record how: graft it again and "
            "load its state dict, then save"
        )
    for option, why in spec.unwritable:
        raise GraftError(
            f"{graft.name!r} at {graft.site!r} cannot be saved, because its option {option!r} cannot be written: {why}"
        )
    options = json.loads(spec.options)
    return Entry(
        graft.site, graft.name, spec.block, spec.made_by, options, spec.gate, graft.point.layout, spec.channels
    )


def _state(graft: Graft) -> dict[str, Tensor]:
    """The tensors of a block: parameters and persistent buffers."""
    state = graft.block.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            found = type(value).__name__ if not isinstance(value, Tensor) else f"{value.layout} on {value.device}"
            raise GraftError(f"{key!r} of {graft!r} is no plain tensor with values ({found}), and cannot be saved")
    return state


def _check_unchanged(entry: Entry, block: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise `GraftError` for a block that was fused or edited, which its name and options do not give back."""
    made = _built(entry)
    try:
        if type(made) is not type(block):
            raise GraftError(f"it is a {type(block).__name__}, {type(made).__name__} would be made")
        _check_tensors(entry, made.state_dict(), state)
    except GraftError as error:
        raise GraftError(f"{entry} was changed since it was made and could not be rebuilt: {error}") from error


def _check_distinct(entries: Sequence[Entry], why: str) -> None:
    seen = set()
    for entry in entries:
        if entry.prefix in seen:
            raise GraftError(f"there are two of {entry}; {why}")
        seen.add(entry.prefix)


def _makers(entries: Sequence[Entry], paths: Sequence[str], blocks: Mapping[str, BlockLike]) -> list[BlockLike]:
    """What builds each graft: its registered name, or what was passed for its path or its name."""
    asked = {path: entry for path, entry in zip(paths, entries, strict=True) if entry.block is None}
    count = Counter(entry.name for entry in asked.values())
    keys = {path: entry.name if count[entry.name] == 1 else path for path, entry in asked.items()}
    missing = [path for path, entry in asked.items() if path not in blocks and entry.name not in blocks]
    if missing:
        lines = ", ".join(f"{asked[path]} (made by {asked[path].made_by!r})" for path in missing)
        wanted = ", ".join(f"{keys[path]!r}: ..." for path in missing)
        raise GraftError(
            f"{lines}: a class or factory has no registered name to be rebuilt by; pass blocks={{{wanted}}} with it"
        )
    for key in blocks:
        if key not in asked and key not in count:
            raise GraftError(
                f"blocks has {key!r}, but the file asks for {', '.join(map(repr, keys.values())) or 'none'}"
            )
    makers = []
    for path, entry in zip(paths, entries, strict=True):
        maker = entry.block
        if maker is None:
            maker = blocks[path] if path in blocks else blocks[entry.name]
        try:
            check_block(maker, entry.options)
        except ValueError as error:
            raise GraftError(f"{entry} cannot be rebuilt: {error}") from error
        makers.append(maker)
    return makers


def _built(entry: Entry, device: torch.device | None = None) -> nn.Module:
    """A new registered block, as an entry describes it."""
    try:
        return build_block(entry.block or "", entry.channels, entry.options, seed=0, gate=entry.gate, device=device)
    except _BUILD_ERRORS as error:
        raise GraftError(f"{entry} cannot be rebuilt: {error}") from error


def _own(entry: Entry, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one graft, by their key in its state dict."""
    return {name.removeprefix(entry.prefix): t for name, t in tensors.items() if name.startswith(entry.prefix)}


def _check_names(entries: Sequence[Entry], tensors: Mapping[str, Tensor]) -> None:
    foreign = [name for name in tensors if not name.startswith(tuple(entry.prefix for entry in entries))]
    if foreign:
        raise GraftError(f"the file has unexpected tensors, of none of its grafts: {_listed(foreign)}")


def _check_tensors(entry: Entry, required: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Raise `GraftError` unless names, shapes and kinds of numbers are those the rebuilt block needs."""
    faults = []
    if missing := [key for key in required if key not in found]:
        faults.append(f"missing {_listed(missing)}")
    if unexpected := [key for key in found if key not in required]:
        faults.append(f"unexpected {_listed(unexpected)}")
    for key in required.keys() & found.keys():
        own, other = required[key], found[key]
        if not isinstance(own, Tensor) or own.shape != other.shape:
            needed = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            faults.append(f"{key} is {tuple(other.shape)}, {needed} is required")
        elif own.dtype != other.dtype and not (own.is_floating_point() and other.is_floating_point()):
            faults.append(f"{key} is {other.dtype}, {own.dtype} is required")
    if faults:
        raise GraftError(f"the tensors of {entry} are not those of its block: {'; '.join(sorted(faults))}")


def _paths(model: nn.Module, entries: Sequence[Entry]) -> list[str]:
    """`Graft.path` of each graft to be.

    Raises `GraftError` for a site that the host does not have, or where such a graft is already.
    """
    names, paths = host_names(model), []
    for entry in entries:
        if entry.site not in names:
            near = difflib.get_close_matches(entry.site, names, n=5, cutoff=0.5) or names[:5]
            raise GraftError(
                f"{entry} does not fit {type(model).__name__}: it has no module {entry.site!r}, which is required; "
                f"near names: {', '.join(near) or 'none'}. Load into the kind of model that was grafted"
            )
        anchor_name, anchor = anchor_of(model, entry.site)
        point = anchor._modules.get(CHILD)
        if isinstance(point, GraftPoint) and entry.name in point._modules:
            raise GraftError(
                f"site {entry.site!r} already has a graft named {entry.name!r} (at module {anchor_name!r}); take it "
                "out with ungraft first"
            )
        paths.append(f"{anchor_name}.{CHILD}.{entry.name}")
    return paths


def _check_maps(entry: Entry, maps: Maps) -> None:
    if (maps.channels, maps.layout) != (entry.channels, entry.layout):
        raise GraftError(
            f"{entry} does not fit this host: site {entry.site!r} puts out {maps.channels} channels in {maps.layout}, "
            f"{entry.channels} channels in {entry.layout} are required. Load into a host of the saved one's widths"
        )


def _rebuilt(
    model: nn.Module,
    entry: Entry,
    request: Request,
    place: tuple[str, nn.Module, Maps],
    tensors: Mapping[str, Tensor],
) -> Insertion:
    """The insertion of one graft, its block with the saved weights."""
    try:
        step = insertion(model, request, *place, seed=0)
        state = step.block.state_dict()
        if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
            raise GraftError("this host is on the meta device, where it would lose its weights: move the host first")
        _check_tensors(entry, state, tensors)
        step.block.load_state_dict(tensors)
    except _BUILD_ERRORS as error:
        raise GraftError(f"{entry} cannot be rebuilt: {error}") from error
    return step


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
