"""Sheets: images with the attention of query positions laid over them, and the weights of every head as a matrix."""

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from sagan_attn.errors import GraftError
from sagan_attn.viz.draw import MAP, lay_over, mark, picture, plain, style
from sagan_attn.viz.head_figures import agreement
from sagan_attn.viz.look import Look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["attention_sheet", "head_matrices"]

ROWS = 40


def attention_sheet(seen: Look, path: str, queries: Sequence[int]) -> "Figure":
    """A row for each image and query: the image with the query marked, then a panel for each head.

    Weights lie on the pixels that their keys cover, in one scale a row, from 0 (or the least weight, below it) to the
    largest of the row. queries: positions row * W + column on the map of queries.

    Raises:
        GraftError: no queries, one outside of the map, or more than 40 rows.
    """
    from matplotlib.figure import Figure

    record = seen.records[path]
    of_queries, of_keys = seen.cells(path)
    count, heads, total, _ = record.weights.shape
    check_queries(queries, total, path)
    rows = [(image, query) for image in range(count) for query in queries]
    if len(rows) > ROWS:
        raise GraftError(f"{count} images with {len(queries)} queries each make {len(rows)} rows; a sheet has {ROWS}")
    _, height, width = seen.images[0].shape
    side = 1.75
    with style():
        size = (side * (heads + 1) * max(1.0, width / height) + 1.1, side * max(1.0, height / width) * len(rows) + 1.0)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(rows), heads + 1, squeeze=False)
        for line, (image, query) in zip(panels, rows, strict=True):
            weights = record.weights[image, :, query]  # [h, M]
            low, high = min(0.0, float(weights.min())), float(weights.max())
            picture(line[0], seen.images[image])
            mark(line[0], of_queries, query)
            line[0].set_ylabel(fill(plain(seen.captions[image], 60), 26), fontsize=7)
            line[0].set_xlabel(f"query {place_words(query, of_queries.size)}", fontsize=8)
            drawn: Any = None
            for head, axes in enumerate(line[1:]):
                picture(axes, seen.images[image], grey=True)
                drawn = lay_over(axes, weights[head], of_keys, low, high)
                mark(axes, of_queries, query)
                axes.set_xlabel(f"largest {float(weights[head].max()):.3g}", fontsize=8)
            figure.colorbar(drawn, ax=list(line), label="attention weight", fraction=0.05, pad=0.01)
        panels[0, 0].set_title("image")
        for head, axes in enumerate(panels[0, 1:]):
            axes.set_title(f"head {head}")
        figure.suptitle(f"Attention at {plain(record.site)}: what a query (cross) looks at", fontsize=11)
        caption(figure, seen.rim)
    return figure


def head_matrices(seen: Look, path: str) -> "Figure":
    """The weights of each head as a matrix of queries and keys, means over images, and how far the heads agree."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    record = seen.records[path]
    assert record.query_size is not None
    assert record.key_size is not None
    mean = record.weights.mean(0).float().cpu()  # [h, N, M]
    heads = len(mean)
    total = heads + (heads > 1)
    rows = -(-total // 4)
    columns = -(-total // rows)
    with style():
        figure = Figure(figsize=(3.1 * columns + 0.4, 2.9 * rows + 0.7), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
        for axes in panels:
            axes.set_axis_off()
        for head, axes in enumerate(panels[:heads]):
            axes.set_axis_on()
            low, high = min(0.0, float(mean[head].min())), float(mean[head].max())
            drawn = axes.imshow(mean[head].numpy(), cmap=MAP, vmin=low, vmax=high, aspect="auto")
            figure.colorbar(drawn, ax=axes, label="weight, mean over images" if head % columns == columns - 1 else None)
            axes.set_title(f"head {head}")
            axes.set_xlabel(f"key position, row · {record.key_size[1]} + column")
            axes.set_ylabel(f"query position, row · {record.query_size[1]} + column")
        if heads > 1:
            axes = panels[heads]
            axes.set_axis_on()
            shares = agreement(record).cpu().numpy()
            drawn = axes.imshow(shares, cmap=MAP, vmin=0, vmax=1)
            figure.colorbar(drawn, ax=axes, label="1 - total variation")
            axes.set_title("agreement of heads")
            axes.set_xlabel("head")
            axes.set_ylabel("head")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True))
            for i, row in enumerate(shares if heads <= 8 else ()):
                for j, value in enumerate(row):
                    axes.text(
                        j,
                        i,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        color="black" if value > 0.6 else "white",
                        fontsize=7,
                    )
        figure.suptitle(f"Heads at {plain(record.site)}, {seen.images_words}", fontsize=11)
    return figure


def caption(figure: "Figure", words: str) -> None:
    """Small words below everything."""
    if words:
        figure.supxlabel(fill(words, int(17 * figure.get_figwidth())), fontsize=7)  # letters an inch


def place_words(query: int, size: tuple[int, int]) -> str:
    """Row and column of a position."""
    row, column = divmod(query, size[1])
    return f"row {row}, column {column}"


def check_queries(queries: Sequence[int], total: int, path: str) -> None:
    """Raise `GraftError` unless queries are positions of the map."""
    if not queries:
        raise GraftError("queries is empty: name at least one")
    for query in queries:
        if not 0 <= query < total:
            raise GraftError(f"query {query} must be a position of the map of {path!r}, from 0 to {total - 1}")
