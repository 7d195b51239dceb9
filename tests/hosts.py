"""Hosts for the surgery tests, and what is compared about them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn

HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


class Tiny(nn.Module):
    """A CNN with a Sequential stage, a residual block, and places where no graft can go."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.stage = nn.Sequential(Residual(8), Residual(8))
        self.down = nn.Conv2d(8, channels, 3, 2, 1)
        self.top = Residual(channels)
        self.unused = nn.Conv2d(3, 3, 1)
        self.pair = Pair()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.pair(self.top(self.down(self.stage(self.stem(x)))))
        return self.fc(self.flatten(self.pool(x)))


class Residual(nn.Module):
    """`relu` is called twice, with 4 times the channels the first time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, 4 * channels, 1)
        self.narrow = nn.Conv2d(4 * channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.narrow(self.relu(self.wide(x)))) + x)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@dataclass(frozen=True)
class Host:
    """A model, the sites to graft at, and a side of image it takes."""

    make: Callable[[], nn.Module]
    sites: tuple[str, ...]
    size: int = 64

    def build(self) -> nn.Module:
        """The host in eval mode with fixed weights and batch-norm statistics that are no identity."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
            return model.eval()

    def images(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=7, **options)


def _tv(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=7)


HOSTS = {
    "tiny": Host(Tiny, ("stage", "top"), 32),
    "tv-resnet18": Host(_tv("resnet18"), ("layer2", "layer3.0"), 64),
    "timm-resnet18": Host(_timm("resnet18"), ("layer2", "layer3.0"), 64),
    "convnext": Host(_timm("convnext_atto"), ("stages.1", "stages.2.blocks.0"), 64),
    "efficientnet": Host(_timm("efficientnet_b0"), ("blocks.2", "blocks.4.0"), 64),
    "regnet": Host(_timm("regnetx_002"), ("s2", "s3"), 64),
}
WIDE_HOSTS = {
    "tv-resnet50": Host(_tv("resnet50"), ("layer2", "layer3.0"), 64),
    "swin": Host(_timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2), ("layers.1", "layers.2.blocks.0")),
    "mobilenetv3": Host(_timm("mobilenetv3_small_050"), ("blocks.2", "blocks.4"), 64),
    "tv-mobilenetv3": Host(_tv("mobilenet_v3_small"), ("features.3", "features.8"), 64),
    "densenet": Host(_tv("densenet121"), ("features.transition1", "features.denseblock2.denselayer3"), 64),
    "vgg": Host(_tv("vgg11_bn"), ("features.7", "features.14"), 32),
    "mambaout": Host(_timm("mambaout_femto"), ("stages.1", "stages.2.blocks.0"), 64),  # NHWC, takes any size
    "davit": Host(_timm("davit_tiny"), ("stages.1",), 64),
    "poolformerv2": Host(_timm("poolformerv2_s12"), ("stages.1",), 64),
}

ANY_HOST = {**HOSTS, **WIDE_HOSTS}


def open_gates(grafts: Any, value: float = 0.7) -> None:
    """Make the grafts do something."""
    gammas = grafts.gammas()
    with torch.no_grad():
        for name, parameter in grafts.named_parameters():
            if name in gammas:
                parameter.fill_(value)
            elif not parameter.count_nonzero():  # what starts at 0 in a block without gamma
                parameter.normal_(0, value)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refused or undone graft must leave alone, bit for bit."""
    modules = list(model.named_modules(remove_duplicate=False))
    return {
        "keys": list(model.state_dict()),
        "values": [v.clone() for v in model.state_dict().values()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "modules": [(name, id(module), type(module), module.training) for name, module in modules],
        "dicts": [(name, list(vars(module)), list(module._modules)) for name, module in modules],
        "hooks": [
            (name, hook, list(getattr(module, hook).items()))
            for name, module in modules
            for hook in HOOKS
            if isinstance(getattr(module, hook), dict)
        ],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    for values, old in zip(now.pop("values"), before["values"], strict=True):
        assert torch.equal(values, old)
        assert values.dtype == old.dtype
        assert values.stride() == old.stride()
    assert now == {key: value for key, value in before.items() if key != "values"}


def assert_same(output: Any, expected: Any) -> None:
    """Bit-identical tensors (or lists of them), dtype and strides included."""
    if isinstance(expected, Tensor):
        assert output.dtype == expected.dtype
        assert output.stride() == expected.stride()
        assert torch.equal(output, expected)
        return
    assert len(output) == len(expected) > 0
    for one, other in zip(output, expected, strict=True):
        assert_same(one, other)


def count_calls(module: nn.Module) -> list[int]:
    """A list that grows by one at each call of the module."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def rng_states() -> list[Any]:
    """The global random states of torch, numpy and Python, in a form that compares."""
    kind, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()]
