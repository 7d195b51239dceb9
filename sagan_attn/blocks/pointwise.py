"""1x1 convolutions: plain, and with spectral normalisation that pickles; and the ways their weights start."""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.checks import one_of

__all__ = ["Init", "Pointwise", "SpectralPointwise", "can_be_joined", "initialise"]

Init = Literal["torch", "normal", "kaiming", "trunc_normal"]


class Pointwise(nn.Module):
    """A 1x1 convolution; `nn.Conv2d(in_channels, out_channels, 1)` that also takes empty maps.

    Input [B, in_channels, H, W], output [B, out_channels, H, W]; raises `BlockError` for any other input. The weight
    [out_channels, in_channels, 1, 1] of an `nn.Conv2d`, and that of an `nn.Linear` or of an `nn.Conv1d` of size 1,
    load: it is the same map, position by position. First weights as `nn.Conv2d`. It is none itself, because hosts
    like timm's give each `nn.Conv2d` in them new first weights, and what starts at 0 has to stay there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(in_channels**-0.5), in_channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.pointwise(x, self.used_weight(), self.bias)

    def used_weight(self) -> Tensor:
        """The weight that a forward multiplies by."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}" + ("" if self.bias is not None else ", bias=False")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and (weight.dim() == 2 or (weight.dim() == 3 and weight.shape[2] == 1)):
            state_dict[prefix + "weight"] = weight.reshape(*weight.shape[:2], 1, 1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SpectralPointwise(Pointwise):
    """A 1x1 convolution whose weight is divided by its largest singular value (Miyato et al. 2018).

    The singular vectors are tracked by one step of power iteration a training forward, as in
    `torch.nn.utils.parametrizations.spectral_norm`; numbers and gradients are the same. That one makes a class of
    its own for the module, which cannot be pickled, and renames `weight`; here `weight` is the raw weight and
    `weight_u` [out_channels] and `weight_v` [in_channels] are buffers. Autocast does not touch the norm.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, bias, device, dtype)
        self.register_buffer("weight_u", F.normalize(torch.randn(out_channels, device=device, dtype=dtype), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(in_channels, device=device, dtype=dtype), dim=0))
        self.iterate()

    def iterate(self, steps: int = 15) -> None:
        """Improve the singular vectors, which changed weights call for. Without weights (device "meta") nothing."""
        for _ in range(steps):
            functional.spectrally_normalized(self.weight, self.weight_u, self.weight_v, update=True)

    def used_weight(self) -> Tensor:
        return functional.spectrally_normalized(self.weight, self.weight_u, self.weight_v, self.training)


def can_be_joined(convs: Iterable[Pointwise | None]) -> bool:
    """Whether convolutions can be done as one product: nobody waits for a call of one of them."""
    return all(
        conv is not None
        and type(conv) in (Pointwise, SpectralPointwise)
        and not (conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks)
        for conv in convs
    )


def initialise(convs: Iterable[Pointwise | None], init: Init) -> None:
    """Give convolutions their first weights.

    "torch": those of `nn.Conv2d`. "normal": N(0, 0.01). "kaiming": He's for the outputs (fan_out). "trunc_normal":
    standard deviation in_channels^-0.5, cut at 2. The last three set biases to 0. Raises `BlockError` for another.
    """
    one_of("init", init, get_args(Init))
    if init == "torch":
        return
    for conv in convs:
        if conv is None:
            continue
        if init == "normal":
            nn.init.normal_(conv.weight, std=0.01)
        elif init == "kaiming":
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.trunc_normal_(conv.weight, std=conv.in_channels**-0.5)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        if isinstance(conv, SpectralPointwise):
            conv.iterate()
