"""How large a grafted model is, what of it learns, and freezing the host."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from sagan_attn.errors import GraftError
from sagan_attn.surgery.graft import grafts_of
from sagan_attn.surgery.grafts import Graft, Grafts

__all__ = ["GraftLine", "GraftSummary", "freeze_host", "summary"]


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


@dataclass(frozen=True)
class GraftSummary:
    """Parameters of a host and of its grafts, each counted once; one line a graft when printed.

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
        grafts = f"{len(self.grafts)} grafts: {self.graft_parameters:,} parameters{share}"
        head = [
            f"{self.host}: {self.host_parameters:,} parameters, {self.host_trainable:,} trainable",
            f"{grafts}, {self.graft_trainable:,} trainable",
        ]
        return "\n".join(head + [f"  {line}" for line in self.grafts])


def summary(model: nn.Module) -> GraftSummary:
    """What the model and its grafts hold and what of it learns; a model without grafts has an empty list of them."""
    grafts = grafts_of(model)
    grafted = list(grafts.parameters())
    own = {*grafted}
    host = [parameter for parameter in model.parameters() if parameter not in own]
    lines = tuple(_line(graft) for graft in grafts)
    return GraftSummary(type(model).__name__, *_counts(host), *_counts(grafted), lines)


def freeze_host(model: nn.Module) -> Grafts:
    """Let the grafts learn alone: no other parameter of the model requires gradients from now on.

    Grafts keep what they are set to. In train mode the statistics of the host's batch norms still move: call `eval()`
    on these to keep them. Returns the grafts, whose `param_groups` go to the optimizer.

    Raises:
        GraftError: a model without grafts, of which nothing would be left to learn.
    """
    grafts = grafts_of(model)
    if not grafts:
        raise GraftError(f"{type(model).__name__} has no grafts: with the host frozen nothing would learn. Graft first")
    own = {*grafts.parameters()}
    for parameter in model.parameters():
        if parameter not in own:
            parameter.requires_grad_(False)
    return grafts


def _line(graft: Graft) -> GraftLine:
    gamma = getattr(graft.block, "gamma", None)
    if not isinstance(gamma, nn.Parameter) or gamma.numel() != 1 or gamma.is_meta:
        gamma = None
    return GraftLine(
        graft.name,
        graft.site,
        graft.path,
        type(graft.block).__name__,
        *_counts(graft.block.parameters()),
        None if gamma is None else float(gamma.detach()),
        graft.name not in graft.point.off,
    )


def _counts(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Numbers in all of them, and in those that require gradients."""
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in parameters]
    return sum(size for size, _ in sizes), sum(trainable for _, trainable in sizes)
