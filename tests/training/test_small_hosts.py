"""This library's own hosts: by default they are what they were before they had options, number for number."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from sagan_attn.errors import ConfigError
from sagan_attn.training.hosts import HostConfig, build_host


def conv_norm(inputs: int, outputs: int, size: int, stride: int, padding: int, pool: bool = False) -> OrderedDict:
    parts = OrderedDict(conv=nn.Conv2d(inputs, outputs, size, stride, padding, bias=False))
    return parts | ({"pool": nn.MaxPool2d(2)} if pool else {}) | {"norm": nn.BatchNorm2d(outputs), "act": nn.ReLU()}


def plain_lookup_cnn() -> nn.Module:
    model = nn.Module()
    model.patches = nn.Sequential(conv_norm(3, 64, 4, 4, 0))
    model.local = nn.Sequential(conv_norm(64, 128, 3, 1, 1))
    model.mix1 = nn.Sequential(conv_norm(128, 128, 1, 1, 0))
    model.mix2 = nn.Sequential(conv_norm(128, 128, 1, 1, 0))
    model.head = nn.Linear(128, 10)
    return model


def plain_resnet20() -> nn.Module:
    model = nn.Module()
    model.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(16)
    model.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16), BasicBlock(16, 16))
    for number, width in ((2, 32), (3, 64)):
        shortcut = nn.Sequential(nn.Conv2d(width // 2, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        first = BasicBlock(width // 2, width, 2, shortcut)
        model.add_module(f"layer{number}", nn.Sequential(first, BasicBlock(width, width), BasicBlock(width, width)))
    model.fc = nn.Linear(64, 10)
    return he_normal(model, "fan_out")


def plain_resnet9() -> nn.Module:
    def pair(channels: int) -> nn.Module:
        return nn.Sequential(*(nn.Sequential(conv_norm(channels, channels, 3, 1, 1)) for _ in range(2)))

    model = nn.Module()
    model.stem = nn.Sequential(conv_norm(3, 64, 3, 1, 1))
    model.layer1 = nn.Sequential(conv_norm(64, 128, 3, 1, 1, pool=True) | {"residual": pair(128)})
    model.layer2 = nn.Sequential(conv_norm(128, 256, 3, 1, 1, pool=True))
    model.layer3 = nn.Sequential(conv_norm(256, 512, 3, 1, 1, pool=True) | {"residual": pair(512)})
    model.head = nn.Linear(512, 10, bias=False)
    return he_normal(model, "fan_in")


def he_normal(model: nn.Module, mode: str) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
    return model


@pytest.mark.parametrize(
    ("name", "plain", "defaults"),
    [
        ("lookup-cnn", plain_lookup_cnn, {"width": 128, "extra": 0}),
        ("resnet20", plain_resnet20, {"width": 16, "blocks": [3, 3, 3]}),
        ("resnet9", plain_resnet9, {"width": 64, "blocks": [1, 0, 1]}),
    ],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_defaults_draw_the_same_weights_in_the_same_order(name, plain, defaults, seed):
    torch.manual_seed(seed)
    expected, after = plain().state_dict(), torch.get_rng_state()
    for options in ({}, defaults):
        torch.manual_seed(seed)
        state = build_host(HostConfig(name, options=options), 10).state_dict()
        assert torch.equal(torch.get_rng_state(), after)
        assert list(state) == list(expected)
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_options_of_the_cifar_resnets():
    model = build_host(HostConfig("resnet20", options={"blocks": [1, 4, 2], "width": 8}), 10)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [1, 4, 2]
    assert [stage[-1].conv2.out_channels for stage in (model.layer1, model.layer2, model.layer3)] == [8, 16, 32]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_options_of_the_lookup_cnn():
    model = build_host(HostConfig("lookup-cnn", options={"width": 24, "extra": 2}), 10)
    assert [name for name, _ in model.named_children()][:6] == ["patches", "local", "mix1", "mix2", "mix3", "mix4"]
    assert model.patches.conv.out_channels == 64
    assert {layer.conv.out_channels for layer in model[1:6]} == {model.head.in_features} == {24}
    assert model(torch.rand(2, 3, 48, 48)).shape == (2, 10)


def test_blocks_of_the_resnet9():
    model = build_host(HostConfig("resnet9", options={"blocks": [0, 1, 2], "width": 4}), 10)
    names = [[name for name, _ in stage.named_children()] for stage in (model.layer1, model.layer2, model.layer3)]
    plain = ["conv", "pool", "norm", "act"]
    assert names == [plain, [*plain, "residual"], [*plain, "residual", "residual2"]]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {"blocks": [3, 3]}, r"blocks \(\[3, 3\]\) must be a list of three whole numbers"),
        ("resnet20", {"blocks": "333"}, r"blocks \('333'\) must be a list of three"),
        ("resnet20", {"blocks": 3}, r"blocks \(3\) must be a list of three"),
        ("resnet20", {"blocks": [3, 0, 3]}, r"blocks \(0\) must be a whole number of at least 1"),
        ("resnet20", {"blocks": [3, 2.0, 3]}, r"blocks \(2.0\) must be a whole number"),
        ("resnet20", {"width": 7}, r"width \(7\) must be a whole number of at least 8"),
        ("resnet20", {"width": True}, r"width \(True\) must be a whole number"),
        ("resnet20", {"extra": 1}, r"has the options blocks, width, got extra"),
        ("resnet9", {"blocks": [1, -1, 1]}, r"blocks \(-1\) must be a whole number of at least 0"),
        ("lookup-cnn", {"width": 1.5}, r"width \(1.5\) must be a whole number of at least 1"),
        ("lookup-cnn", {"extra": -1}, r"extra \(-1\) must be a whole number of at least 0"),
        ("lookup-cnn", {"depth": 3}, r"has the options width, extra, got depth"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_host(HostConfig(name, options=options), 10)
