"""Norms of maps and weights, without parameters of their own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_attn.errors import BlockError
from sagan_attn.functional.checks import (
    check_alike,
    check_devices,
    check_flag,
    check_floats,
    check_map,
    check_number,
    check_shape,
)
from sagan_attn.functional.precision import no_autocast

__all__ = ["branch_norm", "channel_norm", "spectrally_normalized"]


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the channels of each position. x [B, C, H, W], weight and bias [C].

    Raises `BlockError` for an input that is not a map with C channels.
    """
    check_shape("weight", weight, ("C",))
    check_map(x, weight.shape[0])
    if bias is not None:
        check_shape("bias", bias, weight.shape)
    check_alike(x, weight=weight, bias=bias)
    check_number("eps", eps)
    rows = x.permute(0, 2, 3, 1)
    return F.layer_norm(rows, rows.shape[-1:], weight, bias, eps).permute(0, 3, 1, 2)


def branch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Batch norm that also takes maps with one value a channel or none, which have no variance.

    Those are normalised by the running statistics, which they do not move, or by none where there are none. x
    [B, C, H, W], the others [C] but for batches, the number of batches so far; as in `nn.BatchNorm2d`. Raises
    `BlockError` for others.
    """
    own = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_map(x)
    for name, part in own.items():
        if part is not None or name in ("weight", "bias"):
            check_shape(name, part, (x.shape[1],))  # type: ignore[arg-type]
            if (part.dtype == torch.float64) != (x.dtype == torch.float64):  # type: ignore[union-attr]
                check_alike(x, **{name: part})
    if (running_mean is None) != (running_var is None):
        raise BlockError("running_mean and running_var go together: give both or none")
    check_devices(x, **own)
    if batches is not None and (not isinstance(batches, Tensor) or batches.dtype != torch.int64 or batches.dim()):
        raise BlockError(f"batches ({batches!r:.100}) must be a tensor of one whole number, or None")
    check_flag("training", training)
    check_devices(x, batches=batches)
    check_number("eps", eps)
    check_number("momentum", 0.0 if momentum is None else momentum)
    if x.numel() == 0:
        return x * weight[:, None, None] + bias[:, None, None]
    if weight.dtype != torch.float32:  # statistics in half precision go with maps of the same; autocast may differ
        x = x.to(weight.dtype)
    if x.numel() == x.shape[1]:
        if running_mean is None:
            running_mean, running_var = torch.zeros_like(weight), torch.ones_like(weight)
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    if training and batches is not None:
        batches.add_(1)
        momentum = 1 / float(batches) if momentum is None else momentum
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum or 0.0, eps)


def spectrally_normalized(weight: Tensor, u: Tensor, v: Tensor, update: bool, eps: float = 1e-12) -> Tensor:
    """A weight over the estimate u.W v of its largest singular value, W being the weight as [out, in * ...].

    weight [out, in, ...], u [out] and v [in * ...] its singular vectors, first improved in place by one step of power
    iteration if `update`. Gradients flow through W in the estimate. Computed in the dtype of the weight, under
    autocast too. Raises `BlockError` for tensors of other shapes, dtypes or devices.
    """
    check_floats("weight", weight)
    if weight.dim() < 2:
        raise BlockError(f"weight of shape {tuple(weight.shape)} must be of shape [out, in, ...]")
    check_shape("u", u, weight.shape[:1])
    check_shape("v", v, (weight.shape[1:].numel(),))
    for name, vector in (("u", u), ("v", v)):
        if vector.dtype != weight.dtype:
            raise BlockError(f"{name} of {vector.dtype} must be of {weight.dtype}, as the weight")
    check_devices(weight, u=u, v=v)
    check_flag("update", update)
    check_number("eps", eps)
    with no_autocast(weight):
        matrix = weight.flatten(1)
        if update:
            with torch.no_grad():
                u.copy_(F.normalize(matrix @ v, dim=0, eps=eps))
                v.copy_(F.normalize(matrix.T @ u, dim=0, eps=eps))
        # Clones, because a second forward before backward changes u and v in place.
        return weight / (u.clone() @ (matrix @ v.clone()))
