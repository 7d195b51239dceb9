"""Several images, each with the attention of one position laid over it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sagan_attn.viz.cells import Cells, Places
from sagan_attn.viz.draw import lay_over, mark, picture, plain, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["attention_overlay"]


def attention_overlay(
    images: Sequence[Tensor],
    weights: Sequence[Tensor],
    queries: Sequence[tuple[int, int]],
    *,
    titles: Sequence[str] | None = None,
    title: str = "",
    cells: Cells | None = None,
) -> "Figure":
    """Images as they are, and below each, in grey, under the attention of one position of its map.

    images: uint8 [3, H, W]; weights: [h, w], one query's weights over the map's cells; queries: (row, column) of that
    cell on the map, marked by a cross and its border. cells: where the map lies in the images; None for one that is
    stretched over them, whose cell (i, j) covers pixels i*H/h to (i+1)*H/h.
    """
    from matplotlib.figure import Figure

    count = len(images)
    top = max(float(weight.max()) for weight in weights)
    with style():
        figure = Figure(figsize=(1.9 * count + 0.9, 4.2), layout="constrained")
        axes = figure.subplots(2, count, squeeze=False)
        for column, (image, weight, (row, col)) in enumerate(zip(images, weights, queries, strict=True)):
            places = cells or Places(image.shape[1], image.shape[2], ({}, {})).cells((len(weight), weight.shape[1]))
            above, below = axes[:, column]
            picture(above, image)
            picture(below, image, grey=True)
            drawn = lay_over(below, weight.flatten(), places, 0.0, top)
            for axis in (above, below):
                mark(axis, places, row * weight.shape[1] + col)
            if titles is not None:
                above.set_title(plain(titles[column]), fontsize=10)
        figure.colorbar(drawn, ax=axes[1, :].tolist(), label="attention weight", shrink=0.9)
        figure.suptitle(title, fontsize=11)
    return figure
