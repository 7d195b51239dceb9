"""One page on one site: what it looks at, and what its heads do."""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from textwrap import fill
from typing import TYPE_CHECKING, Any

from sagan_attn.viz.draw import COLOURS, MAP, lay_over, mark, picture, plain, style
from sagan_attn.viz.head_figures import COLUMNS, HeadFigures, agreement, label
from sagan_attn.viz.look import Look
from sagan_attn.viz.page import data_url, page, text
from sagan_attn.viz.sheets import caption, check_queries, place_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["summary_figure", "summary_page"]

BARS = (
    ("entropy_share", "entropy / ln(keys)", 1.0),
    ("self_weight", "weight on the query's own key", None),
    ("distance", "distance, pixels (line: even weight)", None),
    ("query_independence", "query-independence", 1.0),
    ("importance", "importance (l2 norm 1)", 1.0),
)
SHOWN = 3  # images


def summary_figure(seen: Look, path: str, queries: Sequence[int]) -> "Figure":
    """Up to three images under the mean weight of all heads for a query each, and bars of the heads' figures."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    record, figures = seen.records[path], seen.figures(path)
    of_queries, of_keys = seen.cells(path)
    check_queries(queries, record.weights.shape[2], path)
    images = min(SHOWN, len(record.weights))
    with style():
        several = len(figures) > 1
        figure = Figure(figsize=(9.5, 6.0 if several else 4.3), layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15 if several else 0.4))
        above, below = halves
        panels = above.subplots(1, 2 * SHOWN, squeeze=False)[0]
        for axes in panels:
            axes.set_axis_off()
        for index in range(images):
            query = queries[index % len(queries)]
            weights = record.weights[index, :, query].mean(0)
            for axes, grey in zip(panels[2 * index : 2 * index + 2], (False, True), strict=True):
                axes.set_axis_on()
                picture(axes, seen.images[index], grey)
                mark(axes, of_queries, query)
            drawn = lay_over(axes, weights, of_keys, min(0.0, float(weights.min())), float(weights.max()))
            panels[2 * index].set_title(fill(plain(seen.captions[index], 44), 24), fontsize=8)
            axes.set_title(place_words(query, of_queries.size), fontsize=8)
            bar = above.colorbar(drawn, ax=list(panels[2 * index : 2 * index + 2]), location="bottom", fraction=0.06)
            bar.locator = MaxNLocator(4)
            bar.update_ticks()
            bar.ax.tick_params(labelsize=8)
            bar.set_label("attention weight, mean of heads", fontsize=8)
        if several:
            _bars(below, figures, record)
        else:
            _bars_of_one(below, figures[0])
        sizes = (
            " x ".join(map(str, record.query_size or ()))
            + " queries, "
            + " x ".join(map(str, record.key_size or ()))
            + " keys"
        )
        heads_words = f"{len(figures)} head{'s' * (len(figures) > 1)}"
        figure.suptitle(
            f"Attention at {plain(record.site)}: {heads_words}, {sizes}, {seen.images_words}",
            fontsize=11,
        )
        caption(figure, seen.rim)
    return figure


def _bars_of_one(below: Any, one: HeadFigures) -> None:
    """The figures of the only head in one chart, and its distance, in pixels, beside it. Its importance is always 1."""
    shares = [(words, getattr(one, name)) for name, words, _ in BARS if name not in ("distance", "importance")]
    distance = [(words, one.distance) for name, words, _ in BARS if name == "distance"]
    for axes, bars in zip(below.subplots(1, 2, width_ratios=(3, 2)), (shares, distance), strict=True):
        known = [(words, value) for words, value in bars if not math.isnan(value)]
        if not known:
            axes.set_axis_off()
            continue
        drawn = axes.barh([words for words, _ in known], [value for _, value in known], color=COLOURS[0], height=0.6)
        axes.bar_label(drawn, [f"{value:.3g}" for _, value in known], padding=2, fontsize=8)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.tick_params(labelsize=8)
        if bars is shares:
            axes.set_xlim(min(0.0, *(value for _, value in known)), 1.15)
        else:
            axes.set_yticks([])
            axes.set_title(known[0][0], fontsize=8)
            axes.axvline(one.distance_even, color=COLOURS[1], linestyle="--", linewidth=1.2)
            axes.set_xlim(0, 1.25 * max(one.distance, one.distance_even))


def _bars(below: Any, figures: Sequence[HeadFigures], record: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    values = {name: [getattr(one, name) for one in figures] for name, _, _ in BARS}
    known = [bar for bar in BARS if not all(math.isnan(value) for value in values[bar[0]])]
    panels = below.subplots(2, 3, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for place, (name, words, top) in enumerate(known):
        axes = panels[place]
        axes.set_axis_on()
        heads = range(len(figures))
        axes.bar(heads, values[name], color=COLOURS[0], width=0.6)
        for head, value in enumerate(values[name]):
            if not math.isnan(value) and len(figures) <= 8:
                axes.annotate(
                    f"{value:.3g}", (head, max(value, 0)), (0, 2), textcoords="offset points", ha="center", fontsize=7
                )
        if name == "distance":
            axes.axhline(figures[0].distance_even, color=COLOURS[1], linestyle="--", linewidth=1.2)
        axes.margins(y=0.18)
        if top:
            axes.set_ylim(0, top * 1.15)
        axes.set_xlim(-0.6, max(len(figures), 3) - 0.4)
        axes.set_xticks(heads if len(figures) <= 8 else [])
        axes.set_title(words, fontsize=8)
        axes.set_xlabel("head", fontsize=8)
        axes.tick_params(labelsize=8)
    axes = panels[5]
    axes.set_axis_on()
    drawn = axes.imshow(agreement(record).cpu().numpy(), cmap=MAP, vmin=0, vmax=1)
    below.colorbar(drawn, ax=axes, label="1 - total variation")
    axes.set_title("agreement of heads", fontsize=8)
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("head", fontsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def summary_page(seen: Look, path: str, queries: Sequence[int]) -> str:
    """The figure and a table of the heads as one HTML page."""
    record = seen.records[path]
    out = io.BytesIO()
    with style():
        summary_figure(seen, path, queries).savefig(out, format="png", dpi=130)
    shown = [name for name in COLUMNS if name not in ("site", "path", "images", "queries", "keys")]
    rows = [
        "<tr>" + "".join(f"<td>{text(_number(asdict(one)[name]))}</td>" for name in shown) + "</tr>"
        for one in seen.figures(path)
    ]
    heads = "".join(f'<th scope="col" title="{text(COLUMNS[name])}">{text(label(name))}</th>' for name in shown)
    meanings = "".join(f"<dt>{text(label(name))}</dt><dd>{text(COLUMNS[name])}</dd>" for name in shown)
    first = seen.figures(path)[0]
    body = [
        f"<h1>Attention at {text(record.site)}</h1>",
        f'<p class="dim">{text(record.path)}: {text(seen.images_words)}, {first.queries} queries and '
        f"{first.keys} keys each. Pixels are those of the image as the model saw it.</p>",
        f'<figure><img alt="Images under the attention of a query, and bars of the figures below" '
        f'src="{data_url("image/png", out.getvalue())}"></figure>',
        "<h2>Heads</h2>",
        f'<div class="wide" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>',
        *rows,
        "</tbody></table></div>",
        f"<h2>What the columns say</h2><dl>{meanings}</dl>",
    ]
    return page(f"Attention at {record.site}", body)


def _number(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3g}"
    return str(value)
