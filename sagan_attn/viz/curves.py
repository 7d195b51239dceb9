"""How gammas and figures of heads went over a training, from the logs of a run."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagan_attn.errors import CheckpointError
from sagan_attn.viz.draw import COLOURS, plain, style
from sagan_attn.viz.head_figures import UNITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["has_curves", "training_curves"]

MARKERS = "osD^vP*"
Curve = tuple[list[float], list[float]]


def training_curves(metrics: Path) -> "Figure":
    """Gamma of each graft, and each figure that `AttentionLog` left in a run's metrics.csv, over the epochs.

    Raises:
        CheckpointError: the file is missing, no CSV with a column "epoch", or has no such columns.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    groups = _groups(metrics)
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    labels = list(dict.fromkeys(label for curves in groups.values() for label in curves))  # alike in every panel
    handles: dict[str, Any] = {}
    with style():
        figure = Figure(
            figsize=(3.4 * columns + 0.6, 2.5 * rows + 0.6 + 0.16 * -(-len(labels) // columns)), layout="constrained"
        )
        panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
        for axes in panels[len(groups) :]:
            axes.set_axis_off()
        for axes, (name, curves) in zip(panels, groups.items(), strict=False):
            for label, (epochs, values) in curves.items():
                place = labels.index(label)
                (handles[label],) = axes.plot(
                    epochs,
                    values,
                    color=COLOURS[place % len(COLOURS)],
                    marker=MARKERS[place % len(MARKERS)],
                    markersize=3.5,
                    linewidth=1.4,
                )
            axes.set_title(name.replace("_", " "))
            axes.set_xlabel("epochs trained")
            axes.set_ylabel(UNITS.get(name, name.replace("_", " ")))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(visible=True, linewidth=0.3)
        figure.legend(
            [handles[label] for label in labels],
            [plain(label, 40) for label in labels],
            loc="outside lower center",
            ncols=columns,
            fontsize=7,
            frameon=False,
        )
        figure.suptitle(f"Attention over training: {plain(metrics.resolve().parent.name)}", fontsize=11)
    return figure


def has_curves(metrics: Path) -> bool:
    """Whether `training_curves` finds anything in a file."""
    try:
        return bool(_groups(metrics))
    except (CheckpointError, ValueError, OSError, csv.Error):
        return False


def _groups(metrics: Path) -> dict[str, dict[str, Curve]]:
    """Figure -> curve of each graft or head, from columns "gamma/<path>" and "attention/<figure>/<path>/head<i>"."""
    if not metrics.is_file():
        raise CheckpointError(f"there is no {metrics}: name the metrics.csv of a run folder")
    with metrics.open(encoding="utf-8", newline="") as file:
        rows: Sequence[dict[str, str]] = list(csv.DictReader(file))
    groups: dict[str, dict[str, Curve]] = {}
    for column in rows[0] if rows and "epoch" in rows[0] else ():
        kind, _, rest = column.partition("/")
        name, _, label = ("gamma", "", rest) if kind == "gamma" else rest.partition("/")
        if kind not in ("gamma", "attention") or not label:
            continue
        known = [(float(row["epoch"]) + 1, float(row[column])) for row in rows if row.get(column)]
        if known:
            groups.setdefault(name, {})[label] = ([epoch for epoch, _ in known], [value for _, value in known])
    if not groups:
        raise CheckpointError(f"{metrics} holds no gammas and no figures of attention by epoch")
    return groups
