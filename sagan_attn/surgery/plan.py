"""What a call of `graft` would do, built and checked in full before anything is touched."""

import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from re import Pattern
from typing import Any

import torch
from torch import nn

from sagan_attn.errors import BlockError, GraftError, first_line
from sagan_attn.surgery.build import (
    BlockLike,
    build_block,
    check_block,
    check_identity,
    check_mapping,
    default_name,
    derive_seed,
    spec_of,
)
from sagan_attn.surgery.cost import Budget, cost_of, flops_share, probe_flops
from sagan_attn.surgery.place import check_anchor, check_model
from sagan_attn.surgery.point import CHILD, GraftPoint, Spec
from sagan_attn.surgery.probe import default_example, map_size, probe
from sagan_attn.surgery.select import At, anchor_of, select
from sagan_attn.surgery.sites import Maps, check_calls, maps_of
from sagan_attn.surgery.where import Where

__all__ = ["Insertion", "Request", "check_name", "insertion", "locate", "make_plan"]

AtMapping = Mapping[str | Pattern[str] | tuple[str, ...], BlockLike | Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """One block at one place, as asked for."""

    site: str
    block: BlockLike
    name: str
    gate: bool | None
    options: Mapping[str, Any]
    must_be_identity: bool


@dataclass(frozen=True)
class Insertion:
    """One block, made and checked, and where it goes."""

    name: str
    site: str
    anchor_name: str
    anchor: nn.Module
    layout: str
    block: nn.Module
    spec: Spec


def make_plan(
    model: nn.Module,
    at: "At | AtMapping",
    block: BlockLike,
    *,
    name: str | None,
    gate: bool | None,
    example_input: Any,
    seed: int,
    options: Mapping[str, Any] | None,
    budget: Budget,
) -> list[Insertion]:
    """The insertions that `graft` with these arguments makes. Raises what `graft` raises; changes nothing."""
    check_model(model)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise GraftError(f"seed ({seed!r:.100}) must be a whole number")
    where = Where(model, lambda: _worked_out_example(model, "its stages") if example_input is None else example_input)
    requests = _requests(model, at, block, name, gate, options, where)
    places = locate(model, requests, example_input)
    if budget != Budget():
        _check_budget(model, requests, places, example_input, budget)
    return [insertion(model, request, *places[request.site], seed) for request in requests]


def locate(model: nn.Module, requests: list[Request], example_input: Any) -> dict[str, tuple[str, nn.Module, Maps]]:
    """Site -> name and module of the anchor, and the maps there, for each request.

    Raises `GraftError` for a place that cannot take the block, and an `example_input` that the model does not take.
    """
    anchors = {request.site: anchor_of(model, request.site) for request in requests}
    for request in requests:
        _check_place(model, request, *anchors[request.site])
    _check_distinct(requests, anchors)
    if example_input is None:
        example_input = _worked_out_example(model, ", ".join(anchors))
    names = {name for site, (anchor_name, _) in anchors.items() for name in (site, anchor_name)}
    firings = probe(model, example_input, {name: model.get_submodule(name) for name in names})
    size = map_size(example_input)
    maps = {}
    for site, (anchor_name, _) in anchors.items():
        maps[site] = maps_of(site, firings[anchor_name], size)
        check_calls(site, firings[site], anchor_name, firings[anchor_name])
    return {site: (*anchors[site], maps[site]) for site in anchors}


def _requests(
    model: nn.Module,
    at: "At | AtMapping",
    block: BlockLike,
    name: str | None,
    gate: bool | None,
    options: Mapping[str, Any] | None,
    meaning: Callable[[str], str],
) -> list[Request]:
    """Each place with its block and options, in order; blocks, options and names checked."""
    check_mapping("options", {} if options is None else options)
    if isinstance(at, Mapping):
        if options:
            raise GraftError("options do not go with a mapping: put them beside the block, {site: {'block': ..., ...}}")
        if not at:
            raise GraftError("at is an empty mapping: name at least one module")
        entries = []
        for key, value in at.items():
            own: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"block": value}
            check_mapping(f"at[{key!r:.100}]", own)
            where = list(key) if isinstance(key, tuple) else key
            entries.append((where, own.pop("block", block), own.pop("gate", gate), own.pop("name", name), own))
    else:
        entries = [(at, block, gate, name, dict(options or {}))]
    requests = []
    for where, own_block, own_gate, own_name, own in entries:
        if own_gate is not None and not isinstance(own_gate, bool):
            raise GraftError(f"gate ({own_gate!r:.100}) must be True, False or None")
        check_block(own_block, own)
        graft_name = default_name(own_block) if own_name is None else own_name
        check_name(graft_name)
        requests += [
            Request(site, own_block, graft_name, own_gate, own, own_gate is not False)
            for site in select(model, where, meaning)
        ]
    return requests


def check_name(name: Any) -> None:
    """Raise `GraftError` for what cannot be the name of a graft."""
    valid = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
    if not valid or hasattr(GraftPoint("NCHW"), name):
        raise GraftError(f"name ({name!r:.100}) must be an identifier that torch.nn.Module does not use itself")


def _check_place(model: nn.Module, request: Request, anchor_name: str, anchor: nn.Module) -> None:
    check_anchor(model, anchor_name)
    point = anchor._modules.get(CHILD)
    if isinstance(point, GraftPoint) and request.name in point._modules:
        raise GraftError(
            f"site {request.site!r} already has a graft named {request.name!r} (at module {anchor_name!r}); "
            "pass another name= for a second one"
        )


def _check_distinct(requests: list[Request], anchors: Mapping[str, tuple[str, nn.Module]]) -> None:
    seen: dict[tuple[int, str], str] = {}
    for request in requests:
        anchor_name, anchor = anchors[request.site]
        other = seen.get((id(anchor), request.name))
        seen[id(anchor), request.name] = request.site
        if other == request.site:
            raise GraftError(f"{other!r} is asked for twice; a second graft named {request.name!r} needs another name")
        if other is not None:
            raise GraftError(
                f"{other!r} and {request.site!r} are the same place ({anchor_name!r}): a second graft named "
                f"{request.name!r} there needs another name"
            )


def _check_budget(
    model: nn.Module,
    requests: list[Request],
    places: Mapping[str, tuple[str, nn.Module, Maps]],
    example_input: Any,
    budget: Budget,
) -> None:
    """Raise `GraftError` for the first block that costs more than it may, `BlockError` for one refused there."""
    if example_input is None:
        example_input = default_example(model)
    _, host_flops = probe_flops(model, example_input, {})
    for request in requests:
        *_, maps = places[request.site]
        cost = cost_of(request.block, maps.channels, maps.sizes, request.options)
        if isinstance(cost, BlockError):
            raise cost
        excess = budget.excess(cost.flops, flops_share(cost, host_flops), cost.map_bytes)
        if excess:
            raise GraftError(f"block {default_name(request.block)!r} at {request.site!r} costs {excess}")


def _worked_out_example(model: nn.Module, where: str) -> Any:
    """An input for a model that came without one, known to pass through it."""
    example_input = default_example(model)
    try:
        probe(model, example_input, {})
    except GraftError as error:
        why = first_line(error.__cause__ or error)
        raise GraftError(
            f"the channels at {where} cannot be worked out: {type(model).__name__} does not take an input "
            f"of shape {tuple(example_input.shape)} ({why}); pass example_input"
        ) from error
    return example_input


def insertion(
    model: nn.Module, request: Request, anchor_name: str, anchor: nn.Module, maps: Maps, seed: int
) -> Insertion:
    """The block of a request, made for its place. Raises what `graft` raises for a block; changes nothing."""
    block = build_block(
        request.block,
        maps.channels,
        request.options,
        seed=derive_seed(seed, request.site, request.name),
        gate=bool(request.gate),
    )
    if not isinstance(request.block, str) or request.options or request.gate:  # others are known to start as nothing
        _, height, width = (0, 2, 2) if isinstance(request.block, str) else maps.sizes[0]
        check_identity(block, maps.channels, height, width, must_be_identity=request.must_be_identity)
    like = next((t for m in (anchor, model) for t in _tensors(m) if t.is_floating_point()), None)
    if like is not None:
        block = block.to(like.device, like.dtype)
    block.train(anchor.training)
    spec = spec_of(request.block, request.options, gate=bool(request.gate), channels=maps.channels)
    return Insertion(request.name, request.site, anchor_name, anchor, maps.layout, block, spec)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
