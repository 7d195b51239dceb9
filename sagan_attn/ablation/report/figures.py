"""The figures of a report. matplotlib is imported when the first one is drawn; nothing is shown or saved.

Colours are Okabe and Ito's, which the colour-blind tell apart; kinds differ in line and marker too, for print.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sagan_attn.ablation.analysis import Analysis, Group
from sagan_attn.ablation.comparisons import Row
from sagan_attn.ablation.report.columns import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "image_files"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
BASELINE = "#000000"
CONTROL_DASHES = (0, (4, 2))
CURVES = 8  # variants with curves in one panel
WIDTH = 7.5  # inches
LEAST_SPAN = 0.01  # of an axis of cost, as a share of the cost: less is no difference worth a spread
COSTS = (
    ("parameters", "parameters", ""),
    ("flops", "FLOPs of an image", ""),
    ("images_per_second", "images/s in training", ""),
    ("peak_bytes", "peak memory", "B"),
)
SPLITS = {"screen": "validation", "confirm": "test"}
RC: Any = {
    "text.parse_math": False,
    "text.usetex": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "sagan_attn",
    "font.size": 9,
}


@dataclass(frozen=True)
class Style:
    """How a variant looks in every figure."""

    colour: str
    marker: str
    dashes: Any


def draw(analysis: Analysis) -> "dict[str, Figure]":
    """Every figure that the results allow, by name: forest, curves and gamma by stage, cost by stage and budget."""
    import matplotlib as mpl

    styles = _styles(analysis)
    figures: dict[str, Figure] = {}
    with mpl.rc_context(RC):
        for stage in dict.fromkeys(group.stage for group in analysis.groups):
            groups = analysis.stage(stage)
            figures[f"forest-{stage}"] = _forest(groups, styles)
            if any(cell.curves for group in groups for cell in group.cells):
                figures[f"curves-{stage}"] = _lines(groups, styles, "val/accuracy", "validation accuracy (%)", 100)
            if any(row.gammas for group in groups for row in group.rows):
                figures[f"gamma-{stage}"] = _lines(groups, styles, "gamma/", "gamma", 1)
            for index, group in enumerate(groups):
                if any(row.mean is not None for row in group.rows):
                    more = f"-{index}" if group.beside else ""
                    figures[f"cost-{stage}-{group.budget}{more}"] = _cost(group, styles)
    return figures


def image_files(figure: "Figure") -> dict[str, bytes]:
    """The figure as "png" and "svg"; the same figure gives the same bytes."""
    import matplotlib as mpl

    files = {}
    with mpl.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in a script that the font does not have
        for kind in ("png", "svg"):
            out = io.BytesIO()
            figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            files[kind] = out.getvalue()
            figure.set_layout_engine("none")  # places are as computed for the first
    return files


def _styles(analysis: Analysis) -> dict[str, Style]:
    rows = {row.variant.name: row for group in analysis.groups for row in group.rows}
    styles, place = {}, 0
    for name, row in rows.items():
        if row.variant.kind == "baseline":
            styles[name] = Style(BASELINE, "s", "-")
        else:
            dashes = CONTROL_DASHES if row.variant.kind == "control" else "-"
            styles[name] = Style(COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], dashes)
            place += 1
    return styles


def _label(row: Row) -> str:
    """matplotlib leaves labels with a leading underscore out of legends."""
    label = "".join(letter if letter.isprintable() else " " for letter in row.variant.label)
    return (" " if label.startswith("_") else "") + (label if len(label) <= 48 else f"{label[:47]}…")


def _stage_words(stage: str) -> str:
    return "Screen, not to be quoted" if stage == "screen" else "Confirmed"


def _forest(groups: Sequence[Group], styles: Mapping[str, Style]) -> "Figure":
    """Paired differences with both intervals; full marks are distinguishable."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = [[row for row in group.rows if row.variant.name != group.baseline] for group in groups]
    heights = [max(1, len(rows)) + 1.2 for rows in shown]
    figure = Figure(figsize=(WIDTH, 0.32 * sum(heights) + 1.3), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, group, rows in zip(panels, groups, shown, strict=True):
        axes.axvline(0, color="#666666", linewidth=1)
        for place, row in enumerate(rows):
            colour, marker = styles[row.variant.name].colour, styles[row.variant.name].marker
            if row.difference is None:
                axes.annotate(row.why_none, (0, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
                continue
            _bar(axes, row.difference, place - 0.1, colour, 2.0)
            if row.images is not None:
                _bar(axes, row.images, place + 0.18, "#777777", 0.8)
            seen = row.outcome in ("gain", "harm")
            axes.plot(
                100 * row.difference.mean,
                place - 0.1,
                marker,
                color=colour,
                markerfacecolor=colour if seen else "white",
                markersize=6,
                zorder=3,
            )
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
        axes.set_ylim(max(1, len(rows)) - 0.4, -0.6)
        axes.grid(visible=True, axis="x", linewidth=0.3)
        axes.set_title(f"{group.title}: against {_label(group.rows[0])}", fontsize=9, loc="left")
    panels[-1].set_xlabel(f"difference of {SPLITS[groups[0].stage]} accuracy, percentage points")
    handles = [
        Line2D([], [], color="#333333", linewidth=2),
        Line2D([], [], color="#777777", linewidth=0.8),
        Line2D([], [], color="#333333", marker="o", linestyle="none"),
        Line2D([], [], color="#333333", marker="o", markerfacecolor="white", linestyle="none"),
    ]
    words = ["95 % t, new seeds", "95 % bootstrap, new seeds and images", "distinguishable", "not distinguishable"]
    figure.legend(handles, words, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(f"{_stage_words(groups[0].stage)}: paired differences", fontsize=11)
    return figure


def _bar(axes: "Axes", of: Any, place: float, colour: str, width: float) -> None:
    axes.plot([100 * of.low, 100 * of.high], [place, place], color=colour, linewidth=width, solid_capstyle="butt")


def _panels(count: int, height: float) -> "tuple[Figure, list[Axes]]":
    """Up to two side by side."""
    from matplotlib.figure import Figure

    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 1.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _lines(groups: Sequence[Group], styles: Mapping[str, Style], key: str, unit: str, factor: float) -> "Figure":
    """Mean over seeds and a band of a standard deviation, by epoch. key: of the curves; ending in "/", a prefix."""
    from matplotlib.ticker import MaxNLocator

    figure, panels = _panels(len(groups), 2.9)
    handles: dict[str, Any] = {}
    for axes, group in zip(panels, groups, strict=True):
        rows, more = _chosen(group, key)
        for place, row in enumerate(rows):
            style = styles[row.variant.name]
            for index, name in enumerate(_names(row, key)):
                epochs, means, sds = _over_seeds(row, name, factor)
                (handle,) = axes.plot(
                    epochs,
                    means,
                    color=style.colour,
                    linestyle=style.dashes if index == 0 else ":",
                    linewidth=1.6,
                    marker=style.marker,
                    markersize=3 if len(epochs) <= 40 else 0,
                )
                if len(epochs) == 1:  # nothing to fill: bars side by side
                    beside = epochs + 0.05 * (place - (len(rows) - 1) / 2)
                    handle.set_xdata(beside)
                    axes.errorbar(beside, means, sds, color=style.colour, linewidth=1, capsize=2)
                else:
                    axes.fill_between(epochs, means - sds, means + sds, color=style.colour, alpha=0.15, linewidth=0)
                handles.setdefault(_label(row), handle)
        note = f"; {more} variants not drawn" if more else ""
        axes.set_title(f"{group.title}{note}", fontsize=9, loc="left")
        axes.set_xlabel("epochs trained")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if group.budget == 1:
            axes.set_xlim(0.5, 1.5)
            axes.set_xticks([1])
        axes.grid(visible=True, linewidth=0.3)
        if key.endswith("/"):
            axes.axhline(0, color="#666666", linewidth=0.8)
    for axes in panels[::2]:
        axes.set_ylabel(unit)
    _legend(figure, handles)
    figure.suptitle(f"{_stage_words(groups[0].stage)}: {unit.split(' (')[0]}, mean ± sd over seeds", fontsize=11)
    return figure


def _legend(figure: "Figure", handles: Mapping[str, Any]) -> None:
    if handles:
        longest = max(map(len, handles))
        columns = 4 if longest < 20 else 3 if longest < 30 else 2
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=columns,
            fontsize=8,
            frameon=False,
            handlelength=3,
        )


def _names(row: Row, key: str) -> list[str]:
    """Curves of a row of that key or prefix."""
    if not key.endswith("/"):
        return [key]
    return list(dict.fromkeys(n for c in row.cells for epoch in c.curves for n in epoch if n.startswith(key)))


def _chosen(group: Group, key: str) -> tuple[list[Row], int]:
    """Rows that have such a curve: all, or the baseline, the strongest control and the best; and how many are left."""
    rows = [row for row in group.rows if any(n in e for c in row.cells for e in c.curves for n in _names(row, key))]
    if len(rows) <= CURVES:
        return rows, 0
    first = [row for row in rows if row.variant.name in (group.baseline, group.strongest)]
    rest = [row for row in rows if row not in first]
    others = sorted(rest, key=lambda row: -1.0 if row.mean is None else row.mean)[::-1][: CURVES - len(first)]
    return [row for row in rows if row in first or row in others], len(rows) - CURVES


def _over_seeds(row: Row, name: str, factor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs trained, means and standard deviations [epochs] over the runs that have the value."""
    values: dict[float, list[float]] = {}
    for cell in row.cells:
        for index, epoch in enumerate(cell.curves):
            if name in epoch:
                values.setdefault(epoch.get("epoch", index) + 1, []).append(factor * epoch[name])
    epochs = sorted(values)
    sds = [np.std(values[epoch], ddof=1) if len(values[epoch]) > 1 else 0.0 for epoch in epochs]
    return np.array(epochs), np.array([np.mean(values[epoch]) for epoch in epochs]), np.array(sds)


def _cost(group: Group, styles: Mapping[str, Style]) -> "Figure":
    """Accuracy against parameters, FLOPs, speed and memory."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    known = [cost for cost in COSTS if any(cost[0] in row.cost and row.mean is not None for row in group.rows)]
    figure, panels = _panels(max(1, len(known)), 2.5)
    handles: dict[str, Any] = {}
    for axes, (name, words, unit) in zip(panels, known, strict=False):
        for row in group.rows:
            if row.mean is not None and name in row.cost:
                style = styles[row.variant.name]
                bar = axes.errorbar(
                    row.cost[name],
                    100 * row.mean,
                    yerr=100 * (row.sd or 0.0),
                    color=style.colour,
                    marker=style.marker,
                    markerfacecolor="white" if row.variant.kind == "control" else style.colour,
                    markersize=6,
                    linestyle="none",
                    elinewidth=0.8,
                    capsize=2,
                )
                handles.setdefault(_label(row), bar)
        low, high = axes.get_xlim()
        middle = (low + high) / 2
        if high - low < LEAST_SPAN * middle:
            axes.set_xlim(middle * (1 - LEAST_SPAN / 2), middle * (1 + LEAST_SPAN / 2))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: short_number(value, unit, 5)))
        axes.set_xlabel(words)
        axes.grid(visible=True, linewidth=0.3)
    for axes in panels[::2]:
        axes.set_ylabel(f"{SPLITS[group.stage]} accuracy (%)")
    _legend(figure, handles)
    figure.suptitle(f"{group.title}: accuracy (mean ± sd of a run) against cost", fontsize=11)
    return figure
