"""Runs made in memory, with grafts that do something."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sagan_attn import grafts_of
from sagan_attn.training.data import Preprocess
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.network import GraftConfig, build_network
from sagan_attn.training.run import Run


def run_of(host: str, grafts: list[dict[str, Any]], size: int, *, channels_last: bool = False) -> Run:
    """A run of five classes, as if read back; what grafts start at 0 with is drawn."""
    host_config, graft_configs = HostConfig(host), [GraftConfig(**graft) for graft in grafts]
    model = build_network(host_config, graft_configs, 5, 3, size)
    for graft in grafts_of(model):
        for parameter in graft.block.parameters():
            if not parameter.detach().any():
                torch.nn.init.normal_(parameter, std=0.3)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = {"model": {"host": asdict(host_config), "grafts": [asdict(graft) for graft in graft_configs]}}
    return Run(Path("made"), model.eval(), list("abcde"), Preprocess(size), config)
