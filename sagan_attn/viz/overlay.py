"""One image with the attention of one position laid over it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
) -> "Figure":
    """Images as they are, and below each, in grey, under the attention of one position of its map.

    images: uint8 [3, H, W]; weights: [h, w], one query's weights over the map's cells; queries: (row, column) of that
    cell on the map, marked by a cross. Cells are stretched to the image: cell (i, j) of an h x w map covers pixels
    i*H/h to (i+1)*H/h.
    """
    from matplotlib.figure import Figure

    count = len(images)
    figure = Figure(figsize=(1.9 * count + 0.9, 4.2), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    top = max(float(weight.max()) for weight in weights)
    for column, (image, weight, (row, col)) in enumerate(zip(images, weights, queries, strict=True)):
        _, height, width = image.shape
        picture = image.permute(1, 2, 0).cpu().numpy()
        extent = (0, width, height, 0)
        x, y = (col + 0.5) * width / weight.shape[1], (row + 0.5) * height / weight.shape[0]
        axes[0, column].imshow(picture, extent=extent)
        grey = torch.from_numpy(picture).float().mean(dim=-1).numpy()
        axes[1, column].imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=255)
        axes[1, column].imshow(
            weight.float().cpu().numpy(),
            extent=extent,
            cmap="viridis",
            interpolation="nearest",
            alpha=0.65,
            vmin=0,
            vmax=top,
        )
        for axis in axes[:, column]:
            axis.plot(x, y, marker="x", color="white", markersize=9, markeredgewidth=3.5)
            axis.plot(x, y, marker="x", color="black", markersize=8, markeredgewidth=1.5)
            axis.set_xticks([])
            axis.set_yticks([])
        if titles is not None:
            axes[0, column].set_title(titles[column], fontsize=10)
    figure.colorbar(axes[1, 0].images[-1], ax=axes[1, :].tolist(), label="attention weight", shrink=0.9)
    figure.suptitle(title, fontsize=11)
    return figure
