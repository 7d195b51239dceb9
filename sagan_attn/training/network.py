"""A host with its grafts, from a config."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sagan_attn.surgery import graft
from sagan_attn.training.hosts import HostConfig, build_host

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
    """

    at: str | list[str]
    block: str = "sagan"
    name: str | None = None
    seed: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def build_network(
    host: HostConfig, grafts: Sequence[GraftConfig], num_classes: int, in_channels: int, image_size: int
) -> nn.Module:
    """The host for images [B, in_channels, image_size, image_size] with its grafts.

    The host draws its weights from the global random state and grafts draw nothing from it, so for one seed hosts
    with different grafts start alike. Raises `ConfigError`, `GraftError` or `BlockError`.
    """
    network = build_host(host, num_classes, in_channels)
    example = torch.zeros(2, in_channels, image_size, image_size)
    for config in grafts:
        seed = torch.initial_seed() if config.seed is None else config.seed
        graft(
            network,
            config.at,
            config.block,
            name=config.name,
            example_input=example,
            seed=seed,
            options=config.options,
        )
    return network
