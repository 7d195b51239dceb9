"""Results as pictures. matplotlib is imported when the first one is drawn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sagan_attn.bench.block import Measured
from sagan_attn.bench.floor import Ceilings
from sagan_attn.bench.machine import summary
from sagan_attn.bench.peers import OURS, PEERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["block_figure", "dot_figure", "line"]

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
MARKERS = "osv^D*PX<>p"


def line(axes: "Axes", name: str, xs: Sequence[float], values: Sequence[Sequence[float]], label: str) -> None:
    """Medians against x, log-log, with bars from the smallest to the largest."""
    place = list(PEERS).index(name)
    medians, lows, highs = zip(*((s["median"], s["min"], s["max"]) for s in map(summary, values)), strict=True)
    bars = [
        [m - low for m, low in zip(medians, lows, strict=True)],
        [high - m for m, high in zip(medians, highs, strict=True)],
    ]
    axes.errorbar(
        xs,
        medians,
        yerr=bars,
        label=label,
        color=COLOURS[place % len(COLOURS)],
        marker=MARKERS[place % len(MARKERS)],
        linestyle={"ours": "-", "same form": "--", "other form": ":"}[PEERS[name].kind],
        linewidth=2 if name == OURS else 1.2,
        markersize=4,
        elinewidth=0.6,
        capsize=1.5,
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(visible=True, which="major", linewidth=0.3)


def block_figure(results: Sequence[Measured], ceilings: Ceilings, title: str) -> "Figure":
    """Time over the floor against the number of positions: a panel for each number of channels, dtype and pass."""
    from matplotlib.figure import Figure

    columns = sorted({r.case.channels for r in results})
    kinds = list(dict.fromkeys((r.case.dtype, r.case.backward) for r in results))
    figure = Figure(figsize=(3.6 * len(columns) + 2.4, 2.9 * len(kinds) + 0.8), layout="constrained")
    panels = figure.subplots(len(kinds), len(columns), squeeze=False)
    shown: dict[str, Any] = {}
    for row, (dtype, backward) in enumerate(kinds):
        for column, channels in enumerate(columns):
            axes = panels[row, column]
            here = [
                r for r in results if (r.case.channels, r.case.dtype, r.case.backward) == (channels, dtype, backward)
            ]
            here.sort(key=lambda r: r.case.positions)
            for name in PEERS:
                measured = [r for r in here if name in r.seconds]
                if measured:
                    xs = [r.case.positions for r in measured]
                    line(
                        axes, name, xs, [[s / ceilings.floor(r.case) for s in r.seconds[name]] for r in measured], name
                    )
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                shown.setdefault(label, handle)
            axes.axhline(1, color="#888888", linewidth=1)
            axes.set_title(f"{channels} channels, {dtype}, {'forward+backward' if backward else 'forward'}", fontsize=9)
            if row == len(kinds) - 1:
                axes.set_xlabel("positions N = H x W")
            if column == 0:
                axes.set_ylabel("time over the floor (1 = floor)")
    figure.legend(shown.values(), shown.keys(), loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def dot_figure(groups: Mapping[str, Mapping[str, Sequence[float]]], unit: str, title: str) -> "Figure":
    """A line for each of the named readings of each group: the median, and a bar from the smallest to the largest."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    lines = [(group, name, summary(values)) for group, ways in groups.items() for name, values in ways.items()]
    figure = Figure(figsize=(7.5, 0.4 * len(lines) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, (_, name, of) in enumerate(lines):
        reach = [[of["median"] - of["min"]], [of["max"] - of["median"]]]
        colour, marker = COLOURS[names.index(name) % len(COLOURS)], MARKERS[names.index(name) % len(MARKERS)]
        axes.errorbar(of["median"], place, xerr=reach, color=colour, marker=marker, capsize=3)
    axes.set_yticks(range(len(lines)), [f"{group}: {name}" for group, name, _ in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(visible=True, which="both", axis="x", linewidth=0.3)
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=11)
    return figure
