"""Optimizer parameter groups for grafts: the gamma kit."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sagan_attn.errors import GraftError

__all__ = ["graft_groups", "is_gamma"]


def is_gamma(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a residual gate: a single number whose own name is `gamma`."""
    return name.rpartition(".")[2] == "gamma" and parameter.numel() == 1


def graft_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    gamma_lr_scale: float,
) -> list[dict[str, Any]]:
    """See `Grafts.param_groups`. Raises `GraftError` for a value that is negative or not a number."""
    for name, value in {"lr": lr, "weight_decay": weight_decay, "gamma_lr_scale": gamma_lr_scale}.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value <= sys.float_info.max:
            raise GraftError(f"{name} ({value!r:.100}) must be a number of at least 0")
    groups: dict[str, dict[str, Any]] = {
        "grafts": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "grafts/no_decay": {"params": [], "lr": lr, "weight_decay": 0.0},
        "grafts/gamma": {"params": [], "lr": lr * gamma_lr_scale, "weight_decay": 0.0},
    }
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if is_gamma(name, parameter):
            groups["grafts/gamma"]["params"].append(parameter)
        elif parameter.dim() <= 1:
            groups["grafts/no_decay"]["params"].append(parameter)
        else:
            groups["grafts"]["params"].append(parameter)
    return [{**group, "name": name} for name, group in groups.items() if group["params"]]
