"""The grafts of a model, as a handle: their parameters, switching them off, taking them out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

from torch import nn

from sagan_attn.errors import GraftError
from sagan_attn.surgery import point as points_
from sagan_attn.surgery.graft_lines import graft_table, line_of
from sagan_attn.surgery.groups import graft_groups, is_gamma
from sagan_attn.surgery.text import counted
from sagan_attn.surgery.undo import all_or_nothing

__all__ = ["Graft", "Grafts"]


@dataclass(frozen=True, eq=False)
class Graft:
    """One block in a model.

    Args:
        name: of the graft at its place, by default that of the block.
        site: the module it was asked for.
        block: the block itself.
        path: full module name of the block; its state-dict keys start with it.
        anchor: the module the block is kept in and whose output it takes.
    """

    name: str
    site: str
    block: nn.Module
    path: str
    anchor: nn.Module

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.block.parameters())
        return f"Graft({self.name!r} at {self.site!r}: {type(self.block).__name__}, {count:,} parameters)"

    @property
    def point(self) -> points_.GraftPoint:
        """Where the block is kept. Raises `GraftError` after it was removed."""
        point = self.anchor._modules.get(points_.CHILD)
        if not isinstance(point, points_.GraftPoint) or point._modules.get(self.name) is not self.block:
            raise GraftError(f"graft {self.name!r} at {self.site!r} is no longer in the model")
        return point


class Grafts(Sequence[Graft]):
    """A sequence of `Graft`, in the order they were asked for (`graft`) or lie in the model (`grafts_of`)."""

    def __init__(self, grafts: Sequence[Graft]) -> None:
        self._grafts = tuple(grafts)

    @overload
    def __getitem__(self, index: int) -> Graft: ...
    @overload
    def __getitem__(self, index: slice) -> "Grafts": ...
    def __getitem__(self, index: int | slice) -> "Graft | Grafts":
        return Grafts(self._grafts[index]) if isinstance(index, slice) else self._grafts[index]

    def __len__(self) -> int:
        return len(self._grafts)

    def __repr__(self) -> str:
        if not self:
            return "no grafts"
        states = [_state(graft) for graft in self]
        lines = [line_of(graft, not state) for graft, state in zip(self, states, strict=True)]
        total = sum(parameter.numel() for parameter in self.parameters())
        return f"{counted(len(self), 'graft')}: {total:,} parameters\n{graft_table(lines, states)}"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the grafts, under their names in the model, each once."""
        seen = set()
        for graft in self:
            for name, parameter in graft.block.named_parameters(prefix=graft.path):
                if parameter not in seen:
                    seen.add(parameter)
                    yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the grafts."""
        return (parameter for _, parameter in self.named_parameters())

    def gammas(self) -> dict[str, nn.Parameter]:
        """The residual gates, under their names in the model."""
        return {name: parameter for name, parameter in self.named_parameters() if is_gamma(name, parameter)}

    def param_groups(self, lr: float, weight_decay: float = 0.0, gamma_lr_scale: float = 10.0) -> list[dict[str, Any]]:
        """Parameter groups for any torch optimizer: weights; biases and norms without weight decay; gammas without
        weight decay and with `gamma_lr_scale` times the rate.

        While gamma is 0 a block's other parameters get no gradient, so a slow gamma keeps the whole block unused.
        Frozen parameters are left out, and so are empty groups. Each group has a "name" for logs.
        """
        return graft_groups(self.named_parameters(), lr, weight_decay, gamma_lr_scale)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch these grafts off: inside, the model computes exactly what it did before them. Nests.

        A compiled model notices and recompiles once for each state. A copy of the model made inside has its grafts
        on.
        """
        points = [(graft.point, graft.name) for graft in self]
        for point, name in points:
            point.off += (name,)
        try:
            yield
        finally:
            for point, name in points:
                if name in point.off:
                    index = point.off.index(name)
                    point.off = point.off[:index] + point.off[index + 1 :]

    def remove(self) -> None:
        """Take these grafts out; with the last one at a place everything a graft added there goes.

        Raises `GraftError`, and removes none, when one is no longer in the model.
        """
        for graft in self:
            _ = graft.point
        with all_or_nothing(graft.anchor for graft in self):
            for graft in self:
                points_.remove(graft.anchor, graft.name)


def _state(graft: Graft) -> str:
    """ "off", "removed", or nothing to be said."""
    try:
        return "off" if graft.name in graft.point.off else ""
    except GraftError:
        return "removed"
