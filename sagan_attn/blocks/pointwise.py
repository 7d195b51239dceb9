"""1x1 convolutions: plain, and with spectral normalisation that pickles."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_attn import functional


class Pointwise(nn.Conv2d):
    """A 1x1 convolution; `nn.Conv2d(in_channels, out_channels, 1)` that also takes empty maps.

    Input [B, in_channels, H, W], output [B, out_channels, H, W]; raises `BlockError` for any other input.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return functional.pointwise(input, self.weight, self.bias)


class SpectralPointwise(Pointwise):
    """A 1x1 convolution whose weight is divided by its largest singular value (Miyato et al. 2018).

    The singular vectors are tracked by one step of power iteration a training forward, as in
    `torch.nn.utils.parametrizations.spectral_norm`; numbers and gradients are the same. That one makes a class of
    its own for the module, which cannot be pickled, and renames `weight`; here `weight` is the raw weight and
    `weight_u` [out_channels] and `weight_v` [in_channels] are buffers. Autocast does not touch the norm.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, bias)
        self.register_buffer("weight_u", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(in_channels), dim=0))
        for _ in range(15):
            functional.spectrally_normalized(self.weight, self.weight_u, self.weight_v, update=True)

    def forward(self, input: Tensor) -> Tensor:
        weight = functional.spectrally_normalized(self.weight, self.weight_u, self.weight_v, self.training)
        return functional.pointwise(input, weight, self.bias)
