"""What training configs stand for: their data, read once for all variants that share them, and their networks."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sagan_attn.errors import ConfigError
from sagan_attn.surgery import grafts_of
from sagan_attn.surgery.cost import probe_flops
from sagan_attn.training.data import ImageData
from sagan_attn.training.hosts import HostConfig, host_preprocess
from sagan_attn.training.network import GraftConfig, build_network
from sagan_attn.training.resolve import Resolved, resolve_config

__all__ = ["Models", "Size", "canonical", "network_of"]

# What decides nothing about a result.
FREE_DATA = ("num_workers", "cache_bytes")
FREE_MODEL = ("compile", "compile_mode")


@dataclass(frozen=True)
class Size:
    """Of a network: parameters in all and of its grafts, and FLOPs of a forward pass of one image."""

    parameters: int
    of_grafts: int
    flops: int
    grafts: tuple[str, ...]


class Models:
    """Resolves configs; data of one config are set up once, with their fingerprints."""

    def __init__(self) -> None:
        self._data: dict[str, tuple[ImageData, dict[str, str]]] = {}

    def resolve(self, config: Mapping[str, Any], where: str) -> Resolved:
        """The config checked, with its data set up.

        Raises the library's errors, naming `where`; a `ConfigError` for data without a validation part.
        """
        resolved = resolve_config(config, where)
        key = self._key(resolved)
        if key not in self._data:
            resolved.data.setup()
            if not resolved.data.val_dataloader():
                raise ConfigError(f"{where}: an ablation needs validation images: the data module keeps none")
            self._data[key] = resolved.data, {part: resolved.data.fingerprint(part) for part in ("fit", "test")}
        return replace(resolved, data=self._data[key][0])

    def fingerprints(self, resolved: Resolved) -> dict[str, str]:
        """Of the data, and of the file of weights if the host has one."""
        found = dict(self._data[self._key(resolved)][1])
        if resolved.model.host.weights:
            found["weights"] = hashlib.sha256(Path(resolved.model.host.weights).read_bytes()).hexdigest()
        return found

    def size(self, resolved: Resolved) -> Size:
        network = network_of(resolved).to("meta")
        side = resolved.data.preprocess.image_size
        image = torch.empty(1, resolved.data.in_channels, side, side, device="meta")
        grafts = grafts_of(network)
        return Size(
            sum(p.numel() for p in network.parameters()),
            sum(p.numel() for p in grafts.parameters()),
            probe_flops(network, image, {})[1],
            tuple(graft.path for graft in grafts),
        )

    @staticmethod
    def _key(resolved: Resolved) -> str:
        data = canonical(resolved, 0)["data"]
        return json.dumps(data, sort_keys=True) + str(host_preprocess(resolved.model.host))


def network_of(resolved: Resolved, grafts: Sequence[GraftConfig] | None = None) -> nn.Module:
    """The network of a config whose data are set up, on the CPU; the global random state is put back."""
    host = HostConfig(**{**asdict(resolved.model.host), "pretrained": False, "weights": None})
    grafts = resolved.model.graft_configs if grafts is None else grafts
    data = resolved.data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_network(host, grafts, data.num_classes, data.in_channels, data.preprocess.image_size)


def canonical(resolved: Resolved, seed: int) -> dict[str, Any]:
    """What of a resolved config decides the result, in one spelling."""
    config = resolved.config
    trainer = {key: value for key, value in config["trainer"].items() if value != resolved.trainer_defaults.get(key)}
    model = {key: value for key, value in config["model"].items() if key not in FREE_MODEL}
    arguments = {key: value for key, value in config["data"]["init_args"].items() if key not in FREE_DATA}
    data = {"class_path": config["data"]["class_path"], "init_args": {**arguments, "order_seed": seed}}
    return _plain({"seed": seed, "trainer": trainer, "model": model, "data": data})


def _plain(value: Any, free: bool = False) -> Any:
    """JSON in which 1.0 is 1, and None is what is left out; free: in options, where None may be a choice."""
    if isinstance(value, Mapping):
        items = ((str(key), each) for key, each in value.items() if free or each is not None)
        return {key: _plain(each, free or key == "options") for key, each in items}
    if isinstance(value, (list, tuple)):
        return [_plain(each, free) for each in value]
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
