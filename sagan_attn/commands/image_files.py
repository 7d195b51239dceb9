"""Image files from what a user names: files, folders, patterns."""

import glob
from collections.abc import Sequence
from pathlib import Path

from sagan_attn.errors import DataError

__all__ = ["image_files"]


def image_files(what: Sequence[str]) -> list[Path]:
    """The files named, those of image suffixes in folders named (and below), and those that patterns match.

    A file comes once, where it is named first; hidden files of folders are passed over.

    Raises:
        DataError: a name that is nothing, or nothing left.
    """
    files = [file for one in what for file in _files(one)]
    if not files:
        raise DataError(f"there are no images in {', '.join(what)}")
    return list(dict.fromkeys(files))


def _files(name: str) -> list[Path]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    path = Path(name)
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        return sorted(file for file in inside if file.is_file() and not file.name.startswith("."))
    if path.exists():
        return [path]
    found = sorted(Path(match) for match in glob.glob(name, recursive=True))
    if not found:
        raise DataError(f"there is no image, folder or pattern's match {name!r}")
    return [file for match in found for file in _files(str(match))]
