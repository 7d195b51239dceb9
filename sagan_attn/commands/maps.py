"""`python -m sagan_attn maps`: sheets of what attention looks at, and its figures."""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sagan_attn.commands.attention_images import add_image_arguments, look_at
from sagan_attn.commands.runs import run_folder
from sagan_attn.errors import GraftError, one_line

if TYPE_CHECKING:
    from sagan_attn.viz.head_figures import HeadFigures
    from sagan_attn.viz.look import Look

__all__ = ["add_arguments", "run"]

PARTS = (0.5, 0.5), (0.25, 0.25), (0.75, 0.75)  # of width and height, where queries lie by default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument(
        "--queries",
        nargs="+",
        type=point,
        metavar="X,Y",
        help="pixels of the image as the model sees it (default: the middle and two corners of the middle half)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="sheet.png, .svg or .pdf; beside it its -heads, -summary and -training, and .html, .csv, .json",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the sheets, print the table of heads. Returns 0, or 1 when an image was passed over as broken.

    Raises errors of the library for what is refused.
    """
    from sagan_attn.viz.curves import has_curves, training_curves
    from sagan_attn.viz.draw import SUFFIXES, check_output, save_figure, write_file
    from sagan_attn.viz.head_figures import as_json, csv_of
    from sagan_attn.viz.sheets import attention_sheet, head_matrices
    from sagan_attn.viz.site_summary import summary_figure, summary_page

    out: Path = arguments.out
    check_output(out, SUFFIXES)
    seen, broken = look_at(arguments)
    written: list[Path] = []
    figures: list[HeadFigures] = []
    numbers = []
    for path, record in seen.records.items():
        stem = out.with_name(out.stem + (f"-{path}" if len(seen.records) > 1 else ""))
        queries = _positions(seen, path, arguments.queries)
        for more, figure in (
            ("", attention_sheet(seen, path, queries)),
            ("-heads", head_matrices(seen, path)),
            ("-summary", summary_figure(seen, path, queries)),
        ):
            written.append(stem.with_name(stem.name + more + out.suffix))
            save_figure(figure, written[-1])
        written.append(stem.with_name(f"{stem.name}.html"))
        write_file(written[-1], summary_page(seen, path, queries).encode())
        of_queries, of_keys = seen.cells(path)
        figures += seen.figures(path)
        numbers.append(
            {
                "site": record.site,
                "path": path,
                "images": list(seen.captions),
                "image_size": list(seen.places.image_size),
                "queries": queries,
                "query_size": record.query_size,
                "key_size": record.key_size,
                "query_cells": asdict(of_queries),
                "key_cells": asdict(of_keys),
                "heads": as_json(seen.figures(path)),
                "weights": record.weights[:, :, queries].tolist(),  # [B, h, Q, M]
            }
        )
    metrics = run_folder(arguments.checkpoint) / "metrics.csv"
    if metrics.is_file() and has_curves(metrics):
        written.append(out.with_name(f"{out.stem}-training{out.suffix}"))
        save_figure(training_curves(metrics), written[-1])
    written.append(out.with_suffix(".csv"))
    write_file(written[-1], csv_of(figures).encode())
    written.append(out.with_suffix(".json"))
    write_file(written[-1], json.dumps(numbers).encode())
    _print(figures)
    for file in written:
        print(one_line(file))
    return 1 if broken else 0


def point(text: str) -> tuple[float, float]:
    """x and y from "12,30", as an argparse type."""
    try:
        x, y = (float(part) for part in text.split(","))
        if math.isfinite(x) and math.isfinite(y):
            return x, y
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be a point in pixels: 12,30")


def _positions(seen: "Look", path: str, points: list[tuple[float, float]] | None) -> list[int]:
    """Positions of the cells that points of the image lie in, each once."""
    cells, _ = seen.cells(path)
    height, width = seen.places.image_size
    if not cells.size[0] * cells.size[1]:
        raise GraftError(f"the map of {path!r} has no positions")
    chosen = [(x * width, y * height) for x, y in PARTS] if points is None else points
    return list(dict.fromkeys(cells.at(x, y) for x, y in chosen))


def _print(figures: "list[HeadFigures]") -> None:
    from rich.console import Console
    from rich.table import Table

    from sagan_attn.viz.head_figures import COLUMNS, label

    words = [name for name in COLUMNS if name not in ("path", "images", "queries", "keys")]
    table = Table(title="What the heads do", title_justify="left", box=None, pad_edge=False)
    for name in words:
        table.add_column(label(name), justify="left" if name == "site" else "right")
    for one in figures:
        values = [getattr(one, name) for name in words]
        cells = [
            "" if isinstance(v, float) and math.isnan(v) else f"{v:.3g}" if isinstance(v, float) else one_line(v)
            for v in values
        ]
        table.add_row(*cells)
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
