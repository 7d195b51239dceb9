"""Attention weights of a grafted block on real inputs."""

import torch
from torch import Tensor, nn

from sagan_attn.errors import GraftError
from sagan_attn.surgery import Graft

__all__ = ["attention_at"]


def attention_at(model: nn.Module, graft: Graft, images: Tensor, queries: Tensor) -> Tensor:
    """Weights that a graft's query positions give to all its keys, [B, h, Q, M], for images [B, C, H, W].

    queries: positions on the graft's map in row-major order, [Q] or one set an image [B, Q]. Runs the model once, in
    the mode it is in, without gradients, with the block's own maths; only the rows asked for are computed.

    Raises:
        GraftError: the block has no attention weights, or did not run.
    """
    if not hasattr(graft.block, "attention_weights"):
        raise GraftError(
            f"graft {graft.name!r} at {graft.site!r} is a {type(graft.block).__name__}: no attention weights"
        )
    inputs: list[Tensor] = []
    handle = graft.block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        with torch.no_grad():
            model(images)
    finally:
        handle.remove()
    if not inputs:
        raise GraftError(
            f"graft {graft.name!r} at {graft.site!r} did not run: it is disabled or its module never fires"
        )
    with torch.no_grad():
        return graft.block.attention_weights(inputs[0], queries)  # type: ignore[operator]
