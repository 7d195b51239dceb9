"""A module that leaves a mark when it is imported, made or called: what hostile files would have run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CODE = """
from pathlib import Path

import lightning as L

MARKS = Path({marks!r})


def mark(how):
    (MARKS / how).touch()


mark("imported")


class Bomb(L.Callback):
    def __init__(self, *arguments, **options):
        mark("made")


def boom(*arguments, **options):
    mark("called")
"""


class Canary:
    """`canary_in_a_mine.Bomb` is a callback, `canary_in_a_mine.boom` a function."""

    module = "canary_in_a_mine"
    bomb = f"{module}.Bomb"
    boom = f"{module}.boom"

    def __init__(self, folder: Path) -> None:
        self.marks = folder / "marks"
        self.marks.mkdir()
        (folder / f"{self.module}.py").write_text(CODE.format(marks=str(self.marks)))

    @property
    def sang(self) -> list[str]:
        """What happened so far."""
        return sorted(path.name for path in self.marks.iterdir())

    def quiet_again(self) -> None:
        sys.modules.pop(self.module, None)
        for path in self.marks.iterdir():
            path.unlink()


@contextmanager
def canary_in(folder: Path) -> Iterator[Canary]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        made = Canary(folder)
        yield made
        made.quiet_again()
