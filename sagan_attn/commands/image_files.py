"""Image files from what a user names: files, folders, patterns."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sagan_attn.errors import DataError

__all__ = ["image_files", "short_names"]


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


def short_names(files: Sequence[Path]) -> list[str]:
    """The name of each file, with as many of its folders as tell it from the others."""
    names = [file.name for file in files]
    for parts in range(2, max((len(file.parts) for file in files), default=0) + 1):
        counts = Counter(names)
        names = [
            Path(*file.parts[-parts:]).as_posix() if counts[name] > 1 else name
            for file, name in zip(files, names, strict=True)
        ]
    return names


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
