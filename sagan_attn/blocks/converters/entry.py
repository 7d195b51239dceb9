"""One tensor of another implementation, and the tensors of ours that it holds."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sagan_attn.errors import BlockError

__all__ = ["Entry", "Size", "Sizes", "prefixed", "read_shape"]

Size = str | int
"""A number, or a letter that stands for the same number in a whole layout; "2i" is twice the number i."""

Sizes = dict[str, tuple[int, str]]
"""What letters stand for, and the key this was learnt from."""


@dataclass(frozen=True)
class Entry:
    """A key of theirs, and ours: one, or several that theirs holds stacked along the first dimension.

    Shapes are [rows, *rest] and then ones: [rows, *rest, 1, 1] with two more dimensions, as in a 1x1 convolution.
    With fewer dimensions ones in front are left out: [1] becomes [].

    Args:
        theirs: their key.
        ours: our keys.
        rows: first size of each of ours; their sum in theirs.
        rest: sizes behind the first.
        ranks: numbers of dimensions that theirs may have, the usual one first.
        our_ranks: the same for ours.
        leading: how many ones theirs has in front of the rows.
        optional: whether a state dict may lack it.
        derive: for a tensor that ours do not hold, how it is computed from ours.
    """

    theirs: str
    ours: tuple[str, ...]
    rows: tuple[Size, ...]
    rest: tuple[Size, ...]
    ranks: tuple[int, ...]
    our_ranks: tuple[int, ...]
    leading: int = 0
    optional: bool = False
    derive: Callable[[Mapping[str, Tensor]], Tensor] | None = None

    def split(self, tensor: Tensor, sizes: Sizes) -> dict[str, Tensor]:
        """Ours of theirs, as copies. Raises `BlockError` for a shape that does not fit; learns new sizes."""
        core = self.read_theirs(tensor, sizes)
        if self.derive is not None:
            return {}
        pieces = tensor.reshape(core).split([_value(size, sizes) for size in self.rows])
        return {
            key: piece.reshape(_with_ones(piece.shape, self.our_ranks[0])).clone(memory_format=torch.contiguous_format)
            for key, piece in zip(self.ours, pieces, strict=True)
        }

    def join(self, ours: Mapping[str, Tensor], sizes: Sizes, like: Tensor | None = None) -> Tensor:
        """Theirs of ours, as a copy, with the dimensions of `like` or the usual ones."""
        cores = [ours[key].reshape(core) for key, core in zip(self.ours, self.read(ours, sizes), strict=True)]
        joined = torch.cat(cores)
        if like is not None:
            self.read_theirs(like, sizes)
            return joined.reshape(like.shape)
        return joined.reshape(_with_ones(joined.shape, self.ranks[0], self.leading))

    def read(self, ours: Mapping[str, Tensor], sizes: Sizes) -> list[tuple[int, ...]]:
        """Shapes [rows, *rest] of ours. Raises `BlockError` for one that does not fit; learns new sizes."""
        return [
            read_shape(key, ours[key], (rows,), self.rest, self.our_ranks, sizes)
            for key, rows in zip(self.ours, self.rows, strict=True)
        ]

    def read_theirs(self, tensor: Tensor, sizes: Sizes) -> tuple[int, ...]:
        """Shape [sum of rows, *rest] of theirs. Raises and learns as `read`."""
        return read_shape(self.theirs, tensor, self.rows, self.rest, self.ranks, sizes, self.leading)


def prefixed(entry: Entry, theirs: str, ours: str) -> Entry:
    """The entry with a prefix before its key of theirs and one before those of ours."""
    return replace(entry, theirs=theirs + entry.theirs, ours=tuple(ours + key for key in entry.ours))


def read_shape(
    key: str,
    tensor: Tensor,
    rows: tuple[Size, ...],
    rest: tuple[Size, ...],
    ranks: tuple[int, ...],
    sizes: Sizes,
    leading: int = 0,
) -> tuple[int, ...]:
    """The shape of a tensor as [sum of rows, *rest], without the ones; see `Entry`. Learns new sizes.

    Raises `BlockError` with the key, its shape and the required one, if it has another form or other sizes than
    were learnt from other keys.
    """
    shape, known = tuple(tensor.shape), dict(sizes)
    core = shape[leading : leading + 1 + len(rest)]
    core = (1,) * (1 + len(rest) - len(core)) + core
    fits = len(shape) in ranks and _with_ones(core, len(shape), leading) == shape
    fits = fits and all(_learn((size,), number, key, sizes) for size, number in zip(rest, core[1:], strict=True))
    if fits and _learn(rows, core[0], key, sizes):
        return core
    rank = len(shape) if len(shape) in ranks else ranks[0]
    words = _with_ones([_words(rows), *(_words((size,)) for size in rest)], rank, leading)
    letters = dict.fromkeys(_parsed(size)[1] for size in (*rows, *rest))
    where = [f"{letter} = {known[letter][0]} from {known[letter][1]!r}" for letter in letters if letter in known]
    raise BlockError(
        f"{key!r} has shape {list(shape)}, but [{', '.join(map(str, words))}] is required"
        + (f", with {' and '.join(where)}" if where else "")
    )


def _with_ones(core: Sequence[Any], rank: int, leading: int = 0) -> tuple[Any, ...]:
    """Ones around a shape, or left out in front of it, for so many dimensions."""
    if rank < len(core):
        return tuple(core[len(core) - rank :])
    return (1,) * leading + tuple(core) + (1,) * (rank - leading - len(core))


def _learn(terms: tuple[Size, ...], total: int, key: str, sizes: Sizes) -> bool:
    """Whether the terms add up to the total; a letter not known yet stands for what is left, if that is 1 or more."""
    unknown: Counter[str] = Counter()
    for factor, letter in map(_parsed, terms):
        if letter and letter not in sizes:
            unknown[letter] += factor
        else:
            total -= factor * sizes[letter][0] if letter else factor
    if not unknown:
        return total == 0
    ((letter, count),) = unknown.items()
    if total < count or total % count:
        return False
    sizes[letter] = (total // count, key)
    return True


def _value(size: Size, sizes: Sizes) -> int:
    factor, letter = _parsed(size)
    return factor * sizes[letter][0] if letter else factor


def _parsed(size: Size) -> tuple[int, str]:
    """Factor and letter, "" for a number alone."""
    digits, letter = re.fullmatch(r"(\d*)(\D*)", str(size)).groups()  # type: ignore[union-attr]
    return int(digits or 1), letter


def _words(terms: tuple[Size, ...]) -> str:
    """The sum of the terms, as "2d + C"."""
    total: Counter[str] = Counter()
    for factor, letter in map(_parsed, terms):
        total[letter] += factor
    return " + ".join(f"{count if count > 1 or not letter else ''}{letter}" for letter, count in total.items())
