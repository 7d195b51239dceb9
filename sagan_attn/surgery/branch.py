"""How much grafted blocks add to the maps they are on."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn.errors import GraftError
from sagan_attn.surgery.graft import grafts_of
from sagan_attn.surgery.probe import is_compiled, quiet

__all__ = ["branch_share"]


def branch_share(model: nn.Module, batches: Iterable[tuple[Tensor, Any]]) -> dict[str, float]:
    """Path of each graft -> how large what it adds is: the mean over maps x of |block(x) - x| / |x|, in l2 norms.

    The model runs in eval mode without gradients, a compiled one as it was before that; mode and random state are as
    before afterwards, and no hook stays. 0 is a graft that does nothing; a large share alone does not make it useful.
    A map of zeros counts as 0 where nothing is added to it, and as infinite otherwise. A block at several places has
    one share, over all of them.

    Args:
        model: a grafted model.
        batches: images [B, C, H, W], moved to the model's device, and anything else.

    Raises:
        GraftError: a model without grafts, one whose graft does not run, or no images.
    """
    grafts = grafts_of(model)
    if not grafts:
        raise GraftError(f"{type(model).__name__} has no grafts")
    device = next((p.device for p in model.parameters()), None)
    shares: defaultdict[nn.Module, list[Tensor]] = defaultdict(list)
    images_seen = 0
    with ExitStack() as stack:
        if any(is_compiled(module) for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code runs no hooks
        for block in dict.fromkeys(graft.block for graft in grafts):
            stack.callback(block.register_forward_hook(_measure(shares[block])).remove)
        stack.enter_context(quiet(model))
        for images, _ in batches:
            model(images.to(device))
            images_seen += len(images)
    if not images_seen:
        raise GraftError("batches is empty: nothing was measured (an iterator that was used up?)")
    if idle := [graft.path for graft in grafts if not shares[graft.block]]:
        raise GraftError(f"{', '.join(idle)} did not run: the graft is disabled, or its module never fires")
    return {graft.path: torch.cat(shares[graft.block]).mean().item() for graft in grafts}


def _measure(shares: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    def measure(block: nn.Module, args: Any, output: Tensor) -> None:
        precise = torch.promote_types(output.dtype, torch.float32)
        x, y = (part.detach().to(precise).flatten(1) for part in (args[0], output))
        added = (y - x).norm(dim=1)
        shares.append(torch.where(added == 0, added, added / x.norm(dim=1)).double().cpu())

    return measure
