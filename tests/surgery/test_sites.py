"""`sites` against numbers worked out by hand, and against what `graft` accepts."""

import copy

import pytest
import torch
from hosts import HOSTS, WIDE_HOSTS, Tiny, assert_unchanged, rng_states, snapshot
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sagan_attn import Site, graft, sites
from sagan_attn.errors import BlockError, GraftError

ANY = {**HOSTS, **WIDE_HOSTS}
IMAGE = torch.zeros(2, 3, 32, 48)


def named(found: list[Site]) -> dict[str, Site]:
    return {site.name: site for site in found}


def test_numbers_by_hand():
    site = named(sites(Tiny(), IMAGE))["top"]
    b, c, n, d = 2, 16, 8 * 12, 2
    parameters = 2 * (c * d + d) + (c * c + c) + 1
    flops = 2 * b * n * c * (d + d + c) + 2 * b * n * n * (d + c)
    assert site == Site("top", 16, 8, 12, "NCHW", 1, parameters, flops, 4 * b * n * n, site.flops_share)
    assert site.positions == n
    for part in ("top", "16 x 8 x 12", "NCHW", f"+{parameters:,} parameters", "MFLOPs", "weights 0.07 MB"):
        assert part in str(site)


def test_options_change_the_numbers():
    options = {"pool": 2, "heads": 2, "value_reduction": 2, "bias": False}
    site = named(sites(Tiny(), IMAGE, options=options))["top"]
    b, c, n, m, d, v = 2, 16, 96, 24, 2, 8
    assert site.parameters == 2 * c * d + 2 * c * v + 1
    assert site.flops == 2 * b * n * c * (2 * d + 2 * v) + 2 * b * n * m * (d + v)
    assert site.map_bytes == 4 * b * 2 * n * m


def test_block_without_weights():
    site = named(sites(Tiny(), IMAGE, block="context-mean"))["top"]
    assert site.map_bytes is None
    assert site.parameters == (16 * 16 + 16) + (16 * 2 + 2) + 2 * 16 + 1
    assert site.flops == 2 * 2 * 96 * (16 * 16 + 2 * 16 * 2)
    assert "weights" not in str(site)


@pytest.mark.parametrize("name", ["timm-resnet18", "swin"])
def test_flops_of_a_host_are_those_of_torchs_counter(name: str):
    model, images = ANY[name].build(), ANY[name].images()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    site = sites(model, images)[0]
    assert round(site.flops / site.flops_share) == counter.get_total_flops()


class Expanding(nn.Module):
    """Hands on an expanded parameter, which torch's own counter cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.token.expand(len(x), -1, 4, 4))


def test_a_module_that_takes_an_expanded_parameter():
    (site,) = sites(Expanding(), torch.zeros(2, 3, 8, 8), block="context-mean")
    assert site.name == "conv"
    assert round(site.flops / site.flops_share) == 2 * 2 * 16 * 8 * 8


class Heads(nn.Module):
    """One head run on two maps, as in detectors; the second is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.head(x[:1, :, ::4, ::4])
        return self.head(x).mean((1, 2, 3)) + small.mean()


def test_a_module_that_fires_on_maps_of_several_sizes():
    model = Heads()
    (site,) = sites(model, torch.zeros(3, 3, 8, 8))
    assert (site.calls, site.height, site.width) == (2, 2, 2)
    assert site.map_bytes == 4 * 3 * 64 * 64
    assert site.flops == sum(2 * b * n * 8 * (1 + 1 + 8) + 2 * b * n * n * (1 + 8) for b, n in [(1, 4), (3, 64)])
    x = torch.randn(3, 3, 8, 8)
    expected = model(x)
    graft(model, "head", example_input=x)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "name", ["tiny", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tv-resnet18", "regnet", "densenet", "swin"))]
)
def test_sites_are_the_places_graft_accepts(name: str):
    host = {**HOSTS, **WIDE_HOSTS}[name]
    model, image = host.build(), host.images(1)
    found = named(sites(model, image))
    names = [n for n, _ in model.named_modules() if n]
    assert list(found) == [n for n in names if n in found]
    fresh = copy.deepcopy(model)
    refused = set()
    some = names if name in ("tiny", "tv-resnet18") else names[::9]
    for place in dict.fromkeys([*some, *(n for n in names if n not in found)]):
        try:
            grafts = graft(fresh, place, example_input=image)
        except GraftError:
            refused.add(place)
        else:
            assert grafts[0].block.in_channels == found[place].channels
            assert sum(p.numel() for p in grafts.parameters()) == found[place].parameters
            grafts.remove()
            assert place in found
    assert not refused & set(found)
    assert refused


def test_all_sites_at_once_change_nothing():
    host = HOSTS["tiny"]
    model, images = host.build(), host.images()
    expected = model(images)
    places = {site.name: {"name": f"g{i}"} for i, site in enumerate(sites(model, images))}
    assert len(graft(model, places, example_input=images)) == len(places)
    assert torch.equal(model(images), expected)
    assert {s.name for s in sites(model, images)} == set(places)  # and grafts are no sites


def test_model_is_left_alone():
    model = HOSTS["tiny"].build().train()
    before, random = snapshot(model), rng_states()
    sites(model, IMAGE)
    assert_unchanged(model, before)
    assert rng_states() == random


def test_layout_of_swin():
    host = WIDE_HOSTS["swin"]
    site = named(sites(host.build(), host.images(1)))["layers.1"]
    assert (site.layout, site.channels, site.height, site.width) == ("NHWC", 192, 8, 8)


def test_options_that_fit_some_places_only():
    model = nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 32, 1))
    assert [site.name for site in sites(model, IMAGE, options={"heads": 3})] == ["0"]
    with pytest.raises(BlockError, match=r"heads \(5\) must divide the query channels"):
        sites(model, IMAGE, options={"heads": 5})
    with pytest.raises(BlockError, match="block 'sagan' has no option 'head'"):
        sites(model, IMAGE, options={"head": 5})
    with pytest.raises(BlockError, match="unknown block 'sagen'"):
        sites(model, IMAGE, block="sagen")


def test_without_example_input():
    assert named(sites(Tiny()))["top"].height == 56
    with pytest.raises(GraftError, match="no input size can be worked out"):
        sites(nn.Sequential(nn.ReLU()))


def test_share_of_the_hosts_flops_by_hand():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, 2, 1)
            self.fc = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).mean((2, 3)))

    (site,) = sites(Two(), torch.zeros(2, 3, 8, 12))
    n = 4 * 6
    host = 2 * 2 * n * 8 * 27 + 2 * 2 * 8 * 5
    block = 2 * 2 * n * 8 * (1 + 1 + 8) + 2 * 2 * n * n * (1 + 8)
    assert site.flops == block
    assert site.flops_share == block / host
    assert site.positions == n
    assert f"({block / host:.1%})" in str(site)


def test_a_host_without_flops():
    (site,) = sites(nn.Sequential(nn.ReLU()), IMAGE)
    assert site.flops_share == float("inf")


def test_sorting():
    model = HOSTS["tiny"].build()
    found = sites(model, IMAGE)
    assert sites(model, IMAGE, sort_by="name") == found
    for key in ("flops", "parameters", "map_bytes", "positions", "flops_share"):
        ordered = sites(model, IMAGE, sort_by=key)
        assert ordered == sorted(found, key=lambda site: getattr(site, key))
        assert ordered != found
    assert sites(model, IMAGE, sort_by="resolution") == sites(model, IMAGE, sort_by="positions")
    free = sites(model, IMAGE, block="context-max")
    assert sites(model, IMAGE, block="context-max", sort_by="map_bytes") == free
    with pytest.raises(GraftError, match=r"sort_by \('cost'\) must be one of name, flops, parameters"):
        sites(model, IMAGE, sort_by="cost")


def test_budgets():
    model = HOSTS["tiny"].build()
    found = sites(model, IMAGE)
    top = named(found)["top"]
    kept = sites(model, IMAGE, max_map_bytes=top.map_bytes)
    assert kept == [site for site in found if site.map_bytes <= top.map_bytes]
    assert 0 < len(kept) < len(found)
    kept = sites(model, IMAGE, max_flops_share=top.flops_share)
    assert kept == [site for site in found if site.flops_share <= top.flops_share]
    assert 0 < len(kept) < len(found)
    assert sites(model, IMAGE, max_map_bytes=1) == []
    assert sites(model, IMAGE, block="context-max", max_map_bytes=1) != []
    for limit in (0, -1.0, float("nan"), "5%", True):
        with pytest.raises(GraftError, match=r"max_flops_share \(.*\) must be a number above 0"):
            sites(model, IMAGE, max_flops_share=limit)


def test_graft_within_a_budget():
    model = HOSTS["tiny"].build()
    before = snapshot(model)
    stage, top = (named(sites(model, IMAGE))[name] for name in ("stage", "top"))
    with pytest.raises(GraftError, match=r"block 'sagan' at 'stage' costs .* MFLOPs, .* of the model's: more than max"):
        graft(model, ["top", "stage"], example_input=IMAGE, max_flops_share=top.flops_share)
    message = rf"block 'sagan' at 'stage' costs {stage.map_bytes:,} bytes of attention weights: more than max_map_bytes"
    with pytest.raises(GraftError, match=message):
        graft(model, "stage", example_input=IMAGE, max_map_bytes=stage.map_bytes - 1)
    with pytest.raises(GraftError, match=r"max_map_bytes \(0\) must be a number above 0"):
        graft(model, "stage", example_input=IMAGE, max_map_bytes=0)
    with pytest.raises(BlockError, match=r"heads \(3\) must divide"):
        graft(model, "top", example_input=IMAGE, options={"heads": 3}, max_map_bytes=1)
    with pytest.raises(GraftError, match="costs"):
        graft(model, "stage", max_map_bytes=1)
    assert_unchanged(model, before)
    graft(model, "stage", example_input=IMAGE, max_flops_share=stage.flops_share, max_map_bytes=stage.map_bytes)


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
def test_scripted_children_are_passed_over():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), torch.jit.trace(nn.Conv2d(8, 8, 1), torch.zeros(1, 8, 4, 4)))
    assert [site.name for site in sites(model, torch.zeros(1, 3, 8, 8))] == ["0"]


def test_large_maps_are_costed_at_once():
    (site,) = sites(nn.Sequential(nn.Conv2d(3, 8, 1)), torch.zeros(1, 3, 256, 256), options={"path": "auto"})
    assert site.map_bytes == 4 * 65536**2
