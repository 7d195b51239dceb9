"""What transformer layers on maps and on sequences share: the order of norm, step and sum, and the ffn."""

from collections.abc import Callable
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.checks import flags, one_of, probability

__all__ = ["Activation", "TransformerLayer"]

Activation = Literal["relu", "gelu"]


class TransformerLayer(nn.Module):
    """Subclasses set `linear1` and `linear2`, position by position, and run their parts through `step`."""

    linear1: nn.Module
    linear2: nn.Module

    def __init__(self, norm_first: bool, activation: Activation, dropout: float) -> None:
        super().__init__()
        probability(dropout=dropout)
        flags(norm_first=norm_first)
        one_of("activation", activation, get_args(Activation))
        self.norm_first = norm_first
        self.activation: Activation = activation
        self.dropout = nn.Dropout(dropout)

    def step(self, norm: nn.Module, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x + part(norm(x)), or norm(x + part(x)) for the norm last; dropout on what is added."""
        if self.norm_first:
            return functional.residual(x, self.dropout(part(norm(x))))
        return norm(functional.residual(x, self.dropout(part(x))))

    def ffn(self, x: Tensor) -> Tensor:
        """linear2(activation(linear1(x)))."""
        hidden = self.linear1(x)
        return self.linear2(self.dropout(F.relu(hidden) if self.activation == "relu" else F.gelu(hidden)))
