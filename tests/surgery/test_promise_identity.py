"""Promise 1, and of 4 the copies: the output right after grafting is that before, bit for bit."""

import copy
import io
import pickle

import pytest
import torch
import torchvision
from hosts import ANY_HOST, HOSTS, WIDE_HOSTS, Host, assert_same, assert_unchanged, count_calls, open_gates, snapshot
from roads import FOUR, mostly_slow

from sagan_attn import graft, grafts_of, is_grafted, ungraft
from sagan_attn.blocks import block_names

WIDE = [pytest.param(host, id=name, marks=pytest.mark.slow) for name, host in WIDE_HOSTS.items()]
ALL = [pytest.param(host, id=name) for name, host in HOSTS.items()] + WIDE


@pytest.mark.parametrize("host", ALL)
def test_output_is_bit_identical_and_ungraft_restores_everything(host: Host):
    model, images = host.build(), host.images()
    untouched = copy.deepcopy(model)
    before = snapshot(model)
    maps = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, expected_cl = model(images), model(maps)
        grafts = graft(model, list(host.sites), example_input=images[:1])
        assert_same(model(images), expected)
        assert_same(model(maps), expected_cl)
        with torch.autocast("cpu", torch.bfloat16):
            with grafts.disabled():
                expected_half = model(images)
            assert_same(model(images), expected_half)
        state = model.state_dict()
        assert [key for key in state if ".grafts." not in key] == before["keys"]
        for key, value in zip(before["keys"], before["values"], strict=True):
            assert torch.equal(state[key], value), key

        open_gates(grafts)
        assert not torch.equal(model(images), expected)
        with grafts.disabled():
            assert_same(model(images), expected)

        model.train()
        untouched.train()
        open_gates(grafts, 0.0)
        torch.manual_seed(3)
        expected_train = untouched(images)
        torch.manual_seed(3)
        assert_same(model(images), expected_train)
    model.eval()
    model.load_state_dict(dict(zip(before["keys"], before["values"], strict=True)), strict=False)
    ungraft(model)
    assert not is_grafted(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("block", block_names())
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_registered_block_starts_as_the_identity_in_a_host(block: str, layout: torch.memory_format):
    host = HOSTS["tiny"]
    model, images = host.build(), host.images().to(memory_format=layout)
    maps = []
    model.top.register_forward_pre_hook(lambda _, args: maps.append(args[0]))
    expected = model(images)
    grafts = graft(model, ["stage", "top"], block=block, example_input=images)
    assert_same(model(images), expected)
    assert_same(maps[1], maps[0])  # what the next layer gets
    open_gates(grafts)
    assert not torch.equal(model(images), expected)


def test_gradients_of_the_host_are_those_before():
    host = HOSTS["tiny"]
    model, images = host.build().train(), host.images()
    untouched = copy.deepcopy(model)
    graft(model, ["stage", "top"], example_input=images)
    model(images).square().sum().backward()
    untouched(images).square().sum().backward()
    for name, parameter in untouched.named_parameters():
        if parameter.grad is None:
            assert model.get_parameter(name).grad is None
        else:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("images", [(0, 3, 32, 32), (1, 3, 8, 8), (3, 3, 33, 47), (1, 3, 1, 1)])
def test_any_batch_and_image_size(images: tuple[int, ...]):
    model, x = HOSTS["tiny"].build(), torch.randn(images)
    expected = model(x)
    graft(model, {"stage": "sagan", "top": {"block": "sagan", "pool": 2}}, example_input=torch.zeros(1, 3, 32, 32))
    assert_same(model(x), expected)


def test_nan_in_the_branch_is_not_hidden_by_gamma_0():
    model, images = HOSTS["tiny"].build(), HOSTS["tiny"].images()
    grafts = graft(model, "top", example_input=images)
    with torch.no_grad():
        grafts[0].block.value.bias[0] = torch.nan
    assert model(images).isnan().all()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", mostly_slow(("tiny", *FOUR, "swin"), "tiny", "mambaout"))
def test_copies_carry_their_own_grafts(name: str, way: str):
    host = ANY_HOST[name]
    model, images = host.build(), host.images()
    original = model(images)
    grafts = graft(model, list(host.sites), example_input=images)
    open_gates(grafts)
    changed = model(images)
    with grafts.disabled():  # a copy made in here has its grafts on
        if way == "deepcopy":
            other = copy.deepcopy(model)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert_same(model(images), original)
    calls = [count_calls(g.block) for g in grafts_of(other)]
    assert_same(other(images), changed)
    assert [len(c) for c in calls] == [1] * len(grafts)
    assert [g.path for g in grafts_of(other)] == [g.path for g in grafts]
    assert [g.site for g in grafts_of(other)] == [g.site for g in grafts]

    open_gates(grafts_of(other), 0.0)
    assert_same(other(images), original)
    assert_same(model(images), changed)
    ungraft(other)
    assert_same(model(images), changed)
    assert not is_grafted(other)
    assert is_grafted(model)
    ungraft(model)
    assert_same(model(images), original)


def test_state_dict_loads_before_and_after():
    host = HOSTS["tiny"]
    pretrained = host.build().state_dict()
    model = type(host.build())()
    grafts = graft(model, ["stage", "top"], example_input=host.images())
    blocks = {name: p.clone() for name, p in grafts.named_parameters()}
    model.load_state_dict(pretrained, strict=True)  # the originals alone: blocks stay as they are
    assert all(torch.equal(p, blocks[name]) for name, p in grafts.named_parameters())
    assert set(pretrained) == {key for key in model.state_dict() if ".grafts." not in key}
    torn = {key: value for key, value in model.state_dict().items() if not key.endswith("grafts.sagan.gamma")}
    with pytest.raises(RuntimeError, match=r"Missing key.*grafts.sagan.gamma"):
        model.load_state_dict(torn, strict=True)
    assert_same(model.eval()(host.images()), host.build()(host.images()))

    second = type(model)()
    second.load_state_dict(pretrained, strict=True)
    grafts = graft(second, ["stage", "top"], example_input=host.images(), seed=5)
    open_gates(grafts)
    model.load_state_dict(second.state_dict(), strict=True)
    assert_same(model(host.images()), second.eval()(host.images()))
    ungraft(model)
    model.load_state_dict(pretrained, strict=True)


def test_hooks_of_the_user_stay():
    model, images = HOSTS["tiny"].build(), HOSTS["tiny"].images()
    seen = []
    first = model.top.register_forward_hook(lambda *_: seen.append("first"))
    graft(model, "top", example_input=images)
    model.top.register_forward_hook(lambda *_: seen.append("second"))
    ungraft(model)
    model(images)
    assert seen == ["first", "first", "second"]  # once while the graft looked at the maps
    first.remove()
    assert len(model.top._forward_hooks) == 1


@pytest.mark.slow
@pytest.mark.parametrize("site", ["backbone.fpn.layer_blocks.0", "rpn.head.conv", "backbone.body.13"])
def test_detector(site: str):
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    torch.manual_seed(0)
    # untrained, it is sure of nothing: without the thresholds it puts out boxes all the same
    model = build(weights=None, weights_backbone=None, box_score_thresh=0.0, rpn_score_thresh=0.0).eval()
    images = [torch.randn(3, 64, 80)]
    before, expected = snapshot(model), model(images)[0]["boxes"]
    assert len(expected)
    grafts = graft(model, site, example_input=images)
    assert torch.equal(model(images)[0]["boxes"], expected)
    open_gates(grafts)
    assert not torch.equal(model(images)[0]["boxes"], expected)
    ungraft(model)
    assert_unchanged(model, before)
