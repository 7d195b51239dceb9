"""Shared by the tests of saved grafts: hosts with them, and their files, read and written a second time."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hosts import HOSTS, Host, assert_unchanged, open_gates, rng_states, snapshot
from torch import Tensor, nn

from sagan_attn import graft
from sagan_attn.errors import GraftError
from sagan_attn.surgery.store import load_grafts

HOST: Host = HOSTS["tiny"]

IMAGE = torch.zeros(1, 3, 32, 32)

KEY = "sagan_attn.grafts"


class Shift(nn.Module):
    """A block of one's own, with a buffer and an option."""

    def __init__(self, channels: int, by: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("by", torch.full((channels, 1, 1), by))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def grafted(at: Any = "top", host: Host = HOST, **options: Any) -> nn.Module:
    """A host with blocks that do something and have statistics of their own."""
    model = host.build()
    grafts = graft(model, at, example_input=host.images(1), **options)
    open_gates(grafts)
    model.train()
    with torch.no_grad():
        model(host.images())
    return model.eval()


def fresh_like(model: nn.Module, host: Host = HOST) -> nn.Module:
    """A host without grafts and with the host weights of `model`."""
    fresh = host.build()
    weights = {key: value for key, value in model.state_dict().items() if ".grafts." not in key}
    fresh.load_state_dict(weights, strict=True)
    return fresh


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert list(one) == list(two)
    for key in one:
        assert one[key].dtype == two[key].dtype
        assert torch.equal(one[key], two[key]), key


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def digest(grafts: Any, tensors: dict[str, Tensor]) -> str:
    """The file's sha256, written down a second time."""
    told = json.dumps(grafts, sort_keys=True).encode()
    for name in sorted(tensors):
        value = tensors[name]
        told += json.dumps([name, str(value.dtype), list(value.shape)]).encode()
        told += value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(told).hexdigest()


def write(path: Path, content: Any, tensors: dict[str, Tensor], sign: bool = True) -> None:
    if sign:
        content = {**content, "sha256": digest(content["grafts"], tensors)}
    path.write_bytes(safetensors.torch.save(tensors, {KEY: json.dumps(content)}))


def refused(path: Path, message: str, model: nn.Module | None = None, **options: Any) -> None:
    model = HOST.build().train() if model is None else model
    before, random = snapshot(model), rng_states()
    with pytest.raises(GraftError, match=message):
        load_grafts(model, path, **{"example_input": IMAGE, **options})
    assert_unchanged(model, before)
    assert rng_states() == random
