"""`at` by meaning: stages, strides and resolutions, on real hosts and small ones."""

import re

import pytest
import timm
import torch
import torchvision
from hosts import HOSTS, Residual, Tiny, assert_unchanged, rng_states, snapshot
from torch import nn

from sagan_attn import graft, grafts_of
from sagan_attn.errors import GraftError
from sagan_attn.surgery.where import Where, find_stages
from sagan_attn.training.network import GraftConfig, HostConfig, build_network
from sagan_attn.training.small_hosts import cifar_resnet, lookup_cnn

IMAGE = torch.zeros(1, 3, 64, 64)
TIMM = {
    "resnet18": ["act1", "layer1", "layer2", "layer3", "layer4"],
    "resnet50d": ["act1", "layer1", "layer2", "layer3", "layer4"],
    "convnext_atto": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "efficientnet_b0": ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "bn2"],
    "regnetx_002": ["stem", "s1", "s2", "s3", "s4"],
    "mobilenetv3_small_050": ["bn1", "blocks.0", "blocks.1", "blocks.3", "blocks.5"],
}
TORCHVISION = {
    "resnet50": ["relu", "layer1", "layer2", "layer3", "layer4"],
    "convnext_tiny": ["features.1", "features.3", "features.5", "features.7"],
    "mobilenet_v3_small": ["features.0", "features.1", "features.3", "features.8", "features.12"],
    # a dense block is refused, and the transition behind it works on its size until it pools
    "densenet121": ["features.relu0", *(f"features.transition{i}.conv" for i in (1, 2, 3)), "features.norm5"],
}
STEMS = {"efficientnet_b0": 0, "convnext_atto": 0, "convnext_tiny": 0}  # the others have one resolution in their stem


def check_ends(model: nn.Module, name: str, ends: list[str]) -> None:
    stages = find_stages(model, IMAGE)
    assert [stage.name for stage in stages] == ends
    stem = STEMS.get(name, 1)
    assert [stage.number for stage in stages] == [None] * stem + list(range(len(ends) - stem))
    first = 4 if len(ends) == 4 else 2
    assert [stage.stride for stage in stages] == [first << i for i in range(len(ends))]
    assert [stage.size for stage in stages] == [(64 // stage.stride,) * 2 for stage in stages]


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str):
    model = timm.create_model(name).to("meta")  # older timm computes with tensors while it builds: not on meta
    check_ends(model, name, TIMM[name])


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    check_ends(model, name, TORCHVISION[name])


def test_swin_and_a_wide_image():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=(64, 32), window_size=1)
    stages = find_stages(model, torch.zeros(1, 3, 64, 32))
    assert [(s.name, s.size) for s in stages] == [(f"layers.{i}", (16 >> i, 8 >> i)) for i in range(4)]


def test_odd_sizes():
    model = HOSTS["timm-resnet18"].build()
    stages = find_stages(model, torch.zeros(1, 3, 65, 97))
    assert [(s.stride, s.size) for s in stages] == [
        (2, (33, 49)),
        (4, (17, 25)),
        (8, (9, 13)),
        (16, (5, 7)),
        (32, (3, 4)),
    ]


def test_networks_for_small_images():
    stages = find_stages(cifar_resnet(20, 10, 3), torch.zeros(1, 3, 32, 32))
    assert [(s.name, s.number, s.stride) for s in stages] == [("layer1", 0, 1), ("layer2", 1, 2), ("layer3", 2, 4)]
    (stage,) = find_stages(lookup_cnn(10), torch.zeros(1, 3, 48, 48))
    assert (stage.number, stage.stride, stage.size) == (0, 4, (12, 12))


def test_plain_layers():
    def conv(c: int, d: int) -> list[nn.Module]:
        return [nn.Conv2d(c, d, 3, padding=1), nn.ReLU()]

    features = nn.Sequential(*conv(3, 4), nn.MaxPool2d(2), *conv(4, 8), nn.MaxPool2d(2), nn.Dropout(), nn.Identity())
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(8 * 49, 2))
    stages = find_stages(model, IMAGE)
    assert [(s.name, s.number, s.size) for s in stages] == [
        ("0.1", 0, (64, 64)),
        ("0.4", 1, (32, 32)),
        ("0.5", 2, (16, 16)),
    ]


class Detour(nn.Module):
    """A block that keeps the size and works on another one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 8, 4, 4), nn.ConvTranspose2d(8, 8, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(self.down(x))


def test_what_a_block_does_inside_is_no_stage():
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), Detour(), nn.Conv2d(8, 8, 2, 2), nn.BatchNorm2d(8))
    assert [(s.name, s.size) for s in find_stages(model, IMAGE)] == [("1", (32, 32)), ("3", (16, 16))]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("stage:0", "layer1"),
        ("stage:2", "layer3"),
        ("stage:-1", "layer4"),
        ("stage:-4", "layer1"),
        ("stride:2", "relu"),
        ("stride:16", "layer3"),
        ("resolution:4", "layer3"),
        ("resolution:8x8", "layer2"),
    ],
)
def test_words(word: str, name: str):
    assert Where(HOSTS["tv-resnet18"].build(), lambda: IMAGE)(word) == name


def test_resolution_is_height_by_width():
    model = HOSTS["timm-resnet18"].build()
    where = Where(model, lambda: torch.zeros(1, 3, 64, 32))
    assert where("resolution:4x2") == "layer3"
    for word in ("resolution:2x4", "resolution:4"):
        with pytest.raises(GraftError, match=f"ResNet has no {word} for this input"):
            where(word)


def test_graft_by_meaning():
    model = HOSTS["timm-resnet18"].build()
    images = HOSTS["timm-resnet18"].images()
    expected = model(images)
    random = rng_states()
    assert [g.site for g in graft(model, "stage:-1", example_input=images)] == ["layer4"]
    assert [g.site for g in graft(model, ["layer1", "stride:8", "stage:1"], example_input=images)] == [
        "layer1",
        "layer2",
    ]
    more = graft(model, {"stage:2": "sagan", ("resolution:16",): {"block": "nonlocal"}}, example_input=images)
    assert [(g.site, g.name) for g in more] == [("layer3", "sagan"), ("layer1", "nonlocal_")]
    assert torch.equal(model(images), expected)
    assert rng_states() == random
    assert [s.name for s in find_stages(model, images)] == TIMM["resnet18"]  # grafts are no places
    assert len(grafts_of(model)) == 5


def test_the_models_own_input_size():
    model = HOSTS["convnext"].build()
    assert [g.site for g in graft(model, "resolution:14")] == ["stages.2"]


def test_words_in_a_training_config():
    torch.manual_seed(0)
    model = build_network(
        HostConfig("resnet20"), [GraftConfig("stage:-2")], num_classes=3, in_channels=3, image_size=32
    )
    assert [g.site for g in grafts_of(model)] == ["layer2"]


def test_a_module_of_that_name_comes_first():
    model = nn.Sequential()
    model.add_module("stage:0", nn.Conv2d(3, 8, 1))
    model.add_module("last", nn.Conv2d(8, 8, 1))
    assert graft(model, "stage:0", example_input=IMAGE)[0].block.in_channels == 8
    assert grafts_of(model)[0].site == "stage:0"


LIST = "'stage' (stage:0, stride:2, resolution:16x16), 'top' (stage:1, stride:4, resolution:8x8)"


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("stage:2", f"Tiny has no stage:2 for this input; it has {LIST}"),
        ("stage:-3", f"Tiny has no stage:-3 for this input; it has {LIST}"),
        ("stride:1", f"Tiny has no stride:1 for this input; it has {LIST}"),
        ("resolution:8x16", f"Tiny has no resolution:8x16 for this input; it has {LIST}"),
        ("stage:last", "at ('stage:last') must be stage:<number>, stride:<number>, resolution:<side> or resolution:<h"),
        ("stride:-2", "at ('stride:-2') must be"),
        ("resolution:", "at ('resolution:') must be"),
        (["stage", "stage:0"], None),
        ({"stage:0": "sagan", "stage": "sagan"}, "'stage' is asked for twice"),
    ],
)
def test_refusals(at: object, message: str | None):
    model = HOSTS["tiny"].build().train()
    before = snapshot(model)
    image = torch.zeros(1, 3, 32, 32)
    if message is None:
        assert len(graft(model, at, example_input=image)) == 1  # one place under two words
        return
    with pytest.raises(GraftError, match=re.escape(message)):
        graft(model, at, example_input=image)
    assert_unchanged(model, before)


def test_without_any_map_or_input():
    with pytest.raises(GraftError, match="it has no maps larger than 1 x 1"):
        graft(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), "stage:0", example_input=torch.zeros(1, 3, 1, 1))
    with pytest.raises(GraftError, match="no input size can be worked out"):
        graft(nn.Sequential(nn.ReLU()), "stage:0")
    with pytest.raises(GraftError, match=r"channels at its stages cannot be worked out: .*pass example_input"):
        graft(timm.create_model("resnet18", in_chans=1), "stage:0")


def test_compiled_and_wrapped():
    with pytest.raises(GraftError, match="'the model' is compiled"):
        graft(torch.compile(Tiny(), backend="eager"), "stage:0", example_input=IMAGE)
    with pytest.raises(GraftError, match="'the model' is wrapped in DataParallel"):
        graft(nn.DataParallel(Residual(3)), "stage:0", example_input=IMAGE)
