"""Conditions under which writing a file fails or ends: real ones, of the operating system."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

NOBODY = 65534


@contextmanager
def room_for(size: int, *, deadly: bool = False) -> Iterator[None]:
    """Files of this process may have so many bytes. What goes beyond is cut short, as on a full disk, and the next
    write fails; deadly: it kills the process instead.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def anybody() -> Iterator[None]:
    """As a user without privileges: root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    user, group = os.geteuid(), os.getegid()
    try:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    except PermissionError:
        pytest.skip("this root cannot become another user")
    try:
        yield
    finally:
        os.seteuid(user)
        os.setegid(group)


@contextmanager
def folder_of_anybody() -> Iterator[Path]:
    """A folder that belongs to the user of `anybody`, in one that every user can enter."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = Path(name) / "files"
        folder.mkdir()
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        yield folder
        folder.chmod(0o755)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be made, renamed or removed in the folder."""
    folder.chmod(0o555)
    try:
        with anybody():
            yield
    finally:
        folder.chmod(0o755)


@contextmanager
def write_protected(file: Path) -> Iterator[None]:
    """The file cannot be written, though its folder can."""
    file.chmod(0o444)
    try:
        with anybody():
            yield
    finally:
        file.chmod(0o644)


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes, in memory."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True) if sys.platform == "linux" else None
    if made is None or made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip() if made else sys.platform}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def set_read_only(folder: Path, on: bool = True) -> None:
    """Make a mounted file system read-only, or writable again."""
    subprocess.run(["mount", "-o", f"remount,{'ro' if on else 'rw'}", str(folder)], check=True)


def fill(folder: Path, left: int) -> None:
    """Leave so many bytes of room on a mounted file system."""
    there = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, there.f_bavail * there.f_frsize - left)))


def killed(run: Callable[[], Any], *, at: str | int) -> bool:
    """Run something in a copy of this process, which is killed at a system call of writing a file. Returns whether it
    was.

    at: the byte of a file that is not written any more; or, by name, before the "fsync" of the file, before the
    "replace", or "after" it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the other threads of this process do not matter here
        child = os.fork()
    if not child:
        _run_until(run, at)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "it failed before it was killed"
        return False
    assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ)
    return True


def _run_until(run: Callable[[], Any], at: str | int) -> NoReturn:
    """In the child: nothing of the parent's, such as its reports and temporary folders, is touched at the end."""
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with ExitStack() as until:
            if isinstance(at, int):
                until.enter_context(room_for(at, deadly=True))
            else:
                _die_at(at)
            run()
        code = 0
    finally:
        os._exit(code)


def _die_at(what: str) -> None:
    def die(*_: Any) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    if what == "after":
        replace = os.replace
        os.replace = lambda *paths: (replace(*paths), die())
    else:
        setattr(os, what, die)
