"""timm's channel attention behind the gate, as more cases for the contract of the blocks."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from block_forms import CASES, Case, contributing, seed
from timm.layers import GlobalContext, SqueezeExcite
from timm.layers.cbam import CbamModule
from torch import nn

from sagan_attn.blocks import Gated

TIMM: dict[str, type[nn.Module]] = {
    "squeeze-excite": SqueezeExcite,
    "cbam": CbamModule,
    "global-context": GlobalContext,
}


@dataclass(frozen=True)
class GatedCase(Case):
    """A class of timm inside of `Gated`, and what the class can do by itself."""

    def bare(self, channels: int = 8) -> nn.Module:
        seed()
        return TIMM[self.name](channels, **self.options)

    def fresh(self, channels: int = 8, **more: Any) -> nn.Module:
        with torch.device(more.pop("device", "cpu")):  # older timm has no such arguments
            return Gated(self.bare(channels)).to(**more)

    def opened(self, channels: int = 8, **more: Any) -> nn.Module:
        return contributing(self.fresh(channels, **more))

    @property
    def attends(self) -> bool:
        return False

    @property
    def directions(self) -> bool:
        return self.name == "cbam"  # a 7 x 7 convolution

    def channels(self) -> tuple[int, ...]:
        return 8, 1, 3

    def takes(self, shape: tuple[int, ...], training: bool = False) -> bool:
        """Maxima, means and a softmax need a position, and the batch norm of CBAM two of them to learn from."""
        if self.name == "squeeze-excite":
            return 0 not in shape[2:] or shape[0] == 0
        one_value = math.prod((shape[0], *shape[2:])) == 1
        return 0 not in shape[2:] and not (training and one_value and self.name == "cbam")

    def takes_autocast(self, dtype: torch.dtype) -> bool:
        """A norm with weights of one half precision takes no map of the other."""
        return dtype != torch.float16 or self.name == "squeeze-excite"


HALF = {"rd_ratio": 0.5}  # by default 8 channels are squeezed to a single one, which a ReLU soon cuts off
GATED = [GatedCase(name, name, HALF) for name in TIMM]
CONTRACT: list[Case] = [*CASES, *GATED]
