"""Files written as a whole: the old one or the new one is there, never half of one, and nothing beside it."""

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast
from unicodedata import category

try:
    import fcntl
except ImportError:  # Windows: no locks, so what a killed process left stays
    fcntl = None

__all__ = ["no_formula", "read_text", "remove_leftovers", "whole_file", "write_whole"]

FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")  # what a spreadsheet takes for the start of one, wide forms too
PART = ".sagan_attn.part"


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file that is written as a whole: beside its target, flushed to the disk, then renamed to it.

    The block writes to it, from its start to its end. On any failure, an exception of the block too, `path` is as it
    was, and nothing stays beside it; what a killed process left there is removed by the next write into the folder. A
    file that is there keeps its permissions, and a write-protected one is not replaced. A symbolic link is replaced and
    never followed, so that a folder from elsewhere cannot point a write out of itself.

    Raises:
        OSError: a full disk, no permission, no folder, a target that is no plain file; it names `path`.
    """
    path, inside = Path(path), None
    try:
        mode = _mode(path)
        remove_leftovers(path.parent)
        with _beside(path.parent) as (beside, file):
            if mode is not None:
                os.chmod(beside, mode)
            writer = inside = _Writer(file)
            yield cast(BinaryIO, writer)
            inside = None
            if writer.failed:
                raise writer.failed
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(beside, path)
        _flush_folder(path.parent)
    except Exception as error:
        failed = inside.failed if inside else error
        if not isinstance(failed, OSError) or failed.errno is None:
            raise
        raise OSError(failed.errno, failed.strerror, str(path)) from error  # of the class that belongs to the number


def write_whole(path: str | Path, data: bytes | memoryview) -> None:
    """Write bytes as a `whole_file`. Raises as that does."""
    with whole_file(path) as file:
        file.write(data)


class _Writer(io.RawIOBase):
    """Writes all that it is given, where a file may take less. Keeps the error of a write that failed: torch raises
    another one after it.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.failed: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.failed = self.failed or error
            raise
        return size


def no_formula(value: object) -> object:
    """A cell of a CSV file.

    A text that a spreadsheet would compute, as `=cmd|...`, gets an apostrophe in front, and control characters, which
    end lines for some readers, become spaces; other values are as they are.
    """
    if not isinstance(value, str):
        return value
    text = "".join(" " if category(letter) in ("Cc", "Cs") else letter for letter in value)
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text


def read_text(path: str | Path, limit: int) -> str:
    """The text of a plain file of at most `limit` bytes.

    Raises `OSError`, or `ValueError` for a longer file, what is no plain file, and bytes that are no UTF-8.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise ValueError("it is no plain file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return data.decode("utf-8")


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed processes were writing in a folder: the files beside others that nobody has locked.

    Machines that share the folder are safe from each other where its file system carries locks between them.
    """
    if fcntl is None:
        return
    for left in Path(folder).glob(f".*{PART}"):
        with suppress(OSError):  # being written, another user's, gone already
            handle = os.open(left, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(handle)


@contextmanager
def _beside(folder: Path) -> Iterator[tuple[Path, io.FileIO]]:
    """A new file that is locked while it is written, which the death of the process ends; removed unless renamed."""
    while True:
        path = folder / f".{os.urandom(8).hex()}{PART}"
        with path.open("xb", buffering=0) as file:
            try:
                if fcntl is not None:
                    with suppress(OSError):  # a file system without locks, where nobody can remove it either
                        fcntl.flock(file, fcntl.LOCK_EX)
                if path.exists():  # not taken for a leftover before it was locked
                    yield path, file
                    return
            finally:
                with suppress(OSError):
                    file.close()
                    path.unlink(missing_ok=True)


def _mode(path: Path) -> int | None:
    """Permissions of the file that will be replaced; None where the process's own for new files count.

    Raises `OSError` for what is no plain file, or must not be written.
    """
    try:
        there = path.stat()
    except FileNotFoundError:
        return None
    except ValueError as error:  # a name that no file can have
        raise OSError(errno.EINVAL, str(error)) from error
    if stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(there.st_mode):  # /dev/null, which root could replace
        raise OSError(errno.EINVAL, "Not a plain file")
    if path.is_symlink():
        return None
    os.close(os.open(path, os.O_WRONLY))
    return stat.S_IMODE(there.st_mode) & 0o777


def _flush_folder(folder: Path) -> None:
    """The rename itself, which a loss of power could undo. Some file systems do not have that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
