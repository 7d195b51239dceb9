"""What there is to say of a graft in one line or a row of a table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from sagan_attn.surgery.text import text_table

if TYPE_CHECKING:
    from sagan_attn.surgery.grafts import Graft

__all__ = ["GraftLine", "graft_table", "line_of", "numbers_in"]

COLUMNS = {"name": "<", "site": "<", "block": "<", "parameters": ">", "trainable": ">", "gamma": ">", "": "<"}


@dataclass(frozen=True)
class GraftLine:
    """One graft of a `GraftSummary`.

    Args:
        name, site, path: of the graft.
        block: name of the block's class.
        parameters, trainable: how many numbers its parameters hold, and those of parameters that require gradients.
        gamma: the block's own residual gate; None for a block without one or without values (device "meta").
        on: whether it is switched on; see `Grafts.disabled`.
    """

    name: str
    site: str
    path: str
    block: str
    parameters: int
    trainable: int
    gamma: float | None
    on: bool

    def __str__(self) -> str:
        gamma = "" if self.gamma is None else f"  gamma {self.gamma:.3g}"
        off = "" if self.on else "  off"
        return (
            f"{self.name} at {self.site}: {self.block}, {self.parameters:,} parameters, {self.trainable:,} "
            f"trainable{gamma}{off}"
        )


def line_of(graft: "Graft", on: bool) -> GraftLine:
    """The graft as it is now."""
    gamma = getattr(graft.block, "gamma", None)
    if not isinstance(gamma, nn.Parameter) or gamma.numel() != 1 or gamma.is_meta:
        gamma = None
    return GraftLine(
        graft.name,
        graft.site,
        graft.path,
        type(graft.block).__name__,
        *numbers_in(graft.block.parameters()),
        None if gamma is None else float(gamma.detach()),
        on,
    )


def numbers_in(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """How many numbers all of them hold, and those that require gradients."""
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in parameters]
    return sum(size for size, _ in sizes), sum(trainable for _, trainable in sizes)


def graft_table(lines: Sequence[GraftLine], states: Sequence[str]) -> str:
    """A row a graft; states: a word on each, such as "off"."""
    rows = [
        [
            line.name,
            line.site,
            line.block,
            f"{line.parameters:,}",
            f"{line.trainable:,}",
            "" if line.gamma is None else f"{line.gamma:.3g}",
            state,
        ]
        for line, state in zip(lines, states, strict=True)
    ]
    return text_table(COLUMNS, rows)
