"""Hosts of this library: CIFAR ResNets, a fast one, and the small CNN of the `lookup` data."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from sagan_attn.errors import ConfigError

__all__ = ["SMALL_HOSTS", "cifar_resnet", "lookup_cnn", "resnet9", "small_host"]

CIFAR_DEPTHS = (20, 32, 44, 56, 110)


def small_host(name: str, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    """The host of that name. Raises `ConfigError` for options it does not have or cannot take."""
    known = {"lookup-cnn": ("width", "extra"), "resnet9": ("width", "stem_stride", "blocks")}
    if foreign := [option for option in options if option not in known.get(name, ("blocks", "width"))]:
        has = ", ".join(known.get(name, ("blocks", "width")))
        raise ConfigError(f"host {name!r} has the options {has}, got {', '.join(foreign)}")
    return SMALL_HOSTS[name](num_classes, in_channels, **options)


def lookup_cnn(num_classes: int, in_channels: int = 3, width: int = 128, extra: int = 0) -> nn.Module:
    """The host of the `lookup` data: no output sees more than 12 x 12 pixels until the global average.

    Patches of 4 x 4 pixels to 64 channels, one 3 x 3 convolution to `width`, two 1 x 1 convolutions and `extra` more,
    global average, linear head. Input [B, in_channels, H, W], output [B, num_classes].

    Raises:
        ConfigError: a width below 1, or fewer than no extra layers.
    """
    _whole("width", width, 1)
    _whole("extra", extra, 0)

    def layer(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, size, stride, padding=0 if stride > 1 else size // 2, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs), act=nn.ReLU(inplace=True)))

    return nn.Sequential(
        OrderedDict(
            patches=layer(in_channels, 64, 4, stride=4),
            local=layer(64, width, 3),
            **{f"mix{number}": layer(width, width, 1) for number in range(1, extra + 3)},
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(width, num_classes),
        )
    )


def cifar_resnet(
    depth: int, num_classes: int, in_channels: int = 3, blocks: Sequence[int] | None = None, width: int = 16
) -> nn.Module:
    """The ResNet for 32 x 32 images: three stages `layer1..3` of 1, 2 and 4 times `width` channels.

    blocks: residual blocks of each stage, None for those of `depth`, 6n+2 layers: n each.

    Source: He et al., 2015 (arXiv:1512.03385), section 4.2, with projection instead of zero-padded shortcuts, on
    torchvision's BasicBlock.

    Raises:
        ConfigError: blocks that are not three whole numbers of at least 1, or a width below 8: with fewer channels
            the backward pass of torch's strided 1x1 convolution, channels last on a CPU, ends the process (2.15).
    """
    from torchvision.models.resnet import BasicBlock

    stages = _each_stage(blocks, ((depth - 2) // 6,) * 3, 1)
    _whole("width", width, 8)
    widths = (width, width, 2 * width, 4 * width)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    layers["bn1"] = nn.BatchNorm2d(width)
    layers["relu"] = nn.ReLU(inplace=True)
    for stage in (1, 2, 3):
        before, after = widths[stage - 1], widths[stage]
        stride = 1 if stage == 1 else 2
        shortcut = None
        if before != after:
            shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        first = BasicBlock(before, after, stride, shortcut)
        more = (BasicBlock(after, after) for _ in range(stages[stage - 1] - 1))
        layers[f"layer{stage}"] = nn.Sequential(first, *more)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(4 * width, num_classes)
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def resnet9(
    num_classes: int,
    in_channels: int = 3,
    width: int = 64,
    stem_stride: int = 1,
    blocks: Sequence[int] | None = None,
) -> nn.Module:
    """A ResNet for 32 x 32 images that learns fast: a stem and stages `layer1..3` of 2, 4 and 8 times `width` channels.

    Each stage is a 3 x 3 convolution, max pooling by 2, norm and ReLU; the first and third add a residual pair of
    convolutions (`blocks` says how many each stage adds, None for 1, 0 and 1). Then a global maximum and a linear head
    without bias, its logits scaled by 1/8. stem_stride 2 halves the map from the start: a quarter of the arithmetic,
    and less accuracy. Input of 8 pixels (16) and more.

    Ideas: the network of https://github.com/davidcpage/cifar10-fast, and pooling before the norm, which leaves it a
    quarter of the work, of https://github.com/KellerJordan/cifar10-airbench. Unlike those: the norms' scales train.

    Raises:
        ConfigError: a width below 1, a stride other than 1 and 2, or blocks that are not three whole numbers.
    """
    _whole("width", width, 1)
    pairs = _each_stage(blocks, (1, 0, 1), 0)
    if stem_stride not in (1, 2):
        raise ConfigError(f"host.options.stem_stride ({stem_stride!r}) must be 1 or 2")

    def layer(inputs: int, outputs: int, stride: int = 1, pool: bool = False) -> OrderedDict[str, nn.Module]:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["conv"] = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        if pool:
            parts["pool"] = nn.MaxPool2d(2)
        parts["norm"] = nn.BatchNorm2d(outputs)
        parts["act"] = nn.ReLU(inplace=True)
        return parts

    def residual(channels: int) -> nn.Module:
        return Residual(nn.Sequential(layer(channels, channels)), nn.Sequential(layer(channels, channels)))

    def stage(number: int, inputs: int, outputs: int) -> nn.Module:
        parts = layer(inputs, outputs, pool=True)
        for pair in range(1, pairs[number - 1] + 1):
            parts["residual" if pair == 1 else f"residual{pair}"] = residual(outputs)
        return nn.Sequential(parts)

    model = nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(layer(in_channels, width, stem_stride)),
            layer1=stage(1, width, 2 * width),
            layer2=stage(2, 2 * width, 4 * width),
            layer3=stage(3, 4 * width, 8 * width),
            pool=nn.AdaptiveMaxPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(8 * width, num_classes, bias=False),
            scale=Scale(1 / 8),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    return model


def _whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"host.options.{name} ({value!r}) must be a whole number of at least {least}")


def _each_stage(blocks: Sequence[int] | None, default: tuple[int, ...], least: int) -> tuple[int, ...]:
    """The blocks of each of three stages. Raises `ConfigError` unless they are three whole numbers."""
    if blocks is None:
        return default
    if isinstance(blocks, str) or not isinstance(blocks, Sequence) or len(blocks) != 3:
        raise ConfigError(f"host.options.blocks ({blocks!r}) must be a list of three whole numbers, one a stage")
    for count in blocks:
        _whole("blocks", count, least)
    return tuple(blocks)


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


class Scale(nn.Module):
    """x times a fixed number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        return input * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


SMALL_HOSTS: dict[str, Callable[..., nn.Module]] = {
    "lookup-cnn": lookup_cnn,
    "resnet9": resnet9,
    **{f"resnet{depth}": partial(cifar_resnet, depth) for depth in CIFAR_DEPTHS},
}
