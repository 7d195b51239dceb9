"""Feature maps around attention: projections, pooling, heads, norms and residuals, without parameters."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_attn.errors import BlockError
from sagan_attn.functional.positions import sinusoids
from sagan_attn.functional.precision import no_autocast, product_dtype


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution of a map.

    x [B, C, H, W], weight [O, C, 1, 1], bias [O]; returns [B, O, H, W], channels last where x is. Unlike `F.conv2d` it
    takes maps with H or W of 0. Raises `BlockError` for an input that is not a map with C channels.
    """
    _check_map(x, weight.shape[1])
    dtype = product_dtype(x)
    if dtype != x.dtype:
        with no_autocast(x):
            return _pointwise(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
    return _pointwise(x, weight, bias)


def pointwise_each(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Several 1x1 convolutions of one map as one product, which reads the map once. As `pointwise`, for each."""
    bias = None
    with no_autocast(x):  # which refuses to join half-precision tensors on the CPU
        weight = torch.cat(list(weights))
        if any(part is not None for part in biases):
            pairs = zip(weights, biases, strict=True)
            bias = torch.cat([part.new_zeros(len(part)) if own is None else own for part, own in pairs])
    return pointwise(x, weight, bias).split([len(part) for part in weights], dim=1)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.stride(1) == 1 or x.numel() == 0:  # channels last: one product of matrices, without a copy
        return F.linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias)


def _check_map(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise BlockError(f"input of shape {tuple(x.shape)} does not fit: a map [B, {channels}, H, W] is required")


def pool_map(x: Tensor, size: int, mask: Tensor | None = None, ceil: bool = True) -> Tensor:
    """Max pooling with window and stride `size`.

    x [B, C, H, W]; returns [B, C, ceil(H/size), ceil(W/size)]: a window that hangs over the edge counts, so no position
    is lost. Without `ceil` what is left at the edge is dropped, as by `nn.MaxPool2d`, unless a side is shorter than a
    window. mask, boolean [B, H, W]: the maximum is taken over its true positions, and is 0 in windows without any.
    """
    if size == 1 or x.shape[2] == 0 or x.shape[3] == 0:
        return x
    if mask is None:
        return F.max_pool2d(x, size, ceil_mode=_hangs_over(x, size, ceil))
    _check_mask(mask, x)
    x = x.masked_fill(~mask[:, None], torch.finfo(x.dtype).min)
    return F.max_pool2d(x, size, ceil_mode=_hangs_over(x, size, ceil)).masked_fill(~_pool_mask(mask, size, ceil), 0)


def _hangs_over(x: Tensor, size: int, ceil: bool) -> bool:
    if ceil or x.shape[2] < size or x.shape[3] < size:  # noqa: SIM103 - max_pool2d takes no symbolic bool
        return True
    return False


def key_mask(x: Tensor, size: int, mask: Tensor | None, ceil: bool = True) -> Tensor | None:
    """The mask [B, 1, 1, M] of the keys made by `pool_map` from a map x [B, C, H, W] with a mask [B, H, W].

    None for None. Raises `BlockError` for a mask that does not fit the map.
    """
    if mask is None:
        return None
    _check_mask(mask, x)
    if size > 1 and mask.shape[1] and mask.shape[2]:
        mask = _pool_mask(mask, size, ceil)[:, 0]
    return mask.flatten(1)[:, None, None]


def _pool_mask(mask: Tensor, size: int, ceil: bool) -> Tensor:
    """Which windows of `pool_map` hold a true position of a mask [B, H, W]: [B, 1, rows, columns]."""
    ones = mask[:, None].to(torch.float32)
    return F.max_pool2d(ones, size, ceil_mode=_hangs_over(ones, size, ceil)) > 0


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise BlockError(f"mask must be a boolean tensor [B, H, W], not a {type(mask).__name__}")
    if mask.dtype != torch.bool or mask.shape != (x.shape[0], *x.shape[2:]):
        raise BlockError(
            f"mask of shape {tuple(mask.shape)} and {mask.dtype} must be boolean, True at positions to attend to, and "
            f"of shape [B, H, W] = {(x.shape[0], *x.shape[2:])}, as the map of the keys"
        )


def context_of(
    x: Tensor, context: Tensor | None, channels: int, context_channels: int, same_size: bool = False
) -> Tensor:
    """The map that keys and values come from: context, or x itself for None.

    Raises `BlockError` if x does not have so many channels, or the context not so many, the batch size of x and, for
    `same_size`, its height and width.
    """
    _check_map(x, channels)
    if context is None and channels == context_channels:
        return x
    height, width = x.shape[2:] if same_size else ("H", "W")
    required = f"a context of shape [{x.shape[0]}, {context_channels}, {height}, {width}] is required"
    if context is None:
        raise BlockError(f"{required}: none was given")
    fits = context.dim() == 4 and context.shape[:2] == (x.shape[0], context_channels)
    if not fits or (same_size and context.shape[2:] != x.shape[2:]):
        raise BlockError(f"{required}, not {tuple(context.shape)}" + (", for relative positions" if same_size else ""))
    return context


def context_mask_of(context: Tensor | None, mask: Tensor | None, context_mask: Tensor | None) -> Tensor | None:
    """The mask of the context, which is that of the map itself where the map is its own context."""
    return mask if context is None and context_mask is None else context_mask


def split_heads(x: Tensor, heads: int) -> Tensor:
    """A map [B, h*d, H, W] as rows of positions [B, h, N, d]: a view where the strides of x allow it."""
    b, c, height, width = x.shape
    return x.reshape(b, heads, c // heads, height * width).transpose(2, 3)


def merge_heads(rows: Tensor, like: Tensor) -> Tensor:
    """Rows of positions [B, h, N, D] as a map [B, h*D, H, W], with H and W those of `like`: a view where possible."""
    b, heads, _, size = rows.shape
    height, width = like.shape[2:]
    if rows.stride(-1) == 1 and like.stride(1) == 1:  # to channels last
        return rows.transpose(1, 2).reshape(b, height, width, heads * size).permute(0, 3, 1, 2)
    return rows.transpose(2, 3).reshape(b, heads * size, height, width)


def gated_residual(x: Tensor, branch: Tensor, gamma: Tensor) -> Tensor:
    """`x + gamma * branch`, in the dtype and with the strides of x.

    x and branch [B, C, H, W], gamma of one element. With gamma 0 and a finite branch the result equals x bit for
    bit. Keeping dtype and strides matters for that promise further on: in another memory format or precision the
    host's next layer rounds differently. (An expanded map, whose entries share memory, comes back dense.) The branch
    and gamma are brought to x's dtype first, so a float32 gamma does not promote a bfloat16 map, nor a half-precision
    branch lower a float32 one.
    """
    branch, gamma = branch.to(x.dtype), gamma.to(x.dtype)
    out = torch.addcmul(x, branch, gamma)
    if out.stride() != x.stride():
        # A sum of two maps takes the strides of the first, except along sides of length 1 and over holes.
        out = _copy(x).addcmul_(branch, gamma)
    return out


def residual(x: Tensor, branch: Tensor) -> Tensor:
    """`x + branch`, in the dtype and with the strides of x; see `gated_residual`. x and branch [B, C, H, W]."""
    branch = branch.to(x.dtype)
    out = torch.add(x, branch)
    if out.stride() != x.stride():
        out = _copy(x).add_(branch)
    return out


def _copy(x: Tensor) -> Tensor:
    """A copy with the strides of x, holes between its entries too; dense where entries of x share memory."""
    reach = 0  # how far the sides of smaller strides go
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return x.clone()
        reach += stride * (size - 1)
    return x.new_empty_strided(x.shape, x.stride()).copy_(x)


def add_sinusoids(x: Tensor) -> Tensor:
    """A map [B, C, H, W] plus sine and cosine of row and column; C a multiple of 4."""
    return x + sinusoids(x.shape[1], x.shape[2], x.shape[3], like=x).to(x.dtype)


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the channels of each position. x [B, C, H, W], weight and bias [C].

    Raises `BlockError` for an input that is not a map with C channels.
    """
    _check_map(x, weight.shape[0])
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
    [B, C, H, W], the others [C] but for batches, the number of batches so far; as in `nn.BatchNorm2d`.
    """
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
    autocast too.
    """
    with no_autocast(weight):
        matrix = weight.flatten(1)
        if update:
            with torch.no_grad():
                u.copy_(F.normalize(matrix @ v, dim=0, eps=eps))
                v.copy_(F.normalize(matrix.T @ u, dim=0, eps=eps))
        # Clones, because a second forward before backward changes u and v in place.
        return weight / (u.clone() @ (matrix @ v.clone()))


def summarize(x: Tensor, reduce: str) -> Tensor:
    """Maximum ("max") or mean ("mean") of a map [B, C, H, W] over its positions, [B, C, 1, 1]; 0 for an empty map."""
    if x.shape[2] == 0 or x.shape[3] == 0:
        return x.sum(dim=(2, 3), keepdim=True)
    return x.amax(dim=(2, 3), keepdim=True) if reduce == "max" else x.mean(dim=(2, 3), keepdim=True)


def weighted_mean(x: Tensor, scores: Tensor) -> Tensor:
    """Mean of a map [B, C, H, W] over its positions, weighed by the softmax of scores [B, 1, H, W]: [B, C, 1, 1].

    In the dtype of x, with weights of float32 or more under autocast too; 0 for an empty map.
    """
    precise = torch.promote_types(scores.dtype, torch.float32)
    with no_autocast(x):
        weights = scores.flatten(2).to(precise).softmax(dim=-1).to(x.dtype)  # [B, 1, N]
        return torch.matmul(x.flatten(2), weights.mT)[..., None]


def difference(y: Tensor, x: Tensor) -> Tensor:
    """`y - x` for two maps of one shape; broadcasting is refused with `BlockError`."""
    if y.shape != x.shape:
        raise BlockError(f"a gated block must keep the shape of its input: got {tuple(y.shape)} for {tuple(x.shape)}")
    return y - x
