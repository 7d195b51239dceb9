"""Promise 6: what cannot be right is refused with what to do, and the model is left as it was."""

import re
from typing import Any

import pytest
import timm
import torch
import torchvision
from hosts import HOSTS, Residual, Tiny, assert_unchanged, snapshot
from timm.layers.non_local_attn import NonLocalAttn
from torch import nn

from sagan_attn import SaganAttnError, graft, sites, ungraft
from sagan_attn.errors import BlockError, GraftError

IMAGE = torch.zeros(1, 3, 32, 32)


class Scale(nn.Module):
    """Not the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((1, channels, 1, 1), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no match": ({"at": "stagge"}, r"no module of Tiny matches the name 'stagge'; near names: .*\bstage\b"),
    "no match of a glob": ({"at": "stage.*.bm"}, r"pattern 'stage\.\*\.bm'; near names: .*stage\.0\.bn"),
    "no match of a regex": ({"at": re.compile("tops")}, "regex 'tops'; near names: .*top"),
    "one of a list does not match": ({"at": ["stage", "tip"]}, "name 'tip'; near names: top"),
    "substring": ({"at": "sta"}, "no module"),
    "empty list": ({"at": []}, "at is an empty list"),
    "empty mapping": ({"at": {}}, "at is an empty mapping"),
    "number": ({"at": 3}, r"at \(3\) must be a module name"),
    "never fires": ({"at": "unused"}, "'unused' never fires in a forward pass"),
    "several channel counts": ({"at": "top.relu"}, "'top.relu' fires 2 times a forward pass, with 64, 16 channels"),
    "tuple": ({"at": "pair"}, "'pair' puts out a tuple; a block needs one image-shaped float tensor"),
    "two dimensions": ({"at": "fc"}, r"'fc' puts out a tensor of shape \(1, 5\); a block needs a map of 4 dimensions"),
    "unknown option": ({"at": "top", "options": {"head": 2}}, "block 'sagan' has no option 'head'; it has heads, "),
    "option of that name": ({"at": "top", "options": {"block": "sagan"}}, "block 'sagan' has no option 'block'"),
    "option refused": ({"at": "top", "options": {"heads": 3}}, r"heads \(3\) must divide the query channels"),
    "unknown block": ({"at": "top", "block": "sagann"}, "unknown block 'sagann'; did you mean sagan"),
    "a module": ({"at": "top", "block": nn.Identity()}, "must be a registered name, a class or a factory"),
    "no module": ({"at": "top", "block": lambda channels: channels}, "made a int, not a torch.nn.Module"),
    "no argument": ({"at": "top", "block": lambda: nn.Identity()}, "takes no argument; a factory is called with"),
    "post-norm": (
        {"at": "top", "block": "encoder", "options": {"norm_first": False}},
        r"EncoderBlock2d does not start as the identity.*; a post-norm layer \(norm_first=False\) ends in a.*gate=",
    ),
    "post-norm decoder": ({"at": "top", "block": "decoder", "options": {"norm_first": False}}, "a post-norm layer"),
    "open gate": ({"at": "top", "options": {"gamma_init": 0.5}}, "SelfAttention2d does not start as the identity"),
    "no zero to start with": (
        {"at": "top", "block": "multihead", "options": {"zero_init": False}},
        "MultiHeadAttention2d does not start as the identity",
    ),
    "context of other channels": (
        {"at": "top", "block": "cross", "options": {"context_channels": 8}},
        r"a context of shape \[2, 8, H, W\] is required: none was given",
    ),
    "reduction leaves nothing": (
        {"at": "top", "options": {"reduction": 32}},
        r"reduction \(32\) leaves 0 channels of in_channels \(16\)",
    ),
    "gate on gate": (
        {"at": "top", "block": "sagan", "gate": True},
        "SelfAttention2d starts as the identity by itself: behind a second gate of 0 neither would ever get a gradient",
    ),
    "gate on a norm of 0": ({"at": "top", "block": NonLocalAttn, "gate": True}, "NonLocalAttn starts as the identity"),
    "a word as gate": ({"at": "top", "gate": "yes"}, r"gate \('yes'\) must be True, False or None"),
    "not the identity": ({"at": "top", "block": Scale}, "Scale does not start as the identity.*Pass gate=True"),
    "identity in eval mode only": ({"at": "top", "block": lambda c: nn.Dropout()}, "Dropout does not start as the id"),
    "other shape": ({"at": "top", "block": lambda c: nn.Conv2d(c, 3, 1), "gate": False}, "does not keep the shape"),
    "in place behind a gate": (
        {"at": "top", "block": lambda c: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(c, c, 1)), "gate": True},
        "Sequential is not the identity even behind a gate of 0: it changes its input in place",
    ),
    "name with a dot": ({"at": "top", "name": "a.b"}, r"name \('a.b'\) must be an identifier"),
    "empty name": ({"at": "top", "name": ""}, r"name \(''\) must be an identifier"),
    "keyword": ({"at": "top", "name": "class"}, r"name \('class'\) must be an identifier"),
    "name of a Module": ({"at": "top", "name": "forward"}, r"name \('forward'\) must be an identifier that torch"),
    "two names of one place": ({"at": ["stage", "stage.1"]}, r"'stage' and 'stage.1' are the same place \('stage.1'\)"),
    "asked for twice": ({"at": {"top": "sagan", "t?p": "sagan"}}, "'top' is asked for twice; a second graft named"),
    "options beside a mapping": ({"at": {"top": "sagan"}, "options": {"heads": 1}}, "options do not go with a mapping"),
    "second of two is refused": ({"at": {"stage": "sagan", "unused": "sagan"}}, "'unused' never fires"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_leaves_the_model_alone(case: str):
    arguments, message = REFUSALS[case]
    model = HOSTS["tiny"].build().train()
    before = snapshot(model)
    with pytest.raises(SaganAttnError, match=message):
        graft(model, **{"example_input": IMAGE, **arguments})
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.zeros(1, 4, 32, 32), r"example_input is none that Tiny takes: .*4 channels.* \(RuntimeError\)$"),
        (torch.zeros(1, 3, 32, 32, device="meta"), r"none that Tiny takes: .*meta tensor.* \(NotImplementedError\)$"),
        ([1], r"none that Tiny takes: conv2d\(\) received an invalid .*TypeError"),
        (("x", "y"), r"none that Tiny takes: Tiny.forward\(\) takes 2 positional arguments but 3 were given"),
    ],
    ids=["channels", "meta", "list", "tuple"],
)
def test_an_input_the_model_does_not_take(example: Any, message: str):
    model = HOSTS["tiny"].build().train()
    before = snapshot(model)
    with pytest.raises(GraftError, match=message) as raised:
        graft(model, "top", example_input=example)
    assert raised.value.__cause__ is not None
    assert_unchanged(model, before)


def test_same_name_at_the_same_place_again():
    model = HOSTS["tiny"].build()
    graft(model, "stage", example_input=IMAGE)
    before = snapshot(model)
    with pytest.raises(GraftError, match=r"site 'stage.1' already has a graft named 'sagan' \(at module 'stage.1'\)"):
        graft(model, "stage.1", example_input=IMAGE)
    assert_unchanged(model, before)


def test_a_module_shared_between_two_stages():
    act = nn.ReLU()
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), act), nn.Sequential(nn.Conv2d(8, 8, 1), act))
    before = snapshot(model)
    with pytest.raises(GraftError, match=r"site '0' fires 1 times a forward pass, but '0.1', .*, 2 times"):
        graft(model, "0", example_input=IMAGE)
    assert_unchanged(model, before)
    assert "0" not in [site.name for site in sites(model, IMAGE)]


def test_relu_of_a_torchvision_bottleneck():
    model = torchvision.models.resnet50()
    with pytest.raises(GraftError, match=r"'layer3.0.relu' fires 3 times .*, with 256, 256, 1024 channels"):
        graft(model, "layer3.0.relu", example_input=torch.zeros(1, 3, 32, 32))


class Dense(nn.ModuleDict):
    """Collects what its children put out, as torchvision's and timm's DenseNets do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [x]
        for layer in self.values():
            maps.append(layer(torch.cat(maps, 1)))
        return torch.cat(maps, 1)


def test_a_container_that_calls_its_children():
    model = nn.Sequential(Dense({"one": nn.Conv2d(3, 2, 1), "two": nn.Conv2d(5, 2, 1)}), nn.Conv2d(7, 4, 1))
    before = snapshot(model)
    with pytest.raises(GraftError, match="'0' is a Dense, a container that may call each of its children"):
        graft(model, "0", example_input=IMAGE)
    assert_unchanged(model, before)
    assert "0" not in [site.name for site in sites(model, IMAGE)]
    graft(model, "0.two", example_input=IMAGE)


def test_host_with_an_attribute_of_that_name():
    model = HOSTS["tiny"].build()
    model.top.grafts = nn.Identity()
    before = snapshot(model)
    with pytest.raises(GraftError, match="module 'top' has an attribute 'grafts' of its own"):
        graft(model, "top", example_input=IMAGE)
    assert_unchanged(model, before)
    assert "top" not in [site.name for site in sites(model, IMAGE)]


def test_compiled_models():
    model = HOSTS["tiny"].build()
    with pytest.raises(GraftError, match="'the model' is compiled and would ignore a graft: graft first"):
        graft(torch.compile(model, backend="eager"), "_orig_mod.top", example_input=IMAGE)
    model.top.compile(backend="eager")
    with pytest.raises(GraftError, match="'top' is compiled"):
        graft(model, "top.bn", example_input=IMAGE)
    model.compile(backend="eager")
    with pytest.raises(GraftError, match="'the model' is compiled"):
        graft(model, "stage", example_input=IMAGE)
    with pytest.raises(GraftError, match="'the model' is compiled"):
        sites(model, IMAGE)


def test_wrapped_model():
    with pytest.raises(GraftError, match="'the model' is wrapped in DataParallel, which would not train a graft"):
        graft(nn.DataParallel(Tiny()), "module.top", example_input=IMAGE)


def test_ungraft_without_grafts_and_stale_handles():
    model = HOSTS["tiny"].build()
    with pytest.raises(GraftError, match="Tiny has no grafts to remove"):
        ungraft(model)
    grafts = graft(model, ["stage", "top"], example_input=IMAGE)
    grafts[1:].remove()
    before = snapshot(model)
    with pytest.raises(GraftError, match="graft 'sagan' at 'top' is no longer in the model"):
        grafts.remove()
    with pytest.raises(GraftError, match="no longer in the model"), grafts.disabled():
        pass
    assert_unchanged(model, before)


def test_channels_that_cannot_be_worked_out():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Residual(8)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.inner(a + b)

    with pytest.raises(
        GraftError, match=r"channels at inner cannot be worked out: .*\(1, 8, 224, 224\).*example_input"
    ):
        graft(Wrapper(), "inner")
    with pytest.raises(GraftError, match="no input size can be worked out for Sequential: pass example_input"):
        graft(nn.Sequential(nn.ReLU()), "0")
    model = timm.create_model("resnet18", in_chans=1)
    with pytest.raises(GraftError, match="pass example_input"):
        graft(model, "layer3")


@pytest.mark.parametrize("name", ["lr", "weight_decay", "gamma_lr_scale"])
def test_rates_that_are_none(name: str):
    grafts = graft(HOSTS["tiny"].build(), "top", example_input=IMAGE)
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(GraftError, match=rf"{name} \({value}\) must be a number of at least 0"):
            grafts.param_groups(**{"lr": 0.1, name: value})


def test_errors_are_the_librarys_own():
    assert issubclass(GraftError, SaganAttnError)
    assert issubclass(BlockError, SaganAttnError)
