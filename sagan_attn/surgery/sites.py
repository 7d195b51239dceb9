"""The places of a model where a block can go, and what one would cost there."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sagan_attn.errors import BlockError, GraftError
from sagan_attn.surgery.build import BlockLike, build_block, check_block
from sagan_attn.surgery.place import check_anchor, check_open
from sagan_attn.surgery.probe import Firing, default_example, map_size, probe, quiet
from sagan_attn.surgery.select import anchor_of, host_names

__all__ = ["Maps", "Site", "check_calls", "maps_of", "sites"]

Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True)
class Site:
    """A place where a block can go, as seen in one forward pass of the example.

    Args:
        name: the module whose output the block would take.
        channels, height, width: of its map; the first one's size if it fires several times.
        layout: "NCHW" or "NHWC", that of the module's output.
        calls: how often the module fires in a forward pass.
        parameters: number of parameters of the block there.
        flops: of the block in that forward pass; a multiply-add counts as 2.
        map_bytes: of the block's float32 attention weights for the largest of its maps if they are materialised;
            None for a block without attention weights.
    """

    name: str
    channels: int
    height: int
    width: int
    layout: Layout
    calls: int
    parameters: int
    flops: int
    map_bytes: int | None

    def __str__(self) -> str:
        size = f"{self.channels} x {self.height} x {self.width}"
        weights = "" if self.map_bytes is None else f"  weights {self.map_bytes / 1e6:.2f} MB"
        calls = "" if self.calls == 1 else f"  {self.calls} calls"
        return (
            f"{self.name:<32} {size:<16} {self.layout}  +{self.parameters:,} parameters  "
            f"{self.flops / 1e6:.1f} MFLOPs{weights}{calls}"
        )


@dataclass(frozen=True)
class Maps:
    """The maps one module puts out: channels, layout, and batch, height and width of each."""

    channels: int
    layout: Layout
    sizes: tuple[tuple[int, int, int], ...]


def sites(
    model: nn.Module,
    example_input: Any = None,
    *,
    block: BlockLike = "sagan",
    options: Mapping[str, Any] | None = None,
) -> list[Site]:
    """Every place of the model where `graft` would put the block, in the order of `named_modules`.

    Two names can mean one place: a stage and its last layer. The model is run once, in eval mode, and left as it
    was. `example_input` is as in `graft`.

    Raises:
        GraftError: no example_input, and none can be worked out; the model is compiled or wrapped.
        BlockError: an unknown block or option, or options that the block refuses for every place.
    """
    check_open(model, "")
    check_block(block, options or {})
    if example_input is None:
        example_input = default_example(model)
    names = host_names(model)
    firings = probe(model, example_input, {name: model.get_submodule(name) for name in names})
    costs: dict[Maps, tuple[int, int, int | None] | BlockError] = {}
    found = []
    for name in names:
        anchor_name, _ = anchor_of(model, name)
        try:
            check_anchor(model, anchor_name)
            maps = maps_of(name, firings[anchor_name], map_size(example_input))
            check_calls(name, firings[name], anchor_name, firings[anchor_name])
        except GraftError:
            continue  # not a place for a block; `graft` says why when asked for it by name
        if maps not in costs:
            costs[maps] = _cost(block, maps, options or {})
        cost = costs[maps]
        if not isinstance(cost, BlockError):
            _, height, width = maps.sizes[0]
            found.append(Site(name, maps.channels, height, width, maps.layout, len(maps.sizes), *cost))
    refused = [cost for cost in costs.values() if isinstance(cost, BlockError)]
    if refused and not found:
        raise refused[0]
    return found


def maps_of(name: str, firing: Firing, image_size: tuple[int, int] | None) -> Maps:
    """What a block at `name` would be given.

    Raises:
        GraftError: no block can go there: the module never fired, puts out something else than one image-shaped
            float tensor, or fires with several channel counts or layouts.
    """
    if not firing.calls:
        raise GraftError(
            f"module {name!r} never fires in a forward pass, so a block there would be dead; choose the module that "
            "contains it or another one"
        )
    if firing.others:
        raise GraftError(f"module {name!r} puts out {firing.others[0]}; a block needs one image-shaped float tensor")
    flat = [shape for shape in firing.shapes if len(shape) != 4]
    if flat:
        raise GraftError(f"module {name!r} puts out a tensor of shape {flat[0]}; a block needs a map of 4 dimensions")
    layouts: list[Layout] = [_layout(shape, image_size) for shape in firing.shapes]
    channels = [
        shape[1] if layout == "NCHW" else shape[3] for shape, layout in zip(firing.shapes, layouts, strict=True)
    ]
    if len(set(channels)) > 1 or len(set(layouts)) > 1:
        counts = ", ".join(map(str, channels))
        raise GraftError(
            f"module {name!r} fires {firing.calls} times a forward pass, with {counts} channels: one module used in "
            "several places. Choose a module that is used once, such as the block around it"
        )
    sizes = [(s[0], s[2], s[3]) if layouts[0] == "NCHW" else (s[0], s[1], s[2]) for s in firing.shapes]
    return Maps(channels[0], layouts[0], tuple(sizes))


def check_calls(site: str, own: Firing, anchor_name: str, anchor: Firing) -> None:
    """Raise `GraftError` if the module that a hook for `site` belongs on also fires outside of the site."""
    if own.calls and own.calls != anchor.calls:
        raise GraftError(
            f"site {site!r} fires {own.calls} times a forward pass, but {anchor_name!r}, the last module in it, "
            f"{anchor.calls} times: it is used in several places. Choose a module that is used once"
        )


def _layout(shape: tuple[int, ...], image_size: tuple[int, int] | None) -> Layout:
    """Whether a map is [B, C, H, W] or [B, H, W, C]: its two sides must be to each other as the image's are.

    Where both fit (C = H = W, or an image size that is not known) it is taken as the usual [B, C, H, W].
    """
    _, a, b, c = shape
    height, width = image_size or (1, 1)

    def error(h: int, w: int) -> float:
        return abs(h * width - w * height) / max(h * width, w * height, 1)

    return "NHWC" if error(a, b) + 0.1 < error(b, c) else "NCHW"


def _cost(block: BlockLike, maps: Maps, options: Mapping[str, Any]) -> tuple[int, int, int | None] | BlockError:
    """Parameters, FLOPs and bytes of weights of a block on such maps; what the block says if it refuses them."""
    from torch.utils.flop_counter import FlopCounterMode

    try:
        module = build_block(block, maps.channels, options, seed=0, device=torch.device("meta"))
    except BlockError as error:
        return error
    with quiet(module), FlopCounterMode(display=False) as counter:
        for batch, height, width in maps.sizes:
            module(torch.empty(batch, maps.channels, height, width, device="meta"))
    shape_of: Callable[[int, int], Sequence[int]] | None = getattr(module, "attention_shape", None)
    map_bytes = None
    if shape_of is not None:
        map_bytes = max(4 * batch * math.prod(shape_of(h, w)) for batch, h, w in maps.sizes)
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops(), map_bytes
