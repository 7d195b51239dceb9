"""Sheets of images with a line of words under each."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from torch import Tensor

from sagan_attn.viz.draw import picture, plain, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Picture", "answer", "image_sheet"]

COLUMNS = 6
SIDE = 1.7  # inches


@dataclass(frozen=True)
class Picture:
    """An image of a sheet.

    Args:
        image: uint8 [3, H, W].
        words: lines under it.
        colour: of its frame; None for no frame.
    """

    image: Tensor
    words: Sequence[str]
    colour: str | None = None


def answer(name: str, probability: float) -> str:
    """A class and its probability: "cat (98 %)"; "<1 %" and ">99 %" where rounding would make it none or certain."""
    if 0 < probability < 0.005:
        return f"{name} (<1 %)"
    return f"{name} (>99 %)" if 0.995 <= probability < 1 else f"{name} ({100 * probability:.0f} %)"


def image_sheet(pictures: Sequence[Picture], title: str) -> "Figure":
    """The pictures in rows of 6, in their order."""
    from matplotlib.figure import Figure

    columns = max(1, min(COLUMNS, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    lines = max((len(_wrapped(one.words)) for one in pictures), default=1)
    with style():
        width = SIDE * max(columns, 3) + 0.2
        words = fill(plain(title, 200), int(12 * width))  # letters an inch
        size = (width, (SIDE + 0.13 * lines) * rows + 0.33 + 0.17 * (words.count("\n") + 1))
        figure = Figure(figsize=size, layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
        for axes in panels[len(pictures) :]:
            axes.set_axis_off()
        for axes, one in zip(panels, pictures, strict=False):
            picture(axes, one.image)
            axes.set_xlabel("\n".join(_wrapped(one.words)), fontsize=6.5)
            if one.colour is not None:
                for spine in axes.spines.values():
                    spine.set_edgecolor(one.colour)
                    spine.set_linewidth(2)
        figure.suptitle(words, fontsize=10)
    return figure


def _wrapped(words: Sequence[str]) -> list[str]:
    return [line for one in words for line in fill(plain(one, 60), 30).splitlines() or [""]]
