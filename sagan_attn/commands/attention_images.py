"""What `maps` and `explore` look at: a trained model, some images, and its attention on them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagan_attn.commands.sites import count
from sagan_attn.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from sagan_attn.training.run import Run
    from sagan_attn.viz.look import Look

__all__ = ["add_image_arguments", "look_at", "run_folder"]

LIMIT = 8  # images
Found = tuple[list[Any], list[str], list[int] | None]  # PIL images, captions, labels


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """`--checkpoint`, `--images`, `--at`, `--limit` and `--max-bytes`."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="RUN", help="run folder of `fit`, or a checkpoint in one"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="WHAT",
        help="image files, folders of them, or dataset:N for N images spread over the run's test split",
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

    from sagan_attn.training.cli import quieten
    from sagan_attn.viz.look import look
    from sagan_attn.viz.targets import targets_of

    quieten()
    run = _run(arguments.checkpoint)
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


def run_folder(path: Path) -> Path:
    """The run folder of a checkpoint, or the folder itself."""
    return path.parent.parent if path.is_file() and path.parent.name == "checkpoints" else path


def _run(path: Path) -> "Run":
    from sagan_attn.training.run import load_run

    if path.is_file() and path.parent.name == "checkpoints":
        return load_run(run_folder(path), path.stem)
    if path.is_file():
        raise CheckpointError(
            f"{path} lies in no run folder: name the folder, which holds config.yaml and checkpoints/"
        )
    which = "best" if (path / "checkpoints" / "best.ckpt").is_file() else "last"
    return load_run(path, which)


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
    files = [file for one in what for file in _files(Path(one))]
    if not files:
        raise DataError(f"there are no images in {', '.join(what)}")
    files = files[:limit]
    return [open_image(file) for file in files], [file.name for file in files], None


def _files(path: Path) -> list[Path]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not path.is_dir():
        return [path]
    inside = (file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
    return sorted(file for file in inside if file.is_file() and not file.name.startswith("."))


def _of_test_split(number: int, run: "Run") -> Found:
    """Images spread evenly over the test split of the data that the run was trained on, and their labels."""
    from sagan_attn.training import data as sets
    from sagan_attn.training.class_paths import check_config

    try:
        config = run.config["data"]
        name, options = str(config["class_path"]).rsplit(".", 1)[-1], dict(config.get("init_args") or {})
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the config of {run.folder} names no data: give image files instead") from error
    kind = getattr(sets, name, None)
    if not (isinstance(kind, type) and issubclass(kind, sets.ImageData)):
        raise ConfigError(f"data {name!r} of {run.folder} are not of this library: give image files instead")
    check_config({"data": config}, str(run.folder / "config.yaml"), hint="give image files instead")
    try:
        if options.get("augment"):
            options["augment"] = sets.AugmentConfig(**options["augment"])
        data = kind(**options)
    except TypeError as error:
        raise ConfigError(f"the config of {run.folder} does not fit {name}: {error}") from error
    pictures = data.pictures("test")
    if pictures is None or not len(pictures.labels):
        raise DataError(f"the data of {run.folder} have no test images")
    total = len(pictures.labels)
    chosen = [index * total // number for index in range(number)] if number < total else list(range(total))
    labels = [int(pictures.labels[index]) for index in chosen]
    if max(labels) >= len(run.classes):
        raise DataError(
            f"the data of {run.folder} have a class {max(labels)}, and classes.json names {len(run.classes)}"
        )
    captions = [f"test {index}, {run.classes[label]}" for index, label in zip(chosen, labels, strict=True)]
    return [pictures.open(index) for index in chosen], captions, labels
