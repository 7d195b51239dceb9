"""Attention maths on feature maps, without parameters.

Letters, here and everywhere in the library: B batch, C channels, H and W height and width of a map, N = H*W query
positions, M key positions, h heads, d query/key size a head, D value size a head.

The functions are leaves for `torch.fx`: a traced model shows one node a function, so they may look at real shapes
and strides. For that to work they are called through the module (`functional.attend`), never imported by name.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sagan_attn.errors import BlockError

__all__ = [
    "attend",
    "attention_output",
    "attention_weights",
    "difference",
    "gated_residual",
    "merge_heads",
    "pointwise",
    "pool_map",
    "spectrally_normalized",
    "split_heads",
    "summarize",
]


@fx.wrap
def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution of a map.

    x [B, C, H, W], weight [O, C, 1, 1], bias [O]; returns [B, O, H, W]. Unlike `F.conv2d` it takes maps with H or W
    of 0. Raises `BlockError` for an input that is not a map with C channels.
    """
    if x.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise BlockError(
            f"input of shape {tuple(x.shape)} does not fit: a map [B, {weight.shape[1]}, H, W] is required"
        )
    if x.shape[2] == 0 or x.shape[3] == 0:
        empty = torch.einsum("bchw,oc->bohw", x, weight[:, :, 0, 0])  # the weights stay part of the graph
        return empty if bias is None else empty + bias.to(empty.dtype)[:, None, None]
    return F.conv2d(x, weight, bias)


@fx.wrap
def pool_map(x: Tensor, size: int) -> Tensor:
    """Max pooling with window and stride `size`; a window that hangs over the edge counts, so no position is lost.

    x [B, C, H, W]; returns [B, C, ceil(H/size), ceil(W/size)]. For H and W divisible by `size` this is the usual
    pooling of the public SAGAN and BigGAN codes, which fail on odd and on 1x1 maps.
    """
    if size == 1 or x.shape[2] == 0 or x.shape[3] == 0:
        return x
    return F.max_pool2d(x, size, ceil_mode=True)


@fx.wrap
def split_heads(x: Tensor, heads: int) -> Tensor:
    """A map [B, h*d, H, W] as rows of positions [B, h, N, d]: a view where the strides of x allow it."""
    b, c, height, width = x.shape
    return x.reshape(b, heads, c // heads, height * width).transpose(2, 3)


@fx.wrap
def merge_heads(rows: Tensor, like: Tensor) -> Tensor:
    """Rows of positions [B, h, N, D] as a map [B, h*D, H, W], with H and W those of `like`."""
    b, heads, _, size = rows.shape
    return rows.transpose(2, 3).reshape(b, heads * size, like.shape[2], like.shape[3])


@fx.wrap
def attention_weights(query: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """softmax over the keys of `scale * query . key`.

    query [B, h, N, d], key [B, h, M, d]; returns [B, h, N, M], whose rows sum to 1. Scores and softmax are computed
    in float32 (float64 for float64 inputs), under autocast too: unscaled scores pass the largest float16, 65504,
    easily. The weights come back in that precision.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    with _no_autocast(query):
        scores = torch.matmul(query.to(precise) * scale, key.to(precise).transpose(-2, -1))  # [B, h, N, M]
        return scores.softmax(dim=-1)


@fx.wrap
def attention_output(weights: Tensor, value: Tensor) -> Tensor:
    """Each query's weighted sum of values. weights [B, h, N, M], value [B, h, M, D]; returns [B, h, N, D]."""
    return torch.matmul(weights.to(value.dtype), value)


@fx.wrap
def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """Attention: `attention_output(attention_weights(query, key), value)`.

    query [B, h, N, d], key [B, h, M, d], value [B, h, M, D]; returns [B, h, N, D] in the dtype of value. Holds the
    weights, B*h*N*M numbers, in memory.
    """
    return attention_output(attention_weights(query, key, scale), value)


@fx.wrap
def gated_residual(x: Tensor, branch: Tensor, gamma: Tensor) -> Tensor:
    """`x + gamma * branch`, in the dtype and with the strides of x.

    x and branch [B, C, H, W], gamma of one element. With gamma 0 and a finite branch the result equals x bit for
    bit. Keeping dtype and strides matters for that promise further on: in another memory format or precision the
    host's next layer rounds differently. The branch and gamma are brought to x's dtype first, so a float32 gamma
    does not promote a bfloat16 map, nor a half-precision branch lower a float32 one.
    """
    branch, gamma = branch.to(x.dtype), gamma.to(x.dtype)
    out = torch.addcmul(x, branch, gamma)
    if out.stride() != x.stride():
        # A sum of two maps takes the strides of the first, except along sides of length 1. A clone keeps those too.
        out = x.clone().addcmul_(branch, gamma)
    return out


@fx.wrap
def spectrally_normalized(weight: Tensor, u: Tensor, v: Tensor, update: bool, eps: float = 1e-12) -> Tensor:
    """A weight over the estimate u.W v of its largest singular value, W being the weight as [out, in * ...].

    weight [out, in, ...], u [out] and v [in * ...] its singular vectors, first improved in place by one step of power
    iteration if `update`. Gradients flow through W in the estimate. Computed in the dtype of the weight, under
    autocast too.
    """
    with _no_autocast(weight):
        matrix = weight.flatten(1)
        if update:
            with torch.no_grad():
                u.copy_(F.normalize(matrix @ v, dim=0, eps=eps))
                v.copy_(F.normalize(matrix.T @ u, dim=0, eps=eps))
        # Clones, because a second forward before backward changes u and v in place.
        return weight / (u.clone() @ (matrix @ v.clone()))


@fx.wrap
def summarize(x: Tensor, reduce: str) -> Tensor:
    """Maximum ("max") or mean ("mean") of a map [B, C, H, W] over its positions, [B, C, 1, 1]; 0 for an empty map."""
    if x.shape[2] == 0 or x.shape[3] == 0:
        return x.sum(dim=(2, 3), keepdim=True)
    return x.amax(dim=(2, 3), keepdim=True) if reduce == "max" else x.mean(dim=(2, 3), keepdim=True)


@fx.wrap
def difference(y: Tensor, x: Tensor) -> Tensor:
    """`y - x` for two maps of one shape; broadcasting is refused with `BlockError`."""
    if y.shape != x.shape:
        raise BlockError(f"a gated block must keep the shape of its input: got {tuple(y.shape)} for {tuple(x.shape)}")
    return y - x


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off for x's device. Entered only where it is on, so that exported graphs stay free of it."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # there is no autocast for meta tensors
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
