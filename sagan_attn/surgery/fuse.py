"""A copy of a grafted model for deployment."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sagan_attn.blocks.base import MapAttention
from sagan_attn.blocks.bottleneck import Bottleneck2d
from sagan_attn.blocks.channel import GCBlock2d, SqueezeExcite2d
from sagan_attn.blocks.context import GlobalContext2d
from sagan_attn.blocks.fused import FusedAttention2d
from sagan_attn.blocks.gate import Gated
from sagan_attn.blocks.identity import IdentityAttention2d
from sagan_attn.blocks.multihead import CrossAttention2d, MultiHeadAttention2d
from sagan_attn.blocks.nonlocal_ import NonLocal2d
from sagan_attn.blocks.pointwise import Pointwise, SpectralPointwise
from sagan_attn.blocks.sagan import SelfAttention2d
from sagan_attn.blocks.transformer import DecoderBlock2d, EncoderBlock2d
from sagan_attn.errors import GraftError
from sagan_attn.surgery import point as points_
from sagan_attn.surgery.graft import grafts_of

__all__ = ["fuse"]

CONTROLS = (Bottleneck2d, GCBlock2d, GlobalContext2d, IdentityAttention2d, SqueezeExcite2d)  # x + gamma * branch(x)


def fuse(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode that computes the same, up to rounding, with less: for inference alone.

    Each grafted `SelfAttention2d`, `NonLocal2d`, `MultiHeadAttention2d` and `CrossAttention2d` becomes a
    `FusedAttention2d`, which says what is folded; so does the attention inside of encoders, decoders and gates. A
    graft whose gamma, or whose last convolution, is exactly 0 is the identity and is left out, unless a number in it
    is NaN or infinite, which then shows in the output as it did before. Any other block, a class of one's own, one
    with forward hooks or with parts of other classes, stays as it is. The copy exports and compiles; its grafts keep
    names and places, but their weights are of another form than those that were trained.

    Raises:
        GraftError: a model without grafts.
    """
    if not grafts_of(model):
        raise GraftError(f"{type(model).__name__} has no grafts to fuse")
    fused = copy.deepcopy(model).eval()
    done: dict[nn.Module, nn.Module | None] = {}  # a block may be at several places
    with torch.no_grad():
        for graft in grafts_of(fused):
            if graft.block not in done:
                done[graft.block] = _fused(graft.block)
            block = done[graft.block]
            if block is None:
                points_.remove(graft.anchor, graft.name)
            else:
                graft.point._modules[graft.name] = block
    return fused


def _fused(block: nn.Module) -> nn.Module | None:
    """A block in its shortest form, None for the identity; encoders, decoders and gates are changed in place."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in block.modules()):
        return block
    kind = type(block)
    if isinstance(block, MapAttention):
        if not _is_known(block):
            return block
        fused = FusedAttention2d(block)
        return None if fused.is_identity() else fused
    if isinstance(block, CONTROLS) and kind in CONTROLS and _is_zero(block.gamma) and _is_finite(block):
        return None
    if isinstance(block, Gated) and kind is Gated:
        inner = _fused(block.block)
        if (inner is None or _is_zero(block.gamma)) and _is_finite(block):
            return None
        block.block = block.block if inner is None else inner
    if isinstance(block, EncoderBlock2d) and kind in (EncoderBlock2d, DecoderBlock2d):
        return _fused_layer(block)
    return block


def _fused_layer(layer: EncoderBlock2d) -> nn.Module | None:
    steps = []
    for name in ("attention", "cross"):
        attention = layer._modules.get(name)
        if isinstance(attention, MapAttention) and _is_known(attention):
            layer._modules[name] = attention = FusedAttention2d(attention)
            steps.append(attention.is_identity())
        elif attention is not None:
            steps.append(False)
    plain = type(layer.linear2) is Pointwise and all(_is_zero(p) for p in layer.linear2.parameters())
    return None if layer.norm_first and plain and all(steps) and _is_finite(layer) else layer


def _is_known(block: MapAttention) -> bool:
    """Whether a block is one whose whole computation is known, so that `FusedAttention2d` can stand for it."""
    if type(block) not in (SelfAttention2d, NonLocal2d, MultiHeadAttention2d, CrossAttention2d):
        return False
    convs = [conv for conv in (block.query, block.key, block.value, block.output) if conv is not None]
    norm = getattr(block, "norm", None)
    known_norm = norm is None or (isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.affine)
    own = block.context_channels == block.in_channels
    return own and known_norm and all(type(conv) in (Pointwise, SpectralPointwise) for conv in convs)


def _is_zero(parameter: torch.Tensor | nn.Module) -> bool:
    return isinstance(parameter, torch.Tensor) and not parameter.is_meta and not parameter.count_nonzero()


def _is_finite(block: nn.Module) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in (*block.parameters(), *block.buffers()))
