"""What all pictures of attention share. matplotlib is imported when the first one is drawn; nothing is shown.

Weights are drawn in viridis, which grows in lightness throughout: the colour-blind and a grey print keep the order.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sagan_attn.errors import GraftError
from sagan_attn.files import write_whole
from sagan_attn.viz.cells import Cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "MAP", "lay_over", "mark", "picture", "plain", "save_figure", "style"]

MAP = "viridis"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
RC: Any = {
    "text.parse_math": False,
    "text.usetex": False,  # names would be programs
    "svg.fonttype": "path",
    "svg.hashsalt": "sagan_attn",
    "pdf.fonttype": 42,
    "font.size": 9,
    "axes.titlesize": 9,
    "image.interpolation": "nearest",
}
SUFFIXES = (".png", ".svg", ".pdf")


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures; names that a font does not have are drawn without a warning."""
    import matplotlib as mpl

    with mpl.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def save_figure(figure: "Figure", path: Path, dpi: int = 150) -> None:
    """Write a figure as a whole file, in the format of its suffix; figures drawn alike give the same bytes.

    Raises:
        GraftError: another suffix than .png, .svg and .pdf, or a folder that is missing or cannot be written.
    """
    check_output(path, SUFFIXES)
    stamps: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    out = io.BytesIO()
    with style():
        kind = path.suffix.lower()
        figure.savefig(out, format=kind[1:], dpi=dpi, metadata=stamps.get(kind))
    write_file(path, out.getvalue())


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Raise `GraftError` unless a file of one of these suffixes can be written there."""
    if path.suffix.lower() not in suffixes:
        raise GraftError(f"{str(path)!r} must end in {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise GraftError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into: make it first")


def write_file(path: Path, data: bytes) -> None:
    """Write a file as a whole. Raises `GraftError` where it cannot be written."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise GraftError(f"{str(path)!r} cannot be written: {error}") from error


def picture(axes: "Axes", image: Tensor, grey: bool = False) -> None:
    """An image uint8 [3, H, W], whose pixel p covers p to p + 1, without ticks."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    extent = (0, pixels.shape[1], pixels.shape[0], 0)
    if grey:
        axes.imshow(pixels.astype(np.float32).mean(axis=2), extent=extent, cmap="gray", vmin=0, vmax=255)
    else:
        axes.imshow(pixels, extent=extent)
    axes.set_xticks([])
    axes.set_yticks([])


def lay_over(axes: "Axes", weights: Tensor, cells: Cells, low: float, high: float, alpha: float = 0.65) -> Any:
    """Weights [M] over the pixels that their cells cover. Returns what a colour bar is made for."""
    values = weights.detach().float().cpu().reshape(cells.size).numpy()
    return axes.pcolormesh(
        np.array(cells.columns),
        np.array(cells.rows),
        values,
        cmap=MAP,
        vmin=low,
        vmax=high,
        alpha=alpha,
        linewidth=0,
        antialiased=False,
        rasterized=True,
    )


def mark(axes: "Axes", cells: Cells, query: int) -> None:
    """A query: a cross on the middle of its cell, and its border, in black on white."""
    row, column = divmod(query, cells.size[1])
    top, bottom = cells.rows[row : row + 2]
    left, right = cells.columns[column : column + 2]
    x, y = (left + right) / 2, (top + bottom) / 2
    box = ([left, right, right, left, left], [top, top, bottom, bottom, top])
    axes.plot(x, y, marker="x", color="white", markersize=8, markeredgewidth=3.2)
    axes.plot(x, y, marker="x", color="black", markersize=7, markeredgewidth=1.3)
    axes.plot(*box, color="white", linewidth=2.2)
    axes.plot(*box, color="black", linewidth=0.8)


def plain(text: object, limit: int = 48) -> str:
    """A name for a figure: without control characters, cut in the middle where it is long."""
    words = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return words if len(words) <= limit else f"{words[: limit // 2]}…{words[1 - limit // 2 :]}"
