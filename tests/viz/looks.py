"""A small model with attention and what is seen of it."""

import torch
from torch import Tensor, nn

from sagan_attn import graft
from sagan_attn.viz.look import Look, look


def model(heads: int = 2, block: str = "multihead", **options) -> nn.Module:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    if block == "multihead":
        options |= {"heads": heads}
    graft(host, "1", block, options=options, example_input=torch.rand(1, 3, 12, 16))
    for parameter in host.parameters():
        nn.init.normal_(parameter, std=1.0)
    return host


def images(count: int = 2, height: int = 12, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def seen(captions=("one", "two"), network: nn.Module | None = None, **size) -> Look:
    pictures = images(len(captions), **size)
    return look(network or model(), pictures / 255, pictures, captions, labels=torch.arange(len(captions)))
