"""Files written as a whole: the old one or the new one is there, never half of one, and nothing beside it."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["remove_leftovers", "whole_file", "write_whole"]

PART = ".part"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; afterwards the file is flushed to the disk and renamed to `path`.

    With an exception `path` is as it was, and what was written is removed. So is what processes of this machine that
    were killed while they wrote `path` have left. Raises `OSError`.
    """
    path = Path(path)
    remove_leftovers(path.parent, path.name)
    beside = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{threading.get_ident()}{PART}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        _flush_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file as a whole. Raises `OSError`."""
    with whole_file(path) as beside:
        beside.write_bytes(data)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what processes that were killed while they wrote files of this name have left in a folder.

    Processes of other machines, which a shared folder may have, are not known to be dead: their files stay.
    """
    for left in folder.glob(f".{name if name == '*' else _escaped(name)}.{_escaped(_host())}.*{PART}"):
        process = left.name.removesuffix(PART).split(".")[-2]
        if process.isdecimal() and not _alive(int(process)):
            with suppress(OSError):
                left.unlink()


def _host() -> str:
    return socket.gethostname().replace("/", "-").replace(".", "-")


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _flush_folder(folder: Path) -> None:
    """The rename itself, which a loss of power could undo. Some file systems do not have that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
