"""`python -m sagan_attn export`: a trained model as a file for other programs, checked against the model."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagan_attn.commands.image_files import image_files
from sagan_attn.commands.runs import RUN, open_run, which_checkpoint
from sagan_attn.errors import ConfigError, DataError, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from sagan_attn.training.run import Run

__all__ = ["add_arguments", "run"]

REAL = 64  # images to compare on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from sagan_attn.export import FORMATS, TOLERANCE

    parser.add_argument("run_folder", type=Path, metavar="RUN", help=RUN)
    parser.add_argument(
        "--to",
        choices=list(FORMATS),
        required=True,
        help="onnx: one file for ONNX Runtime and others; torch-export: a program for torch.export.load; safetensors: "
        "the weights as trained, for sagan_attn.export.load_exported (never fused: fused weights have names that no "
        "host has)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("."),
        metavar="FILE|FOLDER",
        help="the file, which is replaced if it is there, or a folder for a file with the run's name (default: here); "
        "FILE.json beside it holds classes, preprocessing and what the check found",
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default: best, or last where there is no best")
    parser.add_argument(
        "--no-fuse", action="store_true", help="keep grafts as they were trained, not folded into fewer operations"
    )
    parser.add_argument(
        "--fixed-size", action="store_true", help="for images of the run's size alone; some models need it"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="WHAT",
        help=f"image files, folders or patterns to check with, the first {REAL} of them (default: {REAL} images of the "
        "run's test split, if its data are here)",
    )
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        default=TOLERANCE,
        metavar="T",
        help="largest difference, of a probability and of a logit as a part of the largest one, that is written "
        f"(default: {TOLERANCE:g})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export, check, write, and print what was found. Raises errors of the library for what is refused."""
    from sagan_attn.export import export_run
    from sagan_attn.training.quiet import quieten

    quieten()
    checkpoint = which_checkpoint(arguments.run_folder, arguments.checkpoint)
    trained = open_run(arguments.run_folder, checkpoint)
    images, images_from = _images(trained, arguments.images)
    path, found = export_run(
        trained,
        arguments.to,
        arguments.out,
        fused=not arguments.no_fuse,
        fixed_size=arguments.fixed_size,
        tolerance=arguments.tolerance,
        images=images,
        images_from=images_from,
        checkpoint=checkpoint,
    )
    for line in _lines(path, found):
        print(one_line(line))
    return 0


def _images(trained: "Run", names: list[str] | None) -> "tuple[Tensor | None, str]":
    """Images [N, 3, S, S] and where they are from; None and why where the data of the run are not here."""
    import torch

    from sagan_attn.training.data.preprocess import open_image
    from sagan_attn.training.run_data import pictures_of_test

    if names is None:
        try:
            there = pictures_of_test(trained)
            total = len(there.labels)
            chosen = sorted({index * total // REAL for index in range(REAL)})
            pictures = [there.open(index) for index in chosen]
        except (ConfigError, DataError) as error:
            return None, f"none, as the test split cannot be had: {error}"
        words = f"the test split, {len(chosen)} of {total:,}"
    else:
        files = image_files(names)
        pictures = [open_image(file) for file in files[:REAL]]
        words = f"{', '.join(names)}: {len(pictures)} of {len(files):,}"
    pixels = torch.stack([trained.transform.to_uint8(picture) for picture in pictures])
    return trained.transform.normalize(pixels), words


def _lines(path: Path, found: dict[str, Any]) -> list[str]:
    """What there is to say of an export."""
    shape = " x ".join(map(str, found["input"]["shape"]))
    opset = "" if found["opset"] is None else f", opset {found['opset']}"
    form = "fused" if found["fused"] else "not fused"
    free = "; ".join(f"{name} {words}" for name, words in found["input"]["sizes"].items())
    lines = [
        f"{path}: {found['format']}{opset}, {found['bytes']:,} bytes, {form}",
        f"images {shape} ({free}), {len(found['classes']):,} classes",
    ]
    checks = found["checks"]
    for what, those in (("random", checks["random_images"]), ("real", checks["real_images"])):
        source = f" ({those['from']})" if "from" in those else ""
        if "images" not in those:
            lines.append(f"{what} images: {those['from']}")
            continue
        refused = ", ".join(those.get("sizes_the_model_refuses", ()))
        refused = f"; the model takes no {refused}" if refused else ""
        lines.append(
            f"{what} images{source}: largest difference {those['logits']:.3g} of logits up to "
            f"{those['largest_logit']:.3g}, {those['probabilities']:.3g} of probabilities, other top class for "
            f"{those['changed']} of {those['images']} ({', '.join(those['shapes'])}{refused})"
        )
    lines.append(f"{path}.json: classes, preprocessing, checks")
    return lines


def tolerance(text: str) -> float:
    """A number of at least 0, as an argparse type."""
    try:
        value = float(text)
        if 0 <= value < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
