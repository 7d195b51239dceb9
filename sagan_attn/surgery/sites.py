"""The places of a model where a block can go, and what one would cost there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, get_args, overload

from torch import nn

from sagan_attn.errors import BlockError, GraftError
from sagan_attn.surgery.build import BlockLike, check_block, check_mapping
from sagan_attn.surgery.cost import Budget, Cost, cost_of, flops_share, probe_flops
from sagan_attn.surgery.place import check_anchor, check_open
from sagan_attn.surgery.probe import Firing, Log, default_example, map_size
from sagan_attn.surgery.select import anchor_of, host_names
from sagan_attn.surgery.text import counted, short_number, text_table

__all__ = [
    "NUMBERS",
    "Maps",
    "Site",
    "Sites",
    "check_calls",
    "find_places",
    "maps_of",
    "sites",
    "sort_sites",
    "survey",
    "within",
]

Layout = Literal["NCHW", "NHWC"]
CHANNELS_FIRST = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)
SortBy = Literal["name", "flops", "parameters", "map_bytes", "positions", "resolution", "flops_share"]
# Headers of a table of sites, after the name.
NUMBERS = ("channels", "H x W", "layout", "calls", "parameters", "FLOPs", "of the host's", "map bytes")
COLUMNS = {"name": "<", **dict.fromkeys(NUMBERS, ">")}


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
        flops_share: FLOPs of the block over those of the whole model without it, in that forward pass.
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
    flops_share: float

    @property
    def positions(self) -> int:
        """N = height * width, of the queries."""
        return self.height * self.width

    def __str__(self) -> str:
        size = f"{self.channels} x {self.height} x {self.width}"
        weights = "" if self.map_bytes is None else f"  weights {self.map_bytes / 1e6:.2f} MB"
        calls = "" if self.calls == 1 else f"  {self.calls} calls"
        return (
            f"{self.name:<32} {size:<16} {self.layout}  +{self.parameters:,} parameters  "
            f"{self.flops / 1e6:.1f} MFLOPs ({self.flops_share:.1%}){weights}{calls}"
        )

    def row(self) -> list[str]:
        """The name and the cells under `NUMBERS`."""
        return [
            self.name,
            str(self.channels),
            f"{self.height} x {self.width}",
            self.layout,
            str(self.calls),
            f"{self.parameters:,}",
            short_number(self.flops),
            f"{self.flops_share:.2%}",
            "" if self.map_bytes is None else short_number(self.map_bytes),
        ]


class Sites(list[Site]):
    """A list of sites whose `repr` is a table; slices are of this class too."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> "Sites": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "Site | Sites":
        return Sites(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def __repr__(self) -> str:
        head = counted(len(self), "site")
        return f"{head}\n{text_table(COLUMNS, [site.row() for site in self])}" if self else head


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
    sort_by: SortBy | None = None,
    max_flops_share: float | None = None,
    max_map_bytes: float | None = None,
) -> Sites:
    """Every place of the model where `graft` would put the block, in the order of `named_modules`.

    Two names can mean one place: a stage and its last layer. The model is run once, in eval mode, and left as it
    was. `example_input` is as in `graft`.

    Args:
        model: the host; its FLOPs include those of grafts it has already.
        example_input: as in `graft`. FLOPs and bytes are for its batch and size.
        block: as in `graft`.
        options: of the block, by name.
        sort_by: smallest first by "flops", "parameters", "map_bytes" (none counts as 0), "positions" (also called
            "resolution") or "flops_share"; "name" or None for the order of the model, which is also that of equals.
        max_flops_share: leave out places where the block has more than this share of the model's FLOPs.
        max_map_bytes: leave out places where its attention weights take more bytes than this.

    Raises:
        GraftError: no example_input, and none can be worked out; the model is compiled or wrapped; an unknown
            sort_by or a limit that is no positive number.
        BlockError: an unknown block or option, or options that the block refuses for every place.
    """
    sort_sites([], sort_by)  # refuses what it does not know before the model is run
    budget = Budget(max_flops_share, max_map_bytes)
    found, _ = survey(model, example_input, block, options)
    return Sites(sort_sites(within(found, budget), sort_by))


def within(found: Sequence[Site], budget: Budget) -> list[Site]:
    """The sites where the block costs no more than it may."""
    return [site for site in found if not budget.excess(site.flops, site.flops_share, site.map_bytes)]


def sort_sites(found: Sequence[Site], sort_by: SortBy | None) -> list[Site]:
    """The sites sorted as `sites` does. Raises `GraftError` for an unknown `sort_by`."""
    if sort_by not in (None, *get_args(SortBy)):
        raise GraftError(f"sort_by ({sort_by!r}) must be one of {', '.join(get_args(SortBy))}")
    if sort_by is None or sort_by == "name":
        return list(found)
    key = "positions" if sort_by == "resolution" else sort_by
    return sorted(found, key=lambda site: getattr(site, key) or 0)


def survey(
    model: nn.Module, example_input: Any, block: BlockLike, options: Mapping[str, Any] | None
) -> tuple[list[Site], int]:
    """All sites in the order of the model, and the FLOPs of the model itself. Raises what `sites` raises."""
    check_open(model, "")
    check_mapping("options", {} if options is None else options)
    check_block(block, options or {})
    if example_input is None:
        example_input = default_example(model)
    names = host_names(model)
    firings, host_flops = probe_flops(model, example_input, {name: model.get_submodule(name) for name in names})
    costs: dict[Maps, Cost | BlockError] = {}
    found = []
    for name, maps in find_places(model, firings, map_size(example_input)).items():
        if maps not in costs:
            costs[maps] = cost_of(block, maps.channels, maps.sizes, options or {})
        cost = costs[maps]
        if not isinstance(cost, BlockError):
            _, height, width = maps.sizes[0]
            size = (maps.channels, height, width, maps.layout, len(maps.sizes))
            share = flops_share(cost, host_flops)
            found.append(Site(name, *size, cost.parameters, cost.flops, cost.map_bytes, share))
    refused = [cost for cost in costs.values() if isinstance(cost, BlockError)]
    if refused and not found:
        raise refused[0]
    return found, host_flops


def find_places(model: nn.Module, firings: Mapping[str, Firing], image_size: tuple[int, int] | None) -> dict[str, Maps]:
    """Name -> maps of each of the modules that `firings` are of where a block can go, whatever the block."""
    places = {}
    for name, firing in firings.items():
        anchor_name, _ = anchor_of(model, name)
        try:
            check_anchor(model, anchor_name)
            maps = maps_of(name, firings[anchor_name], image_size)
            check_calls(name, firing, anchor_name, firings[anchor_name])
        except GraftError:
            continue  # not a place for a block; `graft` says why when asked for it by name
        places[name] = maps
    return places


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
    layouts: list[Layout] = [_layout(firing, call, image_size) for call in range(len(firing.shapes))]
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


def _layout(firing: Firing, call: int, image_size: tuple[int, int] | None) -> Layout:
    """Whether a map is [B, C, H, W] or [B, H, W, C]: its two sides must be to each other as the image's are.

    Sides of a few pixels may fit the wrong way round: a map of the very shape that a convolution puts out is one of
    it. Where both fit (C = H = W), what the class of the module puts out elsewhere in the model decides. If that says
    nothing, so does the class of the last module before it with a map of the same shape. Without any such evidence
    it is taken as the usual [B, C, H, W].
    """
    shape = firing.shapes[call]
    before = firing.log[: firing.ends[call]] if firing.ends else []
    if certain := _fitting(shape, image_size):
        first = any(other == shape and issubclass(kind, CHANNELS_FIRST) for kind, other in before)
        return "NCHW" if first else certain
    for kind, other in reversed(before):
        if other == shape and (seen := _readings(kind, firing.log, image_size)):
            return "NHWC" if seen == {"NHWC"} else "NCHW"
    return "NCHW"


def _readings(kind: type[nn.Module], log: Log, image_size: tuple[int, int] | None) -> set[Layout]:
    """The layouts that maps of a class of modules certainly have."""
    if issubclass(kind, CHANNELS_FIRST):
        certain: set[Layout] = {"NCHW"}
        return certain
    found: set[Layout] = set()
    for other, shape in log:
        layout = _fitting(shape, image_size) if other is kind else None
        if layout is not None:
            found.add(layout)
    return found


def _fitting(shape: tuple[int, ...], image_size: tuple[int, int] | None) -> Layout | None:
    """The layout in which the sides of a map fit those of the image; None where both fit as well."""
    _, a, b, c = shape
    height, width = image_size or (1, 1)

    def error(h: int, w: int) -> float:
        return abs(h * width - w * height) / max(h * width, w * height, 1)

    difference = error(a, b) - error(b, c)
    if abs(difference) <= 0.1:
        return None
    return "NHWC" if difference < 0 else "NCHW"
