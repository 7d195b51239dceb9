"""Hosts with more parameters of their own: what a graft has to beat."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sagan_attn.errors import ConfigError
from sagan_attn.training.hosts import HostConfig, build_host, resolve_host

__all__ = ["deeper", "wider"]

TIMM_LAYERS = {  # blocks of each stage
    "resnet18": (2, 2, 2, 2),
    "resnet26": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
LOOKUP_STAGE = ("patches", "local", "mix1", "mix2")  # all on maps of one size


def deeper(host: HostConfig, site: str) -> HostConfig:
    """The host with one more of its blocks at the end of the stage that a site lies in.

    A basic block for the CIFAR ResNets and a residual block for timm's ResNets, at the end of `layer<n>`; a residual
    pair for "resnet9"; a 1x1 layer for "lookup-cnn".

    Raises:
        ConfigError: a host this is not known for, a site that lies in none of its stages, or weights to load, which
            a deeper host has no place for.
    """
    library, name = _known(host)
    top = site.partition(".")[0]
    if (library, name) == ("own", "lookup-cnn"):
        extra = host.options.get("extra", 0)
        if top not in (*LOOKUP_STAGE, *(f"mix{number}" for number in range(3, extra + 3))):
            raise ConfigError(f"site {site!r} of host {host.name!r} is not in {', '.join(LOOKUP_STAGE)}")
        return _with(host, extra=extra + 1)
    option, counts = ("layers", TIMM_LAYERS[name]) if library == "timm" else ("blocks", _own_blocks(name))
    counts = list(host.options.get(option) or counts)
    stages = [f"layer{number}" for number in range(1, len(counts) + 1)]
    if top not in stages:
        raise ConfigError(f"site {site!r} of host {host.name!r} is in none of its stages {', '.join(stages)}")
    counts[stages.index(top)] += 1
    return _with(host, **{option: counts})


def wider(host: HostConfig, target_parameters: int, num_classes: int, in_channels: int = 3) -> tuple[HostConfig, float]:
    """The host with more channels, as near to so many parameters as its widths come.

    The own hosts have an option `width`, and at least 1 is added to it. Of timm's ResNets the last stage gets at
    least 1 channel more, and the stages before it a half and a quarter of that, rounded down; the stem and `layer1`
    keep 64, so that no shortcut is added.

    Returns:
        The wider host, and how far its parameters are from the target, as a share of the target: 0.02 for 2 % more.

    Raises:
        ConfigError: a host this is not known for, or weights to load, which a wider host has no place for.
    """
    library, name = _known(host)
    change = _timm_width if library == "timm" else _own_width

    def parameters(steps: int) -> int:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build_host(change(host, name, steps), num_classes, in_channels)
        return sum(parameter.numel() for parameter in model.parameters())

    steps = _nearest(parameters, target_parameters)
    return change(host, name, steps), parameters(steps) / target_parameters - 1


def _known(host: HostConfig) -> tuple[str, str]:
    """Library and name, without a tag of weights, of a host whose widths and depths are known."""
    library, name = resolve_host(host.name)
    name = name.partition(".")[0] if library == "timm" else name
    if library != "own" and (library != "timm" or name not in TIMM_LAYERS):
        raise ConfigError(
            f"what makes host {host.name!r} deeper or wider is not known here: write the variant by hand, with "
            f"model.host.options. Known are this library's own hosts and timm/{', timm/'.join(TIMM_LAYERS)}"
        )
    if host.pretrained or host.weights:
        given = "pretrained" if host.pretrained else "weights"
        raise ConfigError(f"host.{given} does not go with a deeper or wider host: its weights would not fit")
    return library, name


def _own_blocks(name: str) -> Sequence[int]:
    return (1, 0, 1) if name == "resnet9" else ((int(name.removeprefix("resnet")) - 2) // 6,) * 3


def _own_width(host: HostConfig, name: str, steps: int) -> HostConfig:
    default = {"lookup-cnn": 128, "resnet9": 64}.get(name, 16)
    return _with(host, width=host.options.get("width", default) + steps)


def _timm_width(host: HostConfig, name: str, steps: int) -> HostConfig:
    first, second, third, fourth = host.options.get("channels") or (64, 128, 256, 512)
    return _with(host, channels=[first, second + steps // 4, third + steps // 2, fourth + steps])


def _with(host: HostConfig, **options: Any) -> HostConfig:
    return replace(host, options={**host.options, **options})


def _nearest(count: Callable[[int], int], target: int) -> int:
    """The number of at least 1 whose count, which grows with it, is nearest to the target; the smaller of two."""
    high = 1
    while count(high) < target:
        high *= 2
    low = high // 2  # its count is below the target, unless it is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) >= target else (middle, high)
    return low if low and target - count(low) <= count(high) - target else high
