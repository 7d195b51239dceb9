"""Feature maps around attention: projections, pooling, heads and residuals, without parameters."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_attn.errors import BlockError
from sagan_attn.functional.checks import (
    check_alike,
    check_devices,
    check_flag,
    check_floats,
    check_heads,
    check_map,
    check_shape,
    check_whole,
)
from sagan_attn.functional.positions import sinusoids
from sagan_attn.functional.precision import no_autocast, product_dtype

LARGEST_WINDOW = 2**31 - 1  # torch's


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution of a map.

    x [B, C, H, W], weight [O, C, 1, 1], bias [O]; returns [B, O, H, W], channels last where x is. Unlike `F.conv2d` it
    takes maps with H or W of 0. Raises `BlockError` for an input that is not a map with C channels, or not of the
    device and dtype of the weight.
    """
    _check_convolution(x, weight, bias)
    dtype = product_dtype(x)
    if dtype != x.dtype:
        with no_autocast(x):
            return _pointwise(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
    return _pointwise(x, weight, bias)


def pointwise_each(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Several 1x1 convolutions of one map as one product, which reads the map once. As `pointwise`, for each."""
    bias = None
    check_floats("input", x)
    for name, parts in (("weights", weights), ("biases", biases)):
        if not isinstance(parts, (list, tuple)) or not parts or len(parts) != len(weights):
            raise BlockError(f"{name} must be a list of at least one, and weights and biases as many")
    for weight, bias in zip(weights, biases, strict=True):
        _check_convolution(x, weight, bias)
    with no_autocast(x):  # which refuses to join half-precision tensors on the CPU
        weight = torch.cat(list(weights))
        if any(part is not None for part in biases):
            pairs = zip(weights, biases, strict=True)
            bias = torch.cat([part.new_zeros(len(part)) if own is None else own for part, own in pairs])
    return pointwise(x, weight, bias).split([len(part) for part in weights], dim=1)


def _check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_shape("weight", weight, ("O", "C", 1, 1))
    check_map(x, weight.shape[1])
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1])
    check_alike(x, weight=weight, bias=bias)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.stride(1) == 1 or x.numel() == 0:  # channels last: one product of matrices, without a copy
        return F.linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias)


def pool_map(x: Tensor, size: int, mask: Tensor | None = None, ceil: bool = True) -> Tensor:
    """Max pooling with window and stride `size`.

    x [B, C, H, W]; returns [B, C, ceil(H/size), ceil(W/size)]: a window that hangs over the edge counts, so no position
    is lost. Without `ceil` what is left at the edge is dropped, as by `nn.MaxPool2d`, unless a side is shorter than a
    window. mask, boolean [B, H, W]: the maximum is taken over its true positions, and is 0 in windows without any.
    Raises `BlockError` for what is no map, a mask that does not fit, or a window of less than 1 or more than 2^31 - 1.
    """
    check_map(x)
    _check_window(size, ceil)
    if size == 1 or x.shape[2] == 0 or x.shape[3] == 0:
        return x
    if mask is None:
        return F.max_pool2d(x, size, ceil_mode=_hangs_over(x, size, ceil))
    _check_mask(mask, x)
    x = x.masked_fill(~mask[:, None], torch.finfo(x.dtype).min)
    return F.max_pool2d(x, size, ceil_mode=_hangs_over(x, size, ceil)).masked_fill(~_pool_mask(mask, size, ceil), 0)


def _check_window(size: int, ceil: bool) -> None:
    check_flag("ceil", ceil)
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST_WINDOW:
        raise BlockError(f"size ({size!r:.100}) of a window must be a whole number from 1 to {LARGEST_WINDOW}")


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
    check_map(x)
    _check_window(size, ceil)
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
    check_devices(x, mask=mask)
    fits = mask.dtype == torch.bool and mask.layout == torch.strided and mask.shape == (x.shape[0], *x.shape[2:])
    if not fits:
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
    check_whole("channels", channels)
    check_whole("context_channels", context_channels)
    check_flag("same_size", same_size)
    check_map(x, channels)
    if context is None and channels == context_channels:
        return x
    height, width = x.shape[2:] if same_size else ("H", "W")
    required = f"a context of shape [{x.shape[0]}, {context_channels}, {height}, {width}] is required"
    if context is None:
        raise BlockError(f"{required}: none was given")
    check_floats("context", context)
    check_alike(x, context=context)
    fits = context.dim() == 4 and context.shape[:2] == (x.shape[0], context_channels)
    if not fits or (same_size and context.shape[2:] != x.shape[2:]):
        raise BlockError(f"{required}, not {tuple(context.shape)}" + (", for relative positions" if same_size else ""))
    return context


def context_mask_of(context: Tensor | None, mask: Tensor | None, context_mask: Tensor | None) -> Tensor | None:
    """The mask of the context, which is that of the map itself where the map is its own context."""
    return mask if context is None and context_mask is None else context_mask


def split_heads(x: Tensor, heads: int) -> Tensor:
    """A map [B, h*d, H, W] as rows of positions [B, h, N, d]: a view where the strides of x allow it.

    Raises `BlockError` for what is no map, and for heads that do not divide its channels.
    """
    check_map(x)
    b, c, height, width = x.shape
    check_heads("the channels", heads, c)
    return x.reshape(b, heads, c // heads, height * width).transpose(2, 3)


def merge_heads(rows: Tensor, like: Tensor) -> Tensor:
    """Rows of positions [B, h, N, D] as a map [B, h*D, H, W], with H and W those of `like`: a view where possible.

    Raises `BlockError` for rows that are not the positions of `like`.
    """
    check_map(like)
    height, width = like.shape[2:]
    check_shape("rows", rows, (like.shape[0], "h", height * width, "D"))
    b, heads, _, size = rows.shape
    if rows.stride(-1) == 1 and like.stride(1) == 1:  # to channels last
        return rows.transpose(1, 2).reshape(b, height, width, heads * size).permute(0, 3, 1, 2)
    return rows.transpose(2, 3).reshape(b, heads * size, height, width)


def gated_residual(x: Tensor, branch: Tensor, gamma: Tensor) -> Tensor:
    """`x + gamma * branch`, in the dtype and with the strides of x.

    x and branch [B, C, H, W], gamma of one element. With gamma 0 and a finite branch the result equals x bit for
    bit. Keeping dtype and strides matters for that promise further on: in another memory format or precision the
    host's next layer rounds differently. (An expanded map, whose entries share memory, comes back dense.) The branch
    and gamma are brought to x's dtype first, so a float32 gamma does not promote a bfloat16 map, nor a half-precision
    branch lower a float32 one. Raises `BlockError` for a branch of another shape than x.
    """
    _check_branch(x, branch)
    check_floats("gamma", gamma)
    if gamma.numel() != 1:
        raise BlockError(f"gamma of shape {tuple(gamma.shape)} must have one element")
    check_devices(x, gamma=gamma)
    branch, gamma = branch.to(x.dtype), gamma.to(x.dtype)
    out = torch.addcmul(x, branch, gamma)
    if out.stride() != x.stride():
        # A sum of two maps takes the strides of the first, except along sides of length 1 and over holes.
        out = _copy(x).addcmul_(branch, gamma)
    return out


def residual(x: Tensor, branch: Tensor) -> Tensor:
    """`x + branch`, in the dtype and with the strides of x; see `gated_residual`. x and branch of any one shape."""
    _check_branch(x, branch)
    branch = branch.to(x.dtype)
    out = torch.add(x, branch)
    if out.stride() != x.stride():
        out = _copy(x).add_(branch)
    return out


def _check_branch(x: Tensor, branch: Tensor) -> None:
    check_floats("input", x)
    check_shape("branch", branch, x.shape)
    check_devices(x, branch=branch)


def _copy(x: Tensor) -> Tensor:
    """A copy with the strides of x, holes between its entries too; dense where entries of x share memory."""
    reach = 0  # how far the sides of smaller strides go
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return x.clone()
        reach += stride * (size - 1)
    return x.new_empty_strided(x.shape, x.stride()).copy_(x)


def add_sinusoids(x: Tensor) -> Tensor:
    """A map [B, C, H, W] plus sine and cosine of row and column. Raises `BlockError` unless C is a multiple of 4."""
    check_map(x)
    if x.shape[1] % 4:
        raise BlockError(f"input of {x.shape[1]} channels: sinusoids need channels in fours")
    return x + sinusoids(x.shape[1], x.shape[2], x.shape[3], like=x).to(x.dtype)


def summarize(x: Tensor, reduce: str) -> Tensor:
    """Maximum ("max") or mean ("mean") of a map [B, C, H, W] over its positions, [B, C, 1, 1]; 0 for an empty map."""
    check_map(x)
    if reduce not in ("max", "mean"):
        raise BlockError(f"reduce ({reduce!r:.100}) must be 'max' or 'mean'")
    if x.shape[2] == 0 or x.shape[3] == 0:
        return x.sum(dim=(2, 3), keepdim=True)
    return x.amax(dim=(2, 3), keepdim=True) if reduce == "max" else x.mean(dim=(2, 3), keepdim=True)


def weighted_mean(x: Tensor, scores: Tensor) -> Tensor:
    """Mean of a map [B, C, H, W] over its positions, weighed by the softmax of scores [B, 1, H, W]: [B, C, 1, 1].

    In the dtype of x, with weights of float32 or more under autocast too; 0 for an empty map. Raises `BlockError` for
    scores of another shape.
    """
    check_map(x)
    check_shape("scores", scores, (x.shape[0], 1, *x.shape[2:]))
    check_devices(x, scores=scores)
    precise = torch.promote_types(scores.dtype, torch.float32)
    with no_autocast(x):
        weights = scores.flatten(2).to(precise).softmax(dim=-1).to(x.dtype)  # [B, 1, N]
        return torch.matmul(x.flatten(2), weights.mT)[..., None]


def difference(y: Tensor, x: Tensor) -> Tensor:
    """`y - x` for two maps of one shape; broadcasting is refused with `BlockError`."""
    check_floats("input", x)
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.layout != torch.strided:
        found = f"a {y.layout} tensor of {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise BlockError(f"a gated block must give a floating-point map as its input, not {found}")
    if y.shape != x.shape:
        raise BlockError(f"a gated block must keep the shape of its input: got {tuple(y.shape)} for {tuple(x.shape)}")
    return y - x
