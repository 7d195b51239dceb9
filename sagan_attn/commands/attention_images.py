"""What `maps` and `explore` look at: a trained model, some images, and its attention on them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagan_attn.commands.image_files import image_files
from sagan_attn.commands.runs import RUN, open_run
from sagan_attn.commands.sites import count
from sagan_attn.errors import ConfigError

if TYPE_CHECKING:
    from sagan_attn.training.run import Run
    from sagan_attn.viz.look import Look

__all__ = ["add_image_arguments", "look_at"]

LIMIT = 8  # images
Found = tuple[list[Any], list[str], list[int] | None]  # PIL images, captions, labels


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


def look_at(arguments: argparse.Namespace) -> "Look":
    """Load the run and the images, and look.

    Raises:
        CheckpointError: no run folder, or one that is not whole.
        DataError: an image that is missing or cannot be read, named; no images.
        GraftError: no such site (near names are listed), a graft without weights, or more than `--max-bytes`.
    """
    import torch

    from sagan_attn.training.quiet import quieten
    from sagan_attn.viz.look import look
    from sagan_attn.viz.targets import targets_of

    quieten()
    run = open_run(arguments.checkpoint)
    targets_of(run.model, arguments.at)  # refuse a wrong name before images are read
    pictures, captions, labels = _images(arguments.images, arguments.limit, run)
    images = torch.stack([run.transform.to_uint8(picture) for picture in pictures])
    inputs = run.transform.normalize(images)
    with torch.no_grad():
        classes = [run.classes[int(index)] for index in run.model(inputs).argmax(1)]
    words = [f"{caption}: seen as {name}" for caption, name in zip(captions, classes, strict=True)]
    return look(
        run.model,
        inputs,
        images,
        words,
        at=arguments.at,
        labels=None if labels is None else torch.tensor(labels),
        max_bytes=int(arguments.max_bytes),
    )


def _images(what: Sequence[str], limit: int, run: "Run") -> Found:
    from sagan_attn.training.data.preprocess import open_image

    sets = [one for one in what if one.startswith("dataset:") and not Path(one).exists()]
    if sets:
        if len(what) > 1:
            raise ConfigError(f"{sets[0]!r} stands alone: it cannot be joined with other images")
        number = sets[0].removeprefix("dataset:")
        if not (number.isascii() and number.isdigit() and int(number)):
            raise ConfigError(f"{sets[0]!r} must say how many images: dataset:8")
        return _of_test_split(int(number), run)
    files = image_files(what)[:limit]
    return [open_image(file) for file in files], [file.name for file in files], None


def _of_test_split(number: int, run: "Run") -> Found:
    """Images spread evenly over the test split of the data that the run was trained on, and their labels."""
    from sagan_attn.training.run_data import pictures_of_test

    pictures = pictures_of_test(run)
    total = len(pictures.labels)
    chosen = [index * total // number for index in range(number)] if number < total else list(range(total))
    labels = [int(pictures.labels[index]) for index in chosen]
    captions = [f"test {index}, {run.classes[label]}" for index, label in zip(chosen, labels, strict=True)]
    return [pictures.open(index) for index in chosen], captions, labels
