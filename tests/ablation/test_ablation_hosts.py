"""Deeper and wider hosts: how many parameters they have, and where."""

import pytest
import torch

from sagan_attn.ablation.hosts import TIMM_LAYERS, deeper, wider
from sagan_attn.errors import ConfigError
from sagan_attn.training.hosts import HostConfig, build_host


def shapes(host: HostConfig, num_classes: int = 10) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build_host(host, num_classes).named_parameters()}


def parameters(host: HostConfig, num_classes: int = 10) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes(host, num_classes).values())


DEEPER = [  # host, site, where the new parameters are, how many there are
    (HostConfig("resnet20"), "layer2", "layer2.3.", 2 * (9 * 32 * 32 + 2 * 32)),
    (HostConfig("resnet20", options={"width": 8}), "layer3.1.conv2", "layer3.3.", 2 * (9 * 32 * 32 + 2 * 32)),
    (HostConfig("resnet56"), "layer1.*", "layer1.9.", 2 * (9 * 16 * 16 + 2 * 16)),
    (HostConfig("resnet9"), "layer2", "layer2.residual.", 2 * (9 * 256 * 256 + 2 * 256)),
    (HostConfig("resnet9"), "layer3.residual", "layer3.residual2.", 2 * (9 * 512 * 512 + 2 * 512)),
    (HostConfig("lookup-cnn"), "local", "mix3.", 128 * 128 + 2 * 128),
    (HostConfig("lookup-cnn", options={"extra": 1}), "mix3", "mix4.", 128 * 128 + 2 * 128),
    (HostConfig("timm/resnet18"), "layer3", "layer3.2.", 2 * (9 * 256 * 256 + 2 * 256)),
    (HostConfig("timm/resnet34", small_images=True), "layer2.3", "layer2.4.", 2 * (9 * 128 * 128 + 2 * 128)),
    (HostConfig("timm/resnet50"), "layer4", "layer4.3.", 2 * 2048 * 512 + 9 * 512 * 512 + 4 * 512 + 2 * 2048),
]


@pytest.mark.parametrize(("host", "site", "place", "count"), DEEPER, ids=lambda v: getattr(v, "name", None))
def test_deeper(host, site, place, count):
    before, after = shapes(host), shapes(deeper(host, site))
    new = {name: shape for name, shape in after.items() if name.startswith(place)}
    assert {name: shape for name, shape in after.items() if name not in new} == before
    assert sum(torch.Size(shape).numel() for shape in new.values()) == count
    twice = shapes(deeper(deeper(host, site), site))
    assert len(twice) == len(before) + 2 * len(new)


@pytest.mark.parametrize("host", ["lookup-cnn", "resnet9", "resnet20", "timm/resnet18"])
def test_deeper_hosts_run(host):
    model = build_host(deeper(HostConfig(host), "local" if host == "lookup-cnn" else "layer2"), 7)
    assert model.eval()(torch.rand(1, 3, 48, 48)).shape == (1, 7)


@pytest.mark.parametrize("name", TIMM_LAYERS)
def test_the_table_of_timm(name):
    host = HostConfig(f"timm/{name}")
    widths = [64, 128, 256, 512]
    given = HostConfig(host.name, options={"layers": list(TIMM_LAYERS[name]), "channels": widths})
    assert shapes(given) == shapes(host)


@pytest.mark.parametrize(
    ("host", "more", "tolerance"),
    [
        (HostConfig("lookup-cnn"), 20_641, 0.005),
        (HostConfig("lookup-cnn", options={"width": 32}), 2_000, 0.02),
        (HostConfig("resnet9"), 300_000, 0.02),
        (HostConfig("resnet20"), 80_000, 0.06),
        pytest.param(HostConfig("timm/resnet18", small_images=True), 82_000, 0.003, marks=pytest.mark.slow),
        pytest.param(HostConfig("timm/resnet34"), 1_000_000, 0.002, marks=pytest.mark.slow),
        pytest.param(HostConfig("timm/resnet50"), 5_000_000, 0.002, marks=pytest.mark.slow),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_wider(host, more, tolerance):
    before = torch.get_rng_state()
    target = parameters(host) + more
    found, off = wider(host, target, 10)
    assert parameters(found) / target - 1 == off
    assert abs(off) <= tolerance
    assert parameters(found) > parameters(host)
    assert list(shapes(found)) == list(shapes(host))  # no layer more
    (option,) = found.options.keys() - host.options.keys() or {"width"}
    for steps in (-1, 1):  # its neighbours are no nearer
        value = found.options[option]
        value = value + steps if option == "width" else [*value[:-1], value[-1] + steps]
        other = HostConfig(host.name, options={**found.options, option: value}, small_images=host.small_images)
        if parameters(other) > parameters(host):
            assert abs(parameters(other) - target) >= abs(parameters(found) - target)
    assert torch.equal(before, torch.get_rng_state())


def test_a_wider_host_is_wider_even_where_one_step_is_far():
    host = HostConfig("resnet20")
    found, off = wider(host, parameters(host) + 1_300, 10)
    assert found.options == {"width": 17}
    assert off == parameters(found) / (parameters(host) + 1_300) - 1 > 0.1


def test_wider_counts_the_head_and_the_stem_as_they_are():
    host = HostConfig("timm/resnet18")
    with torch.device("meta"):
        target = sum(p.numel() for p in build_host(host, 100, in_channels=1).parameters()) + 200_000
    found, off = wider(host, target, num_classes=100, in_channels=1)
    with torch.device("meta"):
        count = sum(p.numel() for p in build_host(found, 100, in_channels=1).parameters())
    assert count / target - 1 == off


@pytest.mark.parametrize(
    ("host", "site", "message"),
    [
        (HostConfig("resnet20"), "conv1", "site 'conv1' .* in none of its stages layer1, layer2, layer3"),
        (HostConfig("resnet9"), "stem", "site 'stem' .* in none of its stages"),
        (HostConfig("lookup-cnn"), "mix3", "site 'mix3' .* not in patches, local, mix1, mix2"),
        (HostConfig("timm/resnet18"), "layer5", "none of its stages layer1, layer2, layer3, layer4"),
        (HostConfig("torchvision/resnet18"), "layer2", "by hand, with model.host.options.*timm/resnet18"),
        (HostConfig("timm/convnext_atto"), "stages.1", "by hand, with model.host.options"),
        (HostConfig("timm/resnet18", pretrained=True), "layer2", "host.pretrained does not go with"),
        (HostConfig("resnet20", weights="a.safetensors"), "layer2", "host.weights does not go with"),
    ],
)
def test_refusals(host, site, message):
    with pytest.raises(ConfigError, match=message):
        deeper(host, site)
    if "site" not in message and "stages" not in message:
        with pytest.raises(ConfigError, match=message):
            wider(host, 1_000_000, 10)
