"""The non-local block."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.base import MapAttention, resolve_scale
from sagan_attn.blocks.checks import flags, narrowed, one_of, positive
from sagan_attn.blocks.norms import BranchNorm
from sagan_attn.blocks.pointwise import Init, Pointwise, initialise
from sagan_attn.functional.paths import Path

Mode = Literal["embedded_gaussian", "gaussian", "dot_product", "concatenation"]
MODES: dict[str, dict[str, Any]] = {
    "embedded_gaussian": {},
    "gaussian": {},
    "dot_product": {"normalize": "mean"},
    "concatenation": {"score": "concatenation", "normalize": "mean"},
}


class NonLocal2d(MapAttention):
    """Non-local block: `x + norm(output(attention(x)))`.

    Input and output [B, in_channels, H, W], same dtype and strides; an optional mask, boolean [B, H, W], is True at
    the positions that may be attended to. A fresh block is the identity, because the last norm, or without one the
    last convolution, starts at 0.

    Source: Wang et al., Non-local Neural Networks, 2018 (arXiv:1711.07971), whose theta, phi, g and W are here
    `query`, `key`, `value` and `output`. Its scores are unscaled. The codes differ: the authors' Caffe2 code scales
    by 1 / sqrt(d), pools before the convolutions and starts them at N(0, 0.01) (registered as `nonlocal-caffe2`);
    AlexHex7's PyTorch code pools after them (`nonlocal-alexhex7`); mmcv scales, does not pool, and has no norm unless
    asked (`nonlocal-mmcv`); timm scales by 1 / sqrt(in_channels) and has in_channels / 8 features, in eights
    (`nonlocal-timm`).

    Args:
        in_channels: channels of the map.
        mode: "embedded_gaussian", softmax of query.key; "gaussian", the same of the map itself, without query and
            key convolutions; "dot_product", query.key / M; "concatenation", relu(w.[query; key]) / M.
        reduction: queries, keys and values have in_channels // reduction channels; None for 2, or 1 of 1 channel.
        divisor: round that to a multiple of it, at least one, and down by at most 10 %, as timm does.
        scale: factor on the scores of the embedded Gaussian; "sqrt" for 1 / sqrt(d), "input" for
            1 / sqrt(in_channels), None for none. The other modes have none in any of the codes, nor here.
        pool: max-pooling window and stride on keys and values; 1 for none. As in the codes, the last row and column
            of a map of odd size are left out (not so in `SelfAttention2d`, whose public codes fail there).
        pool_first: pool the map before the convolutions of keys and values, not their results.
        bias: whether the convolutions have biases.
        norm: whether a batch norm follows `output`.
        init: first weights of the convolutions, but for an `output` that starts at 0; see `initialise`.
        path: how attention is computed; see `functional.attend`.

    Raises:
        BlockError: an option out of range; in forward, an input with other channels.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        mode: Mode = "embedded_gaussian",
        reduction: int | None = None,
        divisor: int = 1,
        scale: float | Literal["sqrt", "input"] | None = None,
        pool: int = 1,
        pool_first: bool = False,
        bias: bool = True,
        norm: bool = True,
        init: Init = "torch",
        path: Path = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        positive(in_channels=in_channels, divisor=divisor, reduction=2 if reduction is None else reduction)
        one_of("mode", mode, get_args(Mode))
        flags(bias=bias, norm=norm, pool_first=pool_first)
        if divisor > 1:
            inner = _rounded(in_channels / (2 if reduction is None else reduction), divisor)
        else:
            inner = narrowed(in_channels, "reduction", min(2, in_channels) if reduction is None else reduction)
        size = in_channels if mode == "gaussian" else inner
        factor = resolve_scale(in_channels**-0.5 if scale == "input" else scale, size, "'sqrt', 'input'")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            in_channels,
            heads=1,
            scale=factor if mode == "embedded_gaussian" else 1.0,
            context_channels=in_channels,
            head_size=size,
            pool=pool,
            pool_first=pool_first,
            pool_ceil=False,
            path=path,
            **MODES[mode],
            **dd,
        )
        self.mode = mode
        own = mode != "gaussian"
        self.query = Pointwise(in_channels, inner, bias, **dd) if own else None
        self.key = Pointwise(in_channels, inner, bias, **dd) if own else None
        self.value = Pointwise(in_channels, inner, bias, **dd)
        self.output = output = Pointwise(inner, in_channels, bias, **dd)
        self.norm = BranchNorm(in_channels, **dd) if norm else None
        initialise((self.query, self.key, self.value, output), init)
        for parameter in (self.norm or output).parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        branch = self.branch(x, mask=mask)
        return functional.residual(x, branch if self.norm is None else self.norm(branch))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"


def _rounded(channels: float, divisor: int) -> int:
    """The nearest multiple of divisor, at least one, and the next one where that loses more than a tenth."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest
