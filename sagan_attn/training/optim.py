"""Optimizer, its parameter groups and the learning-rate schedule, from a config."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler import create_scheduler_v2  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn, optim

from sagan_attn.errors import ConfigError
from sagan_attn.surgery import grafts_of
from sagan_attn.training.hosts import find_head

__all__ = [
    "OptimizerConfig",
    "ScheduleConfig",
    "clip_by_norm",
    "create_optimizer",
    "create_schedule",
    "parameter_groups",
]


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by its name in timm, and the learning rates of the parts of the model.

    Args:
        name: such as "adamw" or "sgd" (with Nesterov momentum; "momentum" is without).
        lr: base learning rate.
        weight_decay: of weights with two or more dimensions; biases, norms and gammas have none.
        momentum: for optimizers that have one.
        host_lr_scale, head_lr_scale, graft_lr_scale: factors on lr.
        gamma_lr_scale: factor on the grafts' rate for their gammas; with 1 a block is easily left unused.
        layer_decay: factor on the rate of each layer towards the input, None for none; a graft counts as part of
            the layer it is in.
        options: further arguments of the optimizer.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    host_lr_scale: float = 1.0
    head_lr_scale: float = 1.0
    graft_lr_scale: float = 1.0
    gamma_lr_scale: float = 10.0
    layer_decay: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over training, stepped every update: up over `warmup_epochs`, then down to 0.

    "cosine" rises in a line from 0 and falls along a cosine (timm's); "onecycle" rises along a cosine from 1/25 and
    falls along one (torch's, after Smith and Topin 2018; the momentum is not cycled); "linear" does both in a line.
    """

    name: Literal["cosine", "onecycle", "linear"] = "cosine"
    warmup_epochs: float = 0.0


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of the trainable parameters of host, head and grafts, each with lr, weight_decay and name.

    Raises `ConfigError` when nothing is trainable or a factor is out of range.
    """
    for name in ("lr", "weight_decay", "host_lr_scale", "head_lr_scale", "graft_lr_scale", "gamma_lr_scale"):
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"optimizer.{name} ({value}) must be a number of at least 0")
    if config.layer_decay is not None and not 0 < config.layer_decay <= 1:
        raise ConfigError(f"optimizer.layer_decay ({config.layer_decay}) must lie in (0, 1]")
    grafts = grafts_of(model)
    groups = grafts.param_groups(config.lr * config.graft_lr_scale, config.weight_decay, config.gamma_lr_scale)
    taken = set(grafts.parameters())
    head = set(find_head(model).parameters())
    rest = [p for p in model.parameters() if p.requires_grad and p not in taken]
    for name, members, scale in (
        ("host", [p for p in rest if p not in head], config.host_lr_scale),
        ("head", [p for p in rest if p in head], config.head_lr_scale),
    ):
        lr = config.lr * scale
        matrices, vectors = [p for p in members if p.dim() > 1], [p for p in members if p.dim() <= 1]
        groups.append({"params": matrices, "lr": lr, "weight_decay": config.weight_decay, "name": name})
        groups.append({"params": vectors, "lr": lr, "weight_decay": 0.0, "name": f"{name}/no_decay"})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError("nothing to train: every parameter is frozen")
    if config.layer_decay is None:
        return groups
    return [part for group in groups for part in _by_layer(group, _layers(model), config.layer_decay)]


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> optim.Optimizer:
    """The optimizer over `parameter_groups`. Raises `ConfigError` for a name or option timm does not have."""
    groups = parameter_groups(model, config)
    try:
        return create_optimizer_v2(
            groups,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **config.options,
        )
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"optimizer {config.name!r} with options {config.options}: {error}") from error


def clip_by_norm(optimizer: optim.Optimizer, limit: float) -> None:
    """Scale all gradients so that their l2 norm together is at most `limit`.

    As torch's `clip_grad_norm_`, but grafts are summed apart, so that those without gradients leave the host's steps
    what they are without them, bit for bit: more numbers in one sum would be added in another order.
    """
    parts: dict[bool, list[Tensor]] = {False: [], True: []}
    for group in optimizer.param_groups:
        own = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        parts[group["name"].startswith("grafts")] += own
    host, grafts = (nn.utils.get_total_norm(gradients) for gradients in parts.values())
    whole = torch.hypot(host, grafts.to(host.device))
    nn.utils.clip_grads_with_norm_([p for group in optimizer.param_groups for p in group["params"]], limit, whole)


def create_schedule(optimizer: optim.Optimizer, config: ScheduleConfig, epochs: int, steps: int) -> Any:
    """A scheduler over `steps` updates in `epochs` epochs: timm's, stepped by `step_update`, or torch's.

    Raises `ConfigError` for a warm-up that is not shorter than training.
    """
    if not 0 <= config.warmup_epochs < epochs:
        raise ConfigError(f"schedule.warmup_epochs ({config.warmup_epochs}) must lie in [0, {epochs}), the epochs")
    if config.name == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        steps = max(steps, 4)  # torch divides by the steps of each phase less one
        rise = max(config.warmup_epochs / epochs, 2 / steps)
        return optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=rise, cycle_momentum=False)
    warmup_steps = round(steps * config.warmup_epochs / epochs)
    if config.name == "linear":
        rise, fall = max(warmup_steps, 1), max(steps - warmup_steps, 1)
        return optim.lr_scheduler.LambdaLR(
            optimizer, lambda update: max(0.0, min((update + 1) / rise, (steps - update) / fall))
        )
    scheduler, _ = create_scheduler_v2(  # told an update is an epoch: it then takes any warm-up, in whole updates
        optimizer,
        sched="cosine",
        num_epochs=steps - warmup_steps,
        warmup_epochs=warmup_steps,
        warmup_lr=0.0,
        min_lr=0.0,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler


def _layers(model: nn.Module) -> dict[nn.Parameter, int]:
    """Depth of each parameter's layer, counted from the head (0) towards the input."""
    if hasattr(model, "group_matcher"):  # timm says what its layers are; names inside a graft start like its site's
        groups = param_groups_layer_decay(model, layer_decay=0.5)
        return {p: round(-math.log2(group["lr_scale"])) for group in groups for p in group["params"]}
    units = [(".".join(_unit(name.split("."))), p) for name, p in model.named_parameters()]
    order = list(dict.fromkeys(unit for unit, _ in units))
    return {p: len(order) - 1 - order.index(unit) for unit, p in units}


def _unit(parts: list[str]) -> list[str]:
    """A layer by its name: a child of a stage, or a child of the model that has none."""
    return parts[:2] if len(parts) > 2 else parts[:1]


def _by_layer(group: dict[str, Any], layers: dict[nn.Parameter, int], decay: float) -> Iterator[dict[str, Any]]:
    for depth in sorted({layers[p] for p in group["params"]}):
        members = [p for p in group["params"] if layers[p] == depth]
        yield {**group, "params": members, "lr": group["lr"] * decay**depth, "name": f"{group['name']}@{depth}"}
