"""`python -m sagan_attn predict`: classes of images, as a table, CSV, JSON lines and a contact sheet."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sagan_attn.commands.image_files import image_files, short_names
from sagan_attn.commands.runs import RUN, open_run
from sagan_attn.commands.sites import count
from sagan_attn.errors import one_line
from sagan_attn.files import no_formula, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sagan_attn.inference import Prediction

__all__ = ["add_arguments", "run"]

SHOWN = 60  # images on the sheet
PRINTED = 20  # lines of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help=RUN)
    parser.add_argument(
        "--images", nargs="+", required=True, metavar="WHAT", help="image files, folders or patterns of them"
    )
    parser.add_argument(
        "--top-k",
        type=count,
        default=5,
        metavar="K",
        help="classes an image, at most the number of classes (default: 5)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions.csv"),
        metavar="FILE",
        help="table.csv; beside it .jsonl and the contact sheet .png (default: predictions.csv)",
    )
    parser.add_argument(
        "--batch-size", type=count, metavar="B", help="images at once (default: what half of the free memory takes)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")


def run(arguments: argparse.Namespace) -> int:
    """Predict and write. Returns 0, or 1 when an image could not be done; when none could, nothing is written.

    Raises errors of the library.
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from sagan_attn.bench.machine import get_device
    from sagan_attn.inference import predict_images
    from sagan_attn.training.quiet import quieten
    from sagan_attn.viz.draw import check_output, save_figure

    quieten()
    out: Path = arguments.out
    check_output(out, (".csv",))
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = get_device(auto if arguments.device == "auto" else arguments.device)
    trained = open_run(arguments.run_folder)
    sheet = out.with_suffix(".png")
    files = [file for file in image_files(arguments.images) if file.resolve() != sheet.resolve()]  # of the last call
    found: list[Prediction] = []
    answers = predict_images(trained, files, top_k=arguments.top_k, batch_size=arguments.batch_size, device=device)
    console = Console(stderr=True)
    done = 0
    for answer in track(answers, "images", total=len(files), console=console, disable=not console.is_terminal):
        if answer.error is not None:
            print(f"error: {one_line(answer.error)}", file=sys.stderr)
        done += answer.error is None
        # the sheet shows the first that could be done; to hold the others would only fill the memory
        found.append(answer if answer.error is None and done <= SHOWN else replace(answer, image=None))
    if not done:
        many = f"none of the {len(found):,} images" if len(found) > 1 else "the image"
        cannot = "could" if len(found) > 1 else "could not"
        print(f"error: {many} {cannot} be done: nothing was written", file=sys.stderr)
        return 1
    top_k = min(arguments.top_k, len(trained.classes))
    written = {out: _csv(found, top_k).encode(), out.with_suffix(".jsonl"): _json_lines(found).encode()}
    for path, data in written.items():
        write_whole(path, data)
    save_figure(_sheet(found), sheet)
    _print(found)
    for path in (*written, sheet):
        print(one_line(path))
    broken = len(found) - done
    print(f"{done} of {len(found)} images" + (f"; {broken} could not be done" if broken else ""))
    return 1 if broken else 0


def _csv(found: Sequence["Prediction"], top_k: int) -> str:
    """A row an image; those that were not read say why and have no classes."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = [f"{name}_{rank}" for rank in range(1, top_k + 1) for name in ("class", "probability")]
    table.writerow(["image", *columns, "error"])
    for answer in found:
        cells = [cell for name, value in answer.top for cell in (no_formula(name), f"{value:.6g}")]
        cells += [""] * (2 * top_k - len(cells))
        table.writerow([no_formula(str(answer.file)), *cells, no_formula(answer.error or "")])
    return text.getvalue()


def _json_lines(found: Sequence["Prediction"]) -> str:
    lines = []
    for answer in found:
        top = [{"class": name, "probability": value} for name, value in answer.top]
        rest = {"top": top} if answer.error is None else {"error": answer.error}
        lines.append(json.dumps({"image": str(answer.file)} | rest) + "\n")
    return "".join(lines)


def _sheet(found: Sequence["Prediction"]) -> "Figure":
    from sagan_attn.evaluation.image_sheets import Picture, image_sheet

    shown = [(answer.file, answer.image, answer.top) for answer in found if answer.image is not None]
    names = short_names([file for file, _, _ in shown])
    pictures = [
        Picture(image, [name, *(f"{word} {value:.2f}" for word, value in top[:3])])
        for name, (_, image, top) in zip(names, shown, strict=True)
    ]
    done = sum(answer.error is None for answer in found)
    rest = f", the first {len(shown)} of them" if len(shown) < done else ""
    return image_sheet(pictures, f"Predictions for {done:,} image{'' if done == 1 else 's'}{rest}")


def _print(found: Sequence["Prediction"]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("image", "class", "probability", "then"):
        table.add_column(name, justify="right" if name == "probability" else "left")
    for answer in [one for one in found if one.top][:PRINTED]:
        (name, value), *others = answer.top
        rest = ", ".join(f"{one_line(other)} {share:.2f}" for other, share in others[:2])
        table.add_row(one_line(answer.file), one_line(name), f"{value:.3f}", rest)
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    if (more := sum(bool(one.top) for one in found) - PRINTED) > 0:
        print(f"... and {more:,} more")
