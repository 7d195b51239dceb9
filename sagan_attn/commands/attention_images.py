"""What `maps` and `explore` look at: a trained model, some images, and its attention on them."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagan_attn.commands.image_files import image_files, short_names
from sagan_attn.commands.runs import RUN, open_run
from sagan_attn.commands.sites import count
from sagan_attn.errors import ConfigError, DataError, GraftError, one_line

if TYPE_CHECKING:
    from sagan_attn.training.run import Run
    from sagan_attn.viz.look import Look

__all__ = ["add_image_arguments", "look_at"]

LIMIT = 8  # images
Found = tuple[list[Any], list[str], list[int] | None, int]  # PIL images, captions, labels, number of broken images


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """`--checkpoint`, `--images`, `--at`, `--limit` and `--max-bytes`."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help=RUN)
    parser.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="WHAT",
        help="image files, folders or patterns of them, or dataset:N for N images spread over the run's test split",
    )
    parser.add_argument("--at", nargs="+", metavar="SITE", help="site, name or path of grafts (default: all)")
    parser.add_argument("--limit", type=count, default=LIMIT, metavar="N", help=f"images at most (default: {LIMIT})")
    parser.add_argument(
        "--max-bytes", type=float, default=2**30, metavar="BYTES", help="of weights in memory (default: 1 GiB)"
    )


def look_at(arguments: argparse.Namespace) -> "tuple[Look, int]":
    """Load the run and the images, and look. Returns too how many images could not be read and were passed over.

    Raises:
        CheckpointError: no run folder, or one that is not whole.
        DataError: an image that is missing, or cannot be read and was named by itself; no images, or none to read.
        GraftError: no such site (near names are listed), a graft without weights, or more than `--max-bytes`.
    """
    import torch

    from sagan_attn.training.quiet import quieten
    from sagan_attn.viz.look import look
    from sagan_attn.viz.targets import targets_of

    quieten()
    run = open_run(arguments.checkpoint)
    try:
        targets_of(run.model, arguments.at)  # refuse a wrong name before images are read
    except GraftError as error:
        raise GraftError(f"{arguments.checkpoint}: {error}") from error
    pictures, captions, labels, broken = _images(arguments.images, arguments.limit, run)
    images = torch.stack([run.transform.to_uint8(picture) for picture in pictures])
    inputs = run.transform.normalize(images)
    with torch.no_grad():
        classes = [run.classes[int(index)] for index in run.model(inputs).argmax(1)]
    words = [f"{caption}: seen as {name}" for caption, name in zip(captions, classes, strict=True)]
    seen = look(
        run.model,
        inputs,
        images,
        words,
        at=arguments.at,
        labels=None if labels is None else torch.tensor(labels),
        max_bytes=int(arguments.max_bytes),
    )
    left_out = len(image_files(arguments.images)) - len(pictures) - broken if labels is None else 0
    return replace(seen, left_out=left_out), broken


def _images(what: Sequence[str], limit: int, run: "Run") -> Found:
    sets = [one for one in what if one.startswith("dataset:") and not Path(one).exists()]
    if sets:
        if len(what) > 1:
            raise ConfigError(f"{sets[0]!r} stands alone: it cannot be joined with other images")
        number = sets[0].removeprefix("dataset:")
        if not (number.isascii() and number.isdigit() and int(number)):
            raise ConfigError(f"{sets[0]!r} must say how many images: dataset:8")
        return _of_test_split(int(number), run)
    return _of_files(what, limit)


def _of_files(what: Sequence[str], limit: int) -> Found:
    """The first images that can be read; a broken one of a folder or pattern is named on stderr and passed over."""
    from sagan_attn.training.data.preprocess import open_image

    alone = {Path(one) for one in what if Path(one).exists() and not Path(one).is_dir()}
    found: dict[Path, Any] = {}
    broken = 0
    for file in image_files(what):
        try:
            found[file] = open_image(file)
        except DataError as error:
            if file in alone:
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            broken += 1
        if len(found) == limit:
            break
    if not found:
        raise DataError(f"no image in {', '.join(what)} can be read: replace or remove the files")
    return list(found.values()), short_names(list(found)), None, broken


def _of_test_split(number: int, run: "Run") -> Found:
    """Images spread evenly over the test split of the data that the run was trained on, and their labels."""
    from sagan_attn.training.run_data import pictures_of_test

    pictures = pictures_of_test(run)
    total = len(pictures.labels)
    chosen = [index * total // number for index in range(number)] if number < total else list(range(total))
    labels = [int(pictures.labels[index]) for index in chosen]
    captions = [f"test {index}, {run.classes[label]}" for index, label in zip(chosen, labels, strict=True)]
    return [pictures.open(index) for index in chosen], captions, labels, 0
