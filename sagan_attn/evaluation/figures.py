"""Pictures of scores: the confusion matrix and the reliability diagram."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sagan_attn.evaluation.scores import Scores
from sagan_attn.viz.draw import COLOURS, MAP, plain, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["confusion_figure", "reliability_figure"]

WITH_COUNTS, WITH_NAMES = 20, 60  # classes
FEW = 10  # images of a bin


def confusion_figure(scores: Scores, classes: Sequence[str]) -> "Figure":
    """The confusion matrix: colours are shares of the true class, numbers are images.

    With more than 20 classes no numbers are written but those of the images of a class, beside its name; with more
    than 60 no names: the CSV has both.
    """
    from matplotlib.figure import Figure

    count = len(classes)
    totals = scores.confusion.sum(axis=1, keepdims=True)
    shares = np.divide(scores.confusion, totals, out=np.zeros(scores.confusion.shape), where=totals > 0)
    side = min(14.0, 3.2 + 0.42 * count if count <= WITH_COUNTS else 4.0 + 0.2 * count)
    with style():
        figure = Figure(figsize=(side + 1.0, side), layout="compressed")
        axes = figure.subplots()
        drawn = axes.imshow(shares, cmap=MAP, vmin=0, vmax=1)
        figure.colorbar(drawn, ax=axes, label="share of the true class", fraction=0.05)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        if count <= WITH_NAMES:
            names, size = [plain(name, 24) for name in classes], 8 if count <= WITH_COUNTS else 6
            axes.set_xticks(range(count), names, rotation=90, fontsize=size)
            if count > WITH_COUNTS:
                names = [f"{name} ({images:,})" for name, images in zip(names, totals[:, 0], strict=True)]
                axes.set_ylabel("true class (its images)")
            axes.set_yticks(range(count), names, fontsize=size)
        if count <= WITH_COUNTS:
            for (row, column), images in np.ndenumerate(scores.confusion):
                if images:
                    colour = "black" if shares[row, column] > 0.6 else "white"
                    axes.text(column, row, f"{images:,}", ha="center", va="center", color=colour, fontsize=6)
        axes.set_title(
            f"{scores.images:,} images, {_range(totals)} a class\n"
            f"accuracy {scores.accuracy:.3f}, balanced {scores.balanced_accuracy:.3f}"
        )
    return figure


def _range(totals: np.ndarray) -> str:
    low, high = totals.min(), totals.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def reliability_figure(scores: Scores) -> "Figure":
    """Accuracy against confidence, bin by bin (Niculescu-Mizil and Caruana, 2005), above how many images lie where.

    Bins of fewer than 10 images are pale and hatched: their accuracy says little.
    """
    from matplotlib.figure import Figure

    filled = [one for one in scores.bins if one.images]
    middles = [(one.low + one.high) / 2 for one in filled]
    width = scores.bins[0].high - scores.bins[0].low
    with style():
        figure = Figure(figsize=(4.6, 5.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        above.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--", label="calibrated")
        bars = above.bar(middles, [one.accuracy for one in filled], width, color=COLOURS[5], edgecolor="white")
        few = [bar for bar, one in zip(bars, filled, strict=True) if one.images < FEW]
        for bar in few:
            bar.set(facecolor="#e6f3fb", edgecolor=COLOURS[5], hatch="///")
        if few:
            few[0].set_label(f"fewer than {FEW} images")
        above.plot(
            [one.confidence for one in filled],
            [one.accuracy for one in filled],
            "o",
            color=COLOURS[1],
            clip_on=False,  # at 0 and 1
            zorder=3,
        )
        above.set_ylabel("accuracy")
        above.set_ylim(0, 1)
        above.set_xlim(0, 1)
        above.legend(loc="upper left", frameon=False)
        below.bar(middles, [one.images for one in filled], width, color=COLOURS[5], edgecolor="white")
        below.set_ylabel("images")
        below.set_xlabel("confidence: the largest probability (points: mean of a bin)")
        above.set_title(f"calibration error {scores.calibration_error:.3f}, NLL {scores.nll:.3f}")
    return figure
