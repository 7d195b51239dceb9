"""`files.write_whole` and `whole_file`: old or new, never half, and no litter."""

import errno
import fcntl
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from file_faults import anybody, folder_of_anybody, killed, read_only, room_for

from sagan_attn import files
from sagan_attn.files import PART, remove_leftovers, whole_file, write_whole

OLD, NEW = b"old " * 1000, b"new " * 2000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "file"
    target.write_bytes(OLD)
    return target


def refused(path: Path, number: int) -> None:
    """Writing there raises that error about that file, and nothing is left in its folder."""
    before = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    with pytest.raises(OSError) as caught:  # noqa: PT011  (the number is looked at)
        write_whole(path, NEW)
    assert caught.value.errno == number
    assert caught.value.filename == str(path)
    assert type(caught.value) is type(OSError(number, ""))
    assert before == (sorted(os.listdir(path.parent)) if path.parent.is_dir() else [])


@pytest.mark.parametrize("data", [b"", NEW, memoryview(NEW)])
def test_content(data: bytes, path: Path):
    write_whole(path, data)
    assert path.read_bytes() == bytes(data)
    write_whole(str(path.with_name("other")), data)
    assert path.with_name("other").read_bytes() == bytes(data)
    assert sorted(os.listdir(path.parent)) == ["file", "other"]


def test_numbers_as_their_bytes(path: Path):
    write_whole(path, memoryview(NEW).cast("i"))
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("size", [0, 1, 4000, len(NEW) - 1])
def test_no_room(size: int, path: Path):
    with room_for(size):
        refused(path, errno.EFBIG)
    assert path.read_bytes() == OLD


def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch):
    class Slow(files.io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[:7])

    monkeypatch.setattr(Path, "open", lambda self, mode, **_: Slow(self, mode))
    write_whole(path, NEW)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("step", ["chmod", "fsync", "replace"])
def test_a_step_fails(step: str, path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, step, fail)
    refused(path, errno.EIO)
    assert path.read_bytes() == OLD


def test_content_in_pieces(path: Path):
    with whole_file(path) as file:
        assert [file.write(piece) for piece in (b"one", memoryview(b" two").cast("i"), b"")] == [3, 4, 0]
        assert path.read_bytes() == OLD
    assert path.read_bytes() == b"one two"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), FileNotFoundError(2, "No such", "picture")])
def test_the_block_fails(error: BaseException, path: Path):
    """Its error stays as it is: of another file, too."""

    def write() -> None:
        with whole_file(path) as file:
            file.write(NEW)
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert path.read_bytes() == OLD
    assert os.listdir(path.parent) == ["file"]


def test_the_block_passes_over_a_failed_write(path: Path):
    def write() -> None:
        with whole_file(path) as file:
            with suppress(OSError):
                file.write(NEW)
            file.write(b"")

    with room_for(100), pytest.raises(OSError, match="too large") as caught:
        write()
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == OLD
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("moment", [0, 1, 4096, "fsync", "replace"])
def test_killed(moment: str | int, path: Path):
    assert killed(lambda: write_whole(path, NEW), at=moment)
    assert path.read_bytes() == OLD
    assert len(os.listdir(path.parent)) == 2
    write_whole(path.with_name("other"), NEW)
    assert sorted(os.listdir(path.parent)) == ["file", "other"]


def test_killed_after_it_was_replaced(path: Path):
    assert killed(lambda: write_whole(path, NEW), at="after")
    assert path.read_bytes() == NEW
    assert os.listdir(path.parent) == ["file"]


def test_permissions():
    with folder_of_anybody() as folder, anybody():
        mask = os.umask(0o027)
        try:
            write_whole(folder / "new", NEW)
            (folder / "secret").touch(0o600)
            (folder / "shared").touch()
            (folder / "shared").chmod(0o666)
            for name in ("secret", "shared"):
                write_whole(folder / name, NEW)
        finally:
            os.umask(mask)
        found = {name: stat.S_IMODE((folder / name).stat().st_mode) for name in os.listdir(folder)}
        assert found == {"new": 0o640, "secret": 0o600, "shared": 0o666}


def test_private_from_the_first_byte(path: Path, monkeypatch: pytest.MonkeyPatch):
    path.chmod(0o600)
    seen = []

    class Looking(files.io.FileIO):
        def write(self, data: Any) -> int:
            seen.append(stat.S_IMODE(os.fstat(self.fileno()).st_mode))
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda self, mode, **_: Looking(self, mode))
    write_whole(path, NEW)
    assert seen == [0o600]


def test_no_permission():
    with folder_of_anybody() as folder:
        with anybody():
            (folder / "file").write_bytes(OLD)
            (folder / "file").chmod(0o444)
            refused(folder / "file", errno.EACCES)
            (folder / "file").chmod(0o644)
        with read_only(folder):
            refused(folder / "file", errno.EACCES)
            refused(folder / "other", errno.EACCES)
        assert (folder / "file").read_bytes() == OLD


def test_places_where_no_file_can_be(tmp_path: Path, path: Path):
    refused(tmp_path, errno.EISDIR)
    refused(Path(), errno.EISDIR)
    refused(tmp_path / "missing" / "file", errno.ENOENT)
    refused(path / "file", errno.ENOTDIR)
    refused(tmp_path / ("x" * 256), errno.ENAMETOOLONG)
    refused(tmp_path / "a\0b", errno.EINVAL)
    refused(tmp_path / "\ud800", errno.EINVAL)
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", errno.EINVAL)
    (tmp_path / "turn").symlink_to(tmp_path / "turn")
    refused(tmp_path / "turn", errno.ELOOP)


def test_devices_stay(tmp_path: Path):
    """Root could rename a file to /dev/null; here it is a device of one's own, or a link to that one."""
    null = tmp_path / "null"
    try:
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        null.symlink_to("/dev/null")
    refused(null, errno.EINVAL)
    assert stat.S_ISCHR(null.stat().st_mode)


def test_longest_names(tmp_path: Path):
    write_whole(tmp_path / ("x" * 255), NEW)
    assert os.listdir(tmp_path) == ["x" * 255]


@pytest.mark.parametrize("name", ["a[b]*?.json", "ünï\n", " ", "-", ".hidden"])
def test_odd_names(name: str, tmp_path: Path):
    write_whole(tmp_path / name, OLD)
    write_whole(tmp_path / name, NEW)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_replaced_and_not_followed(there: bool, tmp_path: Path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    folder.mkdir()
    if there:
        outside.write_bytes(OLD)
        outside.chmod(0o600)
    (folder / "file").symlink_to(outside)
    write_whole(folder / "file", NEW)
    assert not (folder / "file").is_symlink()
    assert (folder / "file").read_bytes() == NEW
    assert outside.exists() == there
    assert not there or outside.read_bytes() == OLD


def test_several_at_a_time(tmp_path: Path):
    """Threads that write one file, and one that clears up all the time."""
    target, failures, done = tmp_path / "file", [], threading.Event()

    def write(letter: bytes) -> None:
        try:
            for _ in range(50):
                write_whole(target, letter * 50_000)
        except OSError as error:
            failures.append(error)

    def clear() -> None:
        while not done.is_set():
            remove_leftovers(tmp_path)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    cleaner = threading.Thread(target=clear)
    for thread in [cleaner, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    cleaner.join()
    assert failures == []
    assert len(set(target.read_bytes())) == 1
    assert target.stat().st_size == 50_000
    assert os.listdir(tmp_path) == ["file"]


def test_taken_for_a_leftover_before_it_is_locked(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another process clears up between the making of the file and its lock: it is made once more."""
    real, made = fcntl.flock, []

    def flock(file: Any, how: int) -> None:
        if len(made) < 2:
            (left,) = path.parent.glob(f".*{PART}")
            made.append(left)
            left.unlink()
        real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    write_whole(path, NEW)
    assert path.read_bytes() == NEW
    assert len(set(made)) == 2
    assert os.listdir(path.parent) == ["file"]


def test_what_is_being_written_is_no_leftover(tmp_path: Path):
    being, left, foreign = (tmp_path / name for name in (f".1{PART}", f".2{PART}", ".browser.part"))
    for each in (being, left, foreign):
        each.write_bytes(OLD)
    (tmp_path / f".3{PART}").mkdir()
    (tmp_path / f".4{PART}").symlink_to(foreign)
    with being.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [f".1{PART}", f".3{PART}", f".4{PART}", ".browser.part"]
    remove_leftovers(tmp_path)
    assert not being.exists()
    remove_leftovers(tmp_path / "missing")


def test_leftovers_of_another_user(tmp_path: Path):
    """They stay, and nobody is told."""
    with folder_of_anybody() as folder:
        left = folder / f".1{PART}"
        left.write_bytes(OLD)
        left.chmod(0o444)
        with anybody():
            remove_leftovers(folder)
            write_whole(folder / "file", NEW)
        assert sorted(os.listdir(folder)) == [left.name, "file"]


def test_a_copy_of_the_process_writes_too(path: Path):
    """The names of two processes never meet, however they came to be."""
    random = [os.urandom(8) for _ in range(2)]
    assert random[0] != random[1]
    child = os.fork()
    if not child:
        try:
            for _ in range(20):
                write_whole(path, OLD)
        except BaseException:
            os._exit(1)
        os._exit(0)
    for _ in range(20):
        write_whole(path, NEW)
    assert os.waitpid(child, 0)[1] == 0
    assert path.read_bytes() in (OLD, NEW)
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("kind", ["no locks at all", "not on this file system"])
def test_without_locks(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files are as whole; what a killed process left stays, because it might be somebody's who is writing."""
    left = path.with_name(f".1{PART}")
    left.write_bytes(OLD)

    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    if kind == "no locks at all":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", unknown)
    write_whole(path, NEW)
    assert path.read_bytes() == NEW
    assert sorted(os.listdir(path.parent)) == [left.name, "file"]


def test_the_random_state_is_left_alone(path: Path):
    import random

    import torch

    before = random.getstate(), torch.get_rng_state()
    write_whole(path, NEW)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
