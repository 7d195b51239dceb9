"""Traps of hosts, compilers and optimizers that no promise names by itself, each in the smallest host that has it."""

import re
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from hosts import HOSTS, assert_same, assert_unchanged, count_calls, open_gates, snapshot
from timm.layers import SqueezeExcite
from timm.models._features import FeatureDictNet, FeatureHookNet, FeatureListNet
from torch import Tensor, nn

from sagan_attn import graft, sites, ungraft
from sagan_attn.blocks import block_names
from sagan_attn.errors import GraftError

HOST = HOSTS["tiny"]


@pytest.mark.parametrize("name", ["regnet", "convnext"])
@pytest.mark.parametrize("kind", [FeatureListNet, FeatureDictNet, FeatureHookNet])
def test_feature_extractors_that_flatten_run_a_graft_once(kind: type[nn.Module], name: str):
    """They take the model apart and call the children of a Sequential, never the Sequential."""
    host = HOSTS[name]
    model, images = host.build(), host.images()
    grafts = graft(model, list(host.sites), example_input=images[:1])
    open_gates(grafts)
    _, expected = model.forward_intermediates(images)
    calls = [count_calls(g.block) for g in grafts]
    features = kind(model, out_indices=(1, 2, 3), flatten_sequential=True)(images)
    assert_same(list(features.values()) if isinstance(features, dict) else features, expected[1:4])
    assert [len(c) for c in calls] == [1, 1]


class Cut(nn.Module):
    """A place that puts out a view of its map, and two readers of it."""

    def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.place = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), View(cut))
        self.conv = nn.LazyConv2d(8, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.place(x)
        return x, self.conv(x), x.mean((2, 3))


class View(nn.Module):
    def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(x)


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second channel": lambda x: x[:, ::2],
    "half of the channels": lambda x: x.chunk(2, 1)[1],
    "crop": lambda x: x[..., 1:-1, 1:-1],
    "every second position": lambda x: x[..., ::2, ::2],
    "one channel expanded": lambda x: x[:, :1].expand(-1, 8, -1, -1),
    "one position expanded": lambda x: x[..., :1, :1].expand(-1, -1, 9, 9),
    "turned": lambda x: x.mT,
}


LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def cut_outputs(cut: str, layout: torch.memory_format) -> list[tuple[Tensor, ...]]:
    """The map, and what its readers make of it, before and after grafting."""
    model = Cut(CUTS[cut]).eval()
    x = torch.randn(2, 3, 33, 33).to(memory_format=layout)
    model(x)
    model.to(memory_format=layout)
    before = model(x)
    graft(model, "place", example_input=x)
    return [before, model(x)]


@LAYOUTS
@pytest.mark.parametrize("cut", CUTS)
def test_the_numbers_of_a_view_and_the_convolution_behind_it_stay(cut: str, layout: torch.memory_format):
    before, after = cut_outputs(cut, layout)
    assert torch.equal(after[0], before[0])
    assert_same(after[1], before[1])
    torch.testing.assert_close(after[2], before[2], rtol=1e-6, atol=1e-7)  # sums of other strides round differently


@LAYOUTS
@pytest.mark.parametrize("cut", ["every second channel", "half of the channels", "crop", "every second position"])
def test_a_view_keeps_its_strides(cut: str, layout: torch.memory_format):
    before, after = cut_outputs(cut, layout)
    for one, other in zip(after, before, strict=True):
        assert_same(one, other)


class Guided(nn.Module):
    """A place with more arguments than its map, as `rope` and masks are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int], *, rope: Tensor, keep: str | None = None) -> Tensor:
        return F.interpolate(self.conv(x), size) * rope + (keep is not None)


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = Guided()

    def forward(self, x: Tensor) -> Tensor:
        return self.place(x, (6, 7), rope=x.new_full((1, 8, 1, 1), 0.5), keep="all")


def test_a_place_that_takes_more_than_its_map():
    model, x = Guide().eval(), torch.randn(2, 3, 8, 8)
    expected, before = model(x), snapshot(model)
    assert ("place", 8, 6, 7) in [(s.name, s.channels, s.height, s.width) for s in sites(model, x)]
    grafts = graft(model, "place", example_input=x)
    assert_same(model(x), expected)
    open_gates(grafts)
    assert_same(model(x), grafts[0].block(expected))
    ungraft(model)
    assert_unchanged(model, before)


def test_what_feature_info_says_is_not_believed():
    hrnet = timm.create_model("hrnet_w18_small").to("meta")
    modules = {name for name, _ in hrnet.named_modules()}
    listed = [info["module"] for info in hrnet.feature_info]
    assert [name for name in listed if name not in modules][:2] == ["stem", "stage1"]
    with pytest.raises(GraftError, match=re.escape("no module of HighResolutionNet matches the name 'stem'")):
        graft(hrnet, "stem", example_input=torch.zeros(1, 3, 64, 64))
    model = HOSTS["timm-resnet18"].build()
    for info in model.feature_info:
        info["num_chs"] = 7
    assert graft(model, "layer2", example_input=torch.zeros(1, 3, 64, 64))[0].block.in_channels == 128


class Reader(nn.Module):
    """Reads the weight of a convolution that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.conv2d(x, self.conv.weight))


def test_a_module_whose_weight_is_read_without_calling_it():
    model, x = Reader(), torch.randn(1, 3, 4, 4)
    before = snapshot(model)
    with pytest.raises(GraftError, match="'conv' never fires in a forward pass"):
        graft(model, "conv", example_input=x)
    assert [site.name for site in sites(model, x)] == ["last"]
    assert_unchanged(model, before)


def test_an_optimizer_from_before_the_graft_takes_its_groups():
    model, images = HOST.build().train(), HOST.images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    grafts = graft(model, "top", example_input=images)
    (gamma,) = grafts.gammas().values()

    def step() -> None:
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()

    step()
    assert gamma.grad is None or gamma.grad.any()
    assert not gamma.any()  # it does not know of gamma
    for group in grafts.param_groups(lr=0.01):
        optimizer.add_param_group(group)
    step()
    assert gamma.any()


@pytest.mark.slow
def test_what_was_compiled_before_the_graft_sees_it():
    """torch does not look for new hooks, and the model itself does not show that it was compiled elsewhere."""
    torch.compiler.reset()
    model, images = HOST.build(), HOST.images()
    compiled = torch.compile(model, backend="eager")
    original = compiled(images)
    open_gates(graft(model, "top", example_input=images))
    changed = model(images)
    assert not torch.equal(changed, original)
    assert_same(compiled(images), changed)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_place_with_a_parametrized_weight(norm: Callable[[nn.Module], nn.Module]):
    model, images = HOST.build(), HOST.images()
    norm(model.down)
    expected, before = model(images), snapshot(model)
    graft(model, "down", example_input=images)
    assert_same(model(images), expected)
    ungraft(model)
    assert_unchanged(model, before)
    graft(model, "down", example_input=images)
    nn.utils.parametrize.remove_parametrizations(model.down, "weight")
    torch.testing.assert_close(model(images), expected)
    ungraft(model)
    assert [key for key in model.state_dict() if key.startswith("down.")] == ["down.bias", "down.weight"]


@pytest.mark.parametrize("block", [*block_names(), SqueezeExcite])
def test_under_autocast_the_maps_of_the_host_keep_their_dtype(block: str | type[nn.Module]):
    """A float32 gamma times a bfloat16 branch would be a float32 map, fresh or open."""
    model, images = HOST.build(), HOST.images()
    maps: list[Tensor] = []
    for module in (model.stage, model.down, model.top):
        module.register_forward_pre_hook(lambda _, args: maps.append(args[0]))
        module.register_forward_hook(lambda _, args, output: maps.append(output))
    gate = True if block is SqueezeExcite else None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images)
        expected = [(x.dtype, x.stride()) for x in maps]
        assert torch.bfloat16 in {dtype for dtype, _ in expected}
        grafts = graft(model, ["stage", "down"], block=block, gate=gate, example_input=images)
        for value in (0.0, 0.7):
            if value:
                open_gates(grafts, value)
            maps.clear()
            model(images)
            assert [(x.dtype, x.stride()) for x in maps] == expected
