"""Every kind of file that the library writes: after a fault the old one is there, and nothing else."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from file_faults import (
    anybody,
    fill,
    folder_of_anybody,
    killed,
    mounted,
    read_only,
    room_for,
    set_read_only,
    write_protected,
)
from products import PRODUCTS, REPORT, Product

from sagan_attn.errors import SaganAttnError
from sagan_attn.files import PART

ALWAYS = ("checkpoint", "grafts")
MOMENTS = (0, 1, 1000, "fsync", "replace")


def some(*always: str) -> list:
    """The kinds of files; all but those named, or all but `ALWAYS`, are slow."""
    return [
        pytest.param(product, id=name, marks=[] if name in (always or ALWAYS) else pytest.mark.slow)
        for name, product in {**PRODUCTS, "report": REPORT}.items()
    ]


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_of_anybody() as made:
        yield made


@cache
def used(product: Product) -> None:
    """Write it once: another user may not be able to read what Python imports then."""
    with TemporaryDirectory() as name:
        product.write(Path(name), 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(product: Product, folder: Path, under: Callable[[Path], AbstractContextManager[None]]) -> str:
    """Write under a fault that hits the product's file: the old files are there. Returns the one line of the error."""
    used(product)
    with anybody():
        product.write(folder, 1)
    before = contents(folder)
    with under(folder / product.file), pytest.raises((SaganAttnError, OSError)) as caught:
        product.write(folder, 2)
    words = str(caught.value)
    assert "\n" not in words
    assert str(folder) in words
    after = contents(folder)
    assert after.keys() == before.keys()
    assert after[product.file] == before[product.file]
    product.load(folder / product.file)
    product.write(folder, 2)  # without the fault it is written, so it was the fault that kept it
    assert contents(folder)[product.file] != before[product.file]
    return words


@pytest.mark.parametrize("size", [0, 1000])
@pytest.mark.parametrize("product", some("checkpoint", "grafts", "hub", "metrics", "predictions", "result", "png"))
def test_no_room(product: Product, size: int, folder: Path):
    assert "File too large" in fails(product, folder, lambda file: room_for(size))


@pytest.mark.parametrize("product", some())
def test_read_only_folder(product: Product, folder: Path):
    assert "Permission denied" in fails(product, folder, lambda file: read_only(file.parent))


@pytest.mark.parametrize("product", some())
def test_write_protected_file(product: Product, folder: Path):
    assert "Permission denied" in fails(product, folder, write_protected)


@pytest.mark.slow
@pytest.mark.parametrize("product", some())
def test_full_disk(product: Product, tmp_path: Path):
    with mounted(tmp_path, 4 << 20) as folder:
        product.write(folder, 1)
        before = contents(folder)
        fill(folder, 0)
        with pytest.raises((SaganAttnError, OSError), match="No space left on device") as caught:
            product.write(folder, 2)
        assert str(folder) in str(caught.value)
        after = contents(folder)
        del after["filler"]
        assert after == before
        (folder / "filler").unlink()
        product.write(folder, 2)
        assert contents(folder)[product.file] != before[product.file]


@pytest.mark.slow
@pytest.mark.parametrize("product", some())
def test_read_only_file_system(product: Product, tmp_path: Path):
    with mounted(tmp_path, 4 << 20) as folder:
        product.write(folder, 1)
        before = contents(folder)
        set_read_only(folder)
        with pytest.raises((SaganAttnError, OSError), match="Read-only file system"):
            product.write(folder, 2)
        assert contents(folder) == before


@pytest.mark.parametrize("product", some())
def test_killed_while_writing(product: Product, tmp_path: Path):
    """At each moment in turn; the next write removes what was left."""
    product.write(tmp_path, 1)
    before = contents(tmp_path)
    for moment in MOMENTS:
        assert killed(lambda: product.write(tmp_path, 2), at=moment)
        after = contents(tmp_path)
        left = [name for name in after if name.endswith(PART)]
        assert len(left) == 1
        assert {name: content for name, content in after.items() if name not in left} == before
        product.load(tmp_path / product.file)
    product.write(tmp_path, 1)
    assert contents(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("product", some())
def test_killed_after_writing(product: Product, tmp_path: Path):
    old, other = tmp_path / "old", tmp_path / "other"
    for folder, number in ((old, 1), (other, 2)):
        folder.mkdir()
        product.write(folder, number)
    before, new = contents(old), contents(other)
    assert killed(lambda: product.write(old, 2), at="after")
    after = contents(old)
    assert after.keys() == before.keys()
    changed = [name for name in after if after[name] != before[name]]
    assert len(changed) == 1
    assert product.file == "bench.json" or after[changed[0]] == new[changed[0]]
    product.load(old / product.file)


def test_not_killed(tmp_path: Path):
    """Where the moment never comes, the copy of the process ends by itself."""
    assert not killed(lambda: PRODUCTS["checkpoint"].write(tmp_path, 1), at=1_000_000)
