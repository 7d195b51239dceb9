"""`python -m sagan_attn compare`: two tested runs on the same images."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sagan_attn.commands.runs import RUN, open_run, run_folder
from sagan_attn.errors import one_line
from sagan_attn.files import no_formula, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sagan_attn.evaluation.pairs import Pairing
    from sagan_attn.inference.compare import Change, Comparison, RunCost
    from sagan_attn.training.data.sources import Pictures
    from sagan_attn.training.run import Run

__all__ = ["add_arguments", "run"]

SHOWN = 12  # images of each kind on the sheet
SIGNIFICANT = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        parser.add_argument(name, type=Path, metavar=f"RUN_{name.upper()}", help=f"{RUN}; after `test`")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="sheet.png, .svg or .pdf of changed images; beside it .csv and .json"
    )
    parser.add_argument("--no-timing", action="store_true", help="leave out the time an image takes")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print and write. Raises errors of the library for runs that cannot be compared."""
    from sagan_attn.inference.compare import compare_runs, costs_of
    from sagan_attn.training.quiet import quieten
    from sagan_attn.training.run_data import pictures_of_test
    from sagan_attn.viz.draw import SUFFIXES, check_output, save_figure

    quieten()
    out: Path | None = arguments.out
    if out is not None:
        check_output(out, SUFFIXES)
    found = compare_runs(run_folder(arguments.a), run_folder(arguments.b))
    runs = [open_run(path) for path in (arguments.a, arguments.b)]
    costs = costs_of(runs, timed=not arguments.no_timing)
    _print(found, costs, runs)
    if out is not None:
        pictures = pictures_of_test(runs[0])
        write_whole(out.with_suffix(".csv"), _csv(found.changes, pictures, runs[0].classes).encode())
        write_whole(out.with_suffix(".json"), _json(found, costs, runs).encode())
        save_figure(_sheet(found.changes, pictures, runs[0]), out)
        for path in (out, out.with_suffix(".csv"), out.with_suffix(".json")):
            print(one_line(path))
    return 0


def _print(found: "Comparison", costs: "list[RunCost]", runs: "list[Run]") -> None:
    from rich.console import Console
    from rich.table import Table

    scores = found.scores
    rows = {
        "accuracy": [f"{one.accuracy:.4f}" for one in scores],
        "balanced accuracy": [f"{one.balanced_accuracy:.4f}" for one in scores],
        "NLL": [f"{one.nll:.4f}" for one in scores],
        "calibration error": [f"{one.calibration_error:.4f}" for one in scores],
        "parameters": [f"{one.parameters:,}" for one in costs],
        "parameters of grafts": [f"{one.graft_parameters:,}" for one in costs],
        "MFLOPs an image": [f"{one.flops / 1e6:,.1f}" for one in costs],
    }
    if costs[0].milliseconds is not None:
        rows["ms an image (CPU)"] = [f"{x.milliseconds:.3g} [{x.fastest:.3g} to {x.slowest:.3g}]" for x in costs]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for letter, one in zip("AB", runs, strict=True):
        table.add_column(f"{letter}: {one_line(one.folder.resolve().name)}", justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    pairs = found.pairing
    print(
        f"{pairs.images:,} images: both right {pairs.both:,}, A alone {pairs.only_a:,}, B alone {pairs.only_b:,}, "
        f"neither {pairs.neither:,}"
    )
    print(_verdict(pairs))
    print(
        "This is about these two trained models. Another seed moves accuracy too: whether one recipe is better than "
        "the other takes several of each, see `ablate`."
    )


def _verdict(pairs: "Pairing") -> str:
    low, high = (100 * end for end in pairs.interval())
    if pairs.p_value >= SIGNIFICANT:
        words = "not distinguishable on these images"
    else:
        words = f"{'B' if pairs.difference > 0 else 'A'} is right more often"
    return (
        f"B - A: {100 * pairs.difference:+.2f} points of accuracy, 95 % interval over images [{low:+.2f}, "
        f"{high:+.2f}], McNemar's exact p = {pairs.p_value:.2g}: {words}"
    )


def _csv(changes: "list[Change]", pictures: "Pictures", classes: list[str]) -> str:
    import pandas as pd

    rows = [
        {
            "index": one.index,
            "image": no_formula(pictures.name(one.index)),
            "right": "B" if one.gained else "A",
            "class": no_formula(classes[one.label]),
            "a": no_formula(classes[one.a]),
            "b": no_formula(classes[one.b]),
            "probability_a": one.probability_a,
            "probability_b": one.probability_b,
        }
        for one in changes
    ]
    columns = ["index", "image", "right", "class", "a", "b", "probability_a", "probability_b"]
    return pd.DataFrame(rows, columns=columns).to_csv(index=False)


def _json(found: "Comparison", costs: "list[RunCost]", runs: "list[Run]") -> str:
    pairs = found.pairing
    sides = [
        {"run": str(one.folder), **scores.numbers(), **asdict(cost)}
        for one, scores, cost in zip(runs, found.scores, costs, strict=True)
    ]
    content = {
        "a": sides[0],
        "b": sides[1],
        "pairs": asdict(pairs),
        "difference": pairs.difference,
        "interval": pairs.interval(),
        "p_value": pairs.p_value,
    }
    return json.dumps(content, indent=2) + "\n"


def _sheet(changes: "list[Change]", pictures: "Pictures", run: "Run") -> "Figure":
    """The images that B alone gets right, in green, then those that A alone gets right, in orange."""
    from sagan_attn.evaluation.image_sheets import Picture, image_sheet
    from sagan_attn.viz.draw import COLOURS

    gained, lost = ([one for one in changes if one.gained is wanted] for wanted in (True, False))
    shown = [
        Picture(
            run.transform.to_uint8(pictures.open(one.index)),
            (
                pictures.name(one.index),
                f"class {run.classes[one.label]}",
                f"A {run.classes[one.a]} ({one.probability_a:.2f})",
                f"B {run.classes[one.b]} ({one.probability_b:.2f})",
            ),
            COLOURS[2] if one.gained else COLOURS[1],
        )
        for one in (*gained[:SHOWN], *lost[:SHOWN])
    ]
    title = (
        f"{len(gained):,} images that B alone gets right (green, {min(SHOWN, len(gained))} shown), {len(lost):,} "
        f"that A alone does (orange, {min(SHOWN, len(lost))}); in brackets the true class's probability"
    )
    return image_sheet(shown, title)
