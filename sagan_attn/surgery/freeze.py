"""Freezing the host, so that its grafts learn alone."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sagan_attn.errors import GraftError
from sagan_attn.surgery.graft import grafts_of
from sagan_attn.surgery.grafts import Grafts

__all__ = ["freeze_host"]


def freeze_host(model: nn.Module) -> Grafts:
    """Let the grafts learn alone: nothing else of the model changes from now on, whatever mode it is in.

    No other parameter requires gradients, and the host's batch norms use and keep the statistics they have, also after
    `model.train()`: else they would move with every batch, and the grafts' file would not make the model that was
    trained. A batch norm whose weight requires gradients again is an ordinary one again.

    Grafts keep what they are set to. Returns them; their `param_groups` go to the optimizer.

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
    grafted = {module for graft in grafts for module in graft.block.modules()}
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module not in grafted:
            module.eval()
            if _rest not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_rest)
    return grafts


def _rest(norm: _BatchNorm, arguments: Any) -> None:
    """`train()` of the whole model has put it into train mode, and a hook is what every way of calling it passes."""
    if norm.training and (norm.weight is None or not norm.weight.requires_grad):
        norm.eval()
