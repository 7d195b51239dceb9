"""All tensors of another implementation, in one of the ways it names them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sagan_attn.blocks.converters.entry import Entry, Size, Sizes, read_shape
from sagan_attn.errors import BlockError

__all__ = ["Implied", "Layout"]

Edit = Callable[[dict[str, Tensor]], None]


@dataclass(frozen=True)
class Implied:
    """A tensor of ours that they do not have.

    Args:
        key: our key.
        size: its shape is [size].
        make: adds it to ours with the value that theirs amount to.
        fold: takes it out of ours and puts its effect into others, by new tensors.
    """

    key: str
    size: Size
    make: Edit
    fold: Edit


@dataclass(frozen=True)
class Layout:
    """The keys of another implementation, exactly, and what they are in ours.

    Args:
        entries: one a key of theirs. Sizes are learnt in this order, weights before biases.
        implied: what only ours have.
        check: the reason why ours, with shapes that fit, cannot be right; None if they can.
    """

    entries: tuple[Entry, ...]
    implied: tuple[Implied, ...] = ()
    check: Callable[[Mapping[str, Tensor]], str | None] = lambda ours: None

    def gap(self, keys: Iterable[str]) -> tuple[list[str], list[str]]:
        """Keys of theirs that are missing among these, and those that should not be there."""
        return _gap(keys, {entry.theirs: entry.optional for entry in self.entries})

    def our_gap(self, keys: Iterable[str]) -> tuple[list[str], list[str]]:
        """The same for ours."""
        own = {key: entry.optional for entry in self.entries for key in entry.ours}
        return _gap(keys, own | {implied.key: False for implied in self.implied})

    def to_ours(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ours of theirs, as copies. Raises `BlockError` for shapes that do not fit."""
        sizes: Sizes = {}
        ours: dict[str, Tensor] = {}
        for entry in self.entries:
            if entry.theirs in theirs:
                ours |= entry.split(theirs[entry.theirs], sizes)
        for implied in self.implied:
            implied.make(ours)
        self._checked(ours)
        return ours

    def to_theirs(self, ours: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Theirs of ours, as copies, with the dimensions of `like`. Raises `BlockError` for shapes that do not fit."""
        sizes: Sizes = {}
        entries = [entry for entry in self.entries if entry.derive or all(key in ours for key in entry.ours)]
        if like is not None:
            entries = [entry for entry in entries if entry.theirs in like]
        for entry in entries:
            if entry.derive is None:
                entry.read(ours, sizes)
        for implied in self.implied:
            read_shape(implied.key, ours[implied.key], (implied.size,), (), (1,), sizes)
        self._checked(ours)
        folded = dict(ours)
        for implied in self.implied:
            implied.fold(folded)
        return {
            entry.theirs: entry.derive(ours)
            if entry.derive
            else entry.join(folded, sizes, None if like is None else like[entry.theirs])
            for entry in entries
        }

    def _checked(self, ours: Mapping[str, Tensor]) -> None:
        reason = self.check(ours)
        if reason is not None:
            raise BlockError(reason)


def _gap(keys: Iterable[str], own: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """Missing and unexpected keys against own ones, each with whether it is optional."""
    given = dict.fromkeys(keys)
    missing = [key for key, optional in own.items() if not optional and key not in given]
    return missing, [key for key in given if key not in own]
