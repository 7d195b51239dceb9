"""A host with its grafts, from a config."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn.errors import ConfigError, GraftError
from sagan_attn.surgery import graft, prune_heads
from sagan_attn.surgery.probe import quiet
from sagan_attn.training.hosts import HostConfig, build_host
from sagan_attn.training.memory import is_out_of_memory

__all__ = ["GraftConfig", "build_network"]


@dataclass(frozen=True)
class GraftConfig:
    """One call of `graft`.

    Args:
        at: module name or glob, or a list of them.
        block: registered name.
        name: of the graft at its place; None for that of the block.
        seed: of the block's initial weights; None for the run's.
        options: of the block.
        pruned_heads: numbers of heads to take out before training, at each place the same; see `prune_heads`.
    """

    at: str | list[str]
    block: str = "sagan"
    name: str | None = None
    seed: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    pruned_heads: list[int] | None = None


def build_network(
    host: HostConfig, grafts: Sequence[GraftConfig], num_classes: int, in_channels: int, image_size: int
) -> nn.Module:
    """The host for images [B, in_channels, image_size, image_size] with its grafts.

    The host draws its weights from the global random state and grafts draw nothing from it, so for one seed hosts
    with different grafts start alike. Raises `ConfigError`, `GraftError` or `BlockError`.
    """
    if num_classes < 2:
        raise ConfigError(f"a classifier needs at least 2 classes, the data have {num_classes}")
    network = build_host(host, num_classes, in_channels)
    example = torch.zeros(2, in_channels, image_size, image_size)
    _check_output(network, host.name, example, num_classes)
    for config in grafts:
        seed = torch.initial_seed() if config.seed is None else config.seed
        made = graft(
            network,
            config.at,
            config.block,
            name=config.name,
            example_input=example,
            seed=seed,
            options=config.options,
        )
        if config.pruned_heads is not None:
            try:
                prune_heads(network, {one: config.pruned_heads for one in made})
            except GraftError as error:
                raise GraftError(f"pruned_heads ({config.pruned_heads!r}) at {config.at!r}: {error}") from error
    return network


def _check_output(network: nn.Module, name: str, example: Tensor, num_classes: int) -> None:
    """Refuse a host that does not take the images, or does not give one row of logits an image."""
    shape = tuple(example.shape[1:])
    try:
        with quiet(network):
            output = network(example)
    except Exception as error:  # whatever a model may raise on an image it is not made for
        if is_out_of_memory(error):
            raise
        hint = "; host.small_images: true makes it one for small images" if shape[-1] < 64 else ""
        raise ConfigError(f"host {name!r} does not take images of shape {shape}: {error}{hint}") from error
    if not isinstance(output, Tensor) or output.shape != (len(example), num_classes):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"host {name!r} gives {found} for {len(example)} images, not logits over {num_classes} classes"
        )
