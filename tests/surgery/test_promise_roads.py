"""Promise 4: exactly one run of the block a forward on every road, and the roads compute the same."""

import copy
import warnings

import pytest
import timm
import torch
from hosts import HOSTS, WIDE_HOSTS, assert_same, count_calls, open_gates
from timm.models._features import FeatureListNet
from timm.utils import ModelEmaV3
from torch import fx
from torchvision.models.feature_extraction import create_feature_extractor

from sagan_attn import graft, grafts_of, is_grafted

TIMM = ["timm-resnet18", "convnext", "efficientnet", "regnet"]
SLOW_TIMM = [pytest.param(name, marks=pytest.mark.slow) for name in ("swin", "mobilenetv3", "davit", "poolformerv2")]
ANY = {**HOSTS, **WIDE_HOSTS}


def grafted(name: str):
    """A host with open grafts, its images, its output and a count of calls for each graft."""
    host = ANY[name]
    model, images = host.build(), host.images()
    grafts = graft(model, list(host.sites), example_input=images[:1])
    open_gates(grafts)
    expected = model(images)
    return model, images, expected, [count_calls(g.block) for g in grafts]


def lengths(calls: list[list[int]]) -> list[int]:
    found = [len(c) for c in calls]
    for c in calls:
        c.clear()
    return found


@pytest.mark.parametrize("name", [*HOSTS, *(pytest.param(n, marks=pytest.mark.slow) for n in WIDE_HOSTS)])
def test_plain_forward(name: str):
    model, images, expected, calls = grafted(name)
    assert_same(model(images), expected)
    assert lengths(calls) == [1] * len(calls)


@pytest.mark.parametrize("name", [*TIMM, *SLOW_TIMM])
def test_gradient_checkpointing(name: str):
    model, images, _, calls = grafted(name)
    for module in model.modules():  # so that a recomputed forward sees the same numbers
        if isinstance(module, torch.nn.Dropout) or "DropPath" in type(module).__name__:
            module.p = module.drop_prob = 0.0
    plain = copy.deepcopy(model).train()
    plain(images).sum().backward()
    lengths(calls)
    model.train()
    model.set_grad_checkpointing(True)
    output = model(images)
    assert lengths(calls) == [1] * len(calls)
    output.sum().backward()
    assert set(lengths(calls)) <= {0, 1}  # 1 where the stage is recomputed
    gammas = grafts_of(plain).gammas()
    for key, gamma in grafts_of(model).gammas().items():
        assert gamma.grad.abs() > 0
        torch.testing.assert_close(gamma.grad, gammas[key].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*TIMM, *SLOW_TIMM])
def test_forward_intermediates(name: str):
    model, images, expected, calls = grafted(name)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
    assert lengths(calls) == [1] * len(calls)
    assert_same(model.forward_head(final), expected)
    assert len(maps) > 2


@pytest.mark.parametrize("name", ["timm-resnet18", "regnet"])
def test_feature_extractor_made_of_a_grafted_model(name: str):
    model, images, _, calls = grafted(name)
    _, expected = model.forward_intermediates(images)
    lengths(calls)
    maps = FeatureListNet(model, out_indices=(1, 2, 3), flatten_sequential=False)(images)
    assert lengths(calls) == [1] * len(calls)
    assert_same(maps, expected[1:4])


@pytest.mark.parametrize(
    ("name", "site"), [("resnet18", "layer3"), ("convnext_atto", "stages_2"), ("regnetx_002", "s3")]
)
def test_graft_into_a_features_only_model(name: str, site: str):
    images = HOSTS["regnet"].images()
    model = timm.create_model(name, features_only=True).eval()
    expected = model(images)
    grafts = graft(model, site, example_input=images)
    calls = count_calls(grafts[0].block)
    assert_same(model(images), expected)
    assert len(calls) == 1
    open_gates(grafts)
    assert [torch.equal(a, b) for a, b in zip(model(images), expected, strict=True)][-2:] == [False, False]


@pytest.mark.parametrize("name", ["tiny", "tv-resnet18", "regnet", "convnext"])
def test_symbolic_trace(name: str):
    model, images, expected, calls = grafted(name)
    traced = fx.symbolic_trace(model)
    assert_same(traced(images), expected)
    other = ANY[name].images(3)  # no size is frozen in
    assert_same(traced(other), model(other))
    attends = [node for node in traced.graph.nodes if getattr(node.target, "__name__", "") == "attend"]
    assert len(attends) == len(calls)


def test_torchvision_feature_extractor():
    model, images, _, calls = grafted("tv-resnet18")
    seen = {}
    for name in ("layer2", "layer3"):
        getattr(model, name).register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out))
    model(images)
    plain = dict(seen)  # tracing calls the hooks as well
    extractor = create_feature_extractor(model, ["layer2", "layer3"])
    maps = extractor(images)
    assert set(maps) == set(plain)
    for name, map_ in plain.items():
        assert_same(maps[name], map_)
    attends = [node for node in extractor.graph.nodes if getattr(node.target, "__name__", "") == "attend"]
    assert len(attends) == len(calls)


def test_functional_call():
    model, images, expected, calls = grafted("tiny")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    lengths(calls)
    assert_same(torch.func.functional_call(model, state, (images,)), expected)
    assert lengths(calls) == [1, 1]
    for key in grafts_of(model).gammas():
        state[key] = torch.zeros(1)
    with grafts_of(model).disabled():
        original = model(images)
    assert_same(torch.func.functional_call(model, state, (images,)), original)


def test_moving_average_of_the_weights():
    model, images, expected, _ = grafted("tiny")
    ema = ModelEmaV3(model, decay=0.5)
    open_gates(grafts_of(model), 0.1)
    ema.update(model)
    assert {round(g.item(), 5) for g in grafts_of(ema.module).gammas().values()} == {0.4}
    assert is_grafted(ema.module)
    assert not torch.equal(ema.module(images), expected)


def test_data_parallel_without_devices():
    model, images, expected, calls = grafted("tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no CUDA: DataParallel then calls the module itself
        wrapped = torch.nn.DataParallel(model)
    lengths(calls)
    if not wrapped.device_ids:
        assert_same(wrapped(images), expected)
        assert lengths(calls) == [1, 1]
    assert len(grafts_of(wrapped)) == 2
