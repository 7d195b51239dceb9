"""How large a grafted model is, and what of it learns."""

from dataclasses import dataclass

from torch import nn

from sagan_attn.surgery.graft import grafts_of
from sagan_attn.surgery.graft_lines import GraftLine, graft_table, line_of, numbers_in
from sagan_attn.surgery.text import counted

__all__ = ["GraftLine", "GraftSummary", "summary"]


@dataclass(frozen=True)
class GraftSummary:
    """Parameters of a host and of its grafts, each counted once; printed, a table with a row a graft.

    Args:
        host: name of the host's class.
        host_parameters, host_trainable: of the model without its grafts; see `GraftLine`.
        graft_parameters, graft_trainable: of all grafts.
        grafts: the grafts, in the order of `grafts_of`.
    """

    host: str
    host_parameters: int
    host_trainable: int
    graft_parameters: int
    graft_trainable: int
    grafts: tuple[GraftLine, ...]

    def __str__(self) -> str:
        share = f", {self.graft_parameters / self.host_parameters:.2%} of the host's" if self.host_parameters else ""
        grafts = f"{counted(len(self.grafts), 'graft')}: {self.graft_parameters:,} parameters{share}"
        lines = [
            f"{self.host}: {self.host_parameters:,} parameters, {self.host_trainable:,} trainable",
            f"{grafts}, {self.graft_trainable:,} trainable",
        ]
        table = [graft_table(self.grafts, ["" if line.on else "off" for line in self.grafts])] if self.grafts else []
        return "\n".join(lines + table)

    __repr__ = __str__  # what a notebook shows


def summary(model: nn.Module) -> GraftSummary:
    """What the model and its grafts hold and what of it learns; a model without grafts has an empty list of them."""
    grafts = grafts_of(model)
    grafted = list(grafts.parameters())
    own = {*grafted}
    host = [parameter for parameter in model.parameters() if parameter not in own]
    lines = tuple(line_of(graft, graft.name not in graft.point.off) for graft in grafts)
    return GraftSummary(type(model).__name__, *numbers_in(host), *numbers_in(grafted), lines)
