"""Files of torch read without running anything of them, and without unpacking more than they hold."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_tensors"]

ASKED = re.compile(r"(?:GLOBAL|class|function) ([\w.]+)")  # in torch's account of what it will not unpickle


def load_tensors(path: str | Path) -> Any:
    """What `torch.load` reads with `weights_only`, its tensors on the CPU.

    Raises:
        ValueError: the file would run code, naming what, or unpacks to more than its own size.
        Exception: whatever else `torch.load` raises for damaged and foreign files.
    """
    _check_size(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = ASKED.search(str(error).partition("nsupported")[2])
        what = f"it asks for {found[1]}" if found else "it is no archive of tensors"
        raise ValueError(f"{what}, and only tensors and plain values are read") from error


def _check_size(path: str | Path) -> None:
    """torch writes archives without compression, so no more can be in one than it takes on the disk."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    size = sum(part.file_size for part in parts)
    if size > Path(path).stat().st_size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError(f"it is a compressed archive of {size:,} bytes, which torch does not write")
