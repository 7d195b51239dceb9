"""What `graft` makes of its arguments, and the handle it returns."""

import copy
import re

import numpy as np
import pytest
import timm
import torch
from hosts import HOSTS, Host, Tiny, assert_same, assert_unchanged, count_calls, open_gates, rng_states, snapshot
from timm.layers import SEModule
from torch import nn

from sagan_attn import Grafts, SelfAttention2d, graft, grafts_of, is_grafted, ungraft
from sagan_attn.blocks import Gated

HOST: Host = HOSTS["tiny"]
IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("top", ["top"]),
        (["top", "stage.0"], ["top", "stage.0"]),
        (["top", "t?p", "top"], ["top"]),
        ("stage.*", ["stage.0", "stage.1"]),
        ("**.bn", ["stage.0.bn", "stage.1.bn", "top.bn"]),
        ("stage.**.bn", ["stage.0.bn", "stage.1.bn"]),
        ("stage.[1-9]", ["stage.1"]),
        ("*.bn", ["top.bn"]),
        (re.compile(r"stage\.\d"), ["stage.0", "stage.1"]),
        ({"top": "sagan", ("stage.0", "stage.1"): "context-max"}, ["top", "stage.0", "stage.1"]),
    ],
)
def test_places(at, expected: list[str]):
    grafts = graft(HOST.build(), at, example_input=IMAGE)
    assert isinstance(grafts, Grafts)
    assert [g.site for g in grafts] == expected


def test_mapping_with_options():
    at = {"stage": {"block": "sagan", "heads": 1, "pool": 2, "name": "a"}, "top": {"heads": 2}, "down": "context-mean"}
    model = HOST.build()
    first, second, third = graft(model, at, example_input=IMAGE)
    assert (first.name, first.path, first.block.pool) == ("a", "stage.1.grafts.a", 2)
    assert (second.name, second.block.heads) == ("sagan", 2)
    assert (third.name, third.block.reduce) == ("context_mean", "mean")
    assert model.get_submodule(third.path) is third.block
    assert [g.path for g in grafts_of(model)] == ["stage.1.grafts.a", "down.grafts.context_mean", "top.grafts.sagan"]


def test_several_blocks_at_one_site_run_in_order_and_leave_one_by_one():
    model, images = HOST.build(), HOST.images()
    original, before = model(images), snapshot(model)
    names = ["one", "two", "three"]
    handles = [graft(model, "stage", name=name, example_input=IMAGE) for name in names]
    assert [g.name for g in grafts_of(model)] == names
    order = []
    for name, handle in zip(names, handles, strict=True):
        handle[0].block.register_forward_hook(lambda *_, name=name: order.append(name))
    assert_same(model(images), original)
    assert order == names
    open_gates(grafts_of(model))
    with handles[0].disabled(), handles[2].disabled():
        only_two = model(images)
    handles[0].remove()
    handles[2].remove()
    assert_same(model(images), only_two)
    assert [g.name for g in grafts_of(model)] == ["two"]
    handles[1].remove()
    assert not is_grafted(model)
    assert_unchanged(model, before)


def test_disabled_nests_and_survives_errors():
    model, images = HOST.build(), HOST.images()
    original = model(images)
    grafts = graft(model, ["stage", "top"], example_input=IMAGE)
    open_gates(grafts)
    changed = model(images)
    with grafts.disabled():
        with grafts[:1].disabled(), grafts_of(model).disabled():
            assert_same(model(images), original)
        assert_same(model(images), original)
        calls = count_calls(grafts[0].block)
        model(images)
        assert not calls
    assert_same(model(images), changed)

    def fail():
        with grafts.disabled():
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert_same(model(images), changed)
    with grafts.disabled():
        ungraft(model)
    assert_same(model(images), original)
    again = graft(model, ["stage", "top"], example_input=IMAGE)
    open_gates(again)
    assert_same(model(images), changed)  # same seed, same blocks, and not off


def test_block_follows_the_host():
    model = HOST.build().double()
    block = graft(model, "stage", example_input=IMAGE)[0].block
    assert {p.dtype for p in block.parameters()} == {torch.float64}
    assert not any(m.training for m in block.modules())
    assert model(HOST.images().double()).dtype == torch.float64

    model = HOST.build().bfloat16().train()
    grafts = graft(model, "top", block="sagan", options={"spectral_norm": True}, example_input=IMAGE)
    assert {t.dtype for t in grafts[0].block.state_dict().values()} == {torch.bfloat16}
    assert all(m.training for m in model.top.grafts.modules())
    assert model(HOST.images().bfloat16()).dtype == torch.bfloat16
    model.eval().float()
    assert not grafts[0].block.training
    assert grafts[0].block.gamma.dtype == torch.float32

    model = HOST.build().to("meta")
    assert graft(model, "top", example_input=IMAGE)[0].block.gamma.device.type == "meta"


def test_global_state_is_untouched():
    model = HOST.build().train()
    model.top.add_module("dropout", nn.Dropout())
    before, modules = rng_states(), snapshot(model)
    grafts = graft(model, {"stage": "sagan", "top": {"block": SelfAttention2d}}, example_input=IMAGE)
    assert rng_states() == before
    grafts.remove()
    assert rng_states() == before
    assert_unchanged(model, modules)
    assert np.random.get_state()[0] == "MT19937"


def weights(site: str = "stage", seed: int = 0, first: str | None = None, **options) -> torch.Tensor:
    model = HOST.build()
    if first:
        graft(model, first, example_input=torch.zeros(1, 3, 32, 32, dtype=torch.float32, device="cpu"), seed=9)
    grafts = graft(model, site, example_input=torch.zeros(1, 3, 32, 32, device="cpu"), seed=seed, **options)
    return grafts[0].block.value.weight.detach()


def test_seed_alone_decides_the_weights():
    expected = weights()
    torch.manual_seed(77)
    assert torch.equal(weights(), expected)
    assert torch.equal(weights(first="top"), expected)
    assert torch.equal(weights(["stage", "top"]), expected)
    assert not torch.equal(weights(seed=1), expected)
    assert not torch.equal(weights("stage.0"), expected)
    assert not torch.equal(weights(name="other"), expected)


@pytest.mark.parametrize("block", ["sagan", SelfAttention2d])
def test_defaults_of_torch_do_not_matter(block):
    expected = weights("top", block=block, name="a")
    model = HOST.build()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        graft(model, "top", block=block, name="a")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    found = grafts_of(model)[0].block.value.weight
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_parameter_groups():
    model = HOST.build()
    grafts = graft(model, ["stage", "top"], example_input=IMAGE)
    grafts[1].block.key.bias.requires_grad_(False)
    weights_, plain, gammas = grafts.param_groups(lr=0.1, weight_decay=0.5)
    assert (weights_["lr"], weights_["weight_decay"], len(weights_["params"])) == (0.1, 0.5, 6)
    assert (plain["lr"], plain["weight_decay"], len(plain["params"])) == (0.1, 0.0, 5)
    assert (gammas["lr"], gammas["weight_decay"], len(gammas["params"])) == (1.0, 0.0, 2)
    assert {id(p) for p in gammas["params"]} == {id(g.block.gamma) for g in grafts}
    assert [g["lr"] for g in grafts.param_groups(lr=0.1, gamma_lr_scale=2)] == [0.1, 0.1, 0.2]

    optimizer = torch.optim.SGD(grafts.param_groups(lr=0.1))
    model(HOST.images()).square().sum().backward()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"stage.1.grafts.sagan.gamma", "top.grafts.sagan.gamma"}
    assert [name for name, _ in grafts.named_parameters()] == [n for n in before if ".grafts." in n]


class Own(nn.Module):
    def __init__(self, channels: int, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_gate_around_a_block_of_timm():
    model, images = HOST.build(), HOST.images()
    expected = model(images)
    grafts = graft(model, "top", block=SEModule, gate=True, options={"rd_ratio": 0.25}, example_input=IMAGE)
    assert isinstance(grafts[0].block, Gated)
    assert_same(model(images), expected)
    open_gates(grafts, 1.0)
    reference = copy.deepcopy(HOST.build())
    se = copy.deepcopy(grafts[0].block.block)
    reference.top.register_forward_hook(lambda m, args, out: se(out))
    torch.testing.assert_close(model(images), reference(images))


def test_gate_false_puts_a_block_in_as_it_is():
    model, images = HOST.build(), HOST.images()
    graft(model, "top", block=Own, gate=False, options={"factor": 3.0}, example_input=IMAGE)
    reference = HOST.build()
    reference.top.register_forward_hook(lambda m, args, out: out * 3)
    assert_same(model(images), reference(images))
    graft(model, "stage", block=lambda channels: Own(channels, 1.0), name="one", example_input=IMAGE)


class Many(Tiny):
    def forward(self, images: list[torch.Tensor], scale: float = 1.0) -> torch.Tensor:
        return super().forward(torch.stack(images) * scale)


@pytest.mark.parametrize("example", [[IMAGE[0]], ([IMAGE[0]], 2.0), {"images": [IMAGE[0]], "scale": 2.0}])
def test_kinds_of_example_input(example):
    assert graft(Many().eval(), "top", example_input=example)[0].block.in_channels == 16


def test_without_example_input():
    assert graft(timm.create_model("resnet18"), "layer2")[0].block.in_channels == 128
    assert graft(Tiny(), "top")[0].block.in_channels == 16
