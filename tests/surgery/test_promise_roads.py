"""Promise 4: exactly one run of the block a forward on every road, and the roads compute the same."""

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from hosts import ANY_HOST, HOSTS, WIDE_HOSTS, assert_same, count_calls, open_gates
from roads import FOUR, TIMM_FOUR, grafted, mostly_slow
from timm.models._features import FeatureGetterNet, FeatureListNet
from timm.utils import ModelEmaV3
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

from sagan_attn import graft, grafts_of, is_grafted

TIMM = mostly_slow((*TIMM_FOUR, "regnet", "swin", "mobilenetv3", "davit", "poolformerv2"), *TIMM_FOUR)


def attends(traced: fx.GraphModule) -> int:
    return sum(getattr(node.target, "__name__", "") == "attend" for node in traced.graph.nodes)


@pytest.mark.parametrize("name", mostly_slow((*HOSTS, *WIDE_HOSTS), *HOSTS, "mambaout"))
def test_plain_forward(name: str):
    host = grafted(name)
    assert not torch.equal(host.output, host.original)
    assert_same(host.model(host.images), host.output)
    assert host.runs() == host.once


@pytest.mark.parametrize("name", TIMM)
def test_gradient_checkpointing(name: str):
    host = grafted(name)
    model = host.model
    for module in model.modules():  # so that a recomputed forward sees the same numbers
        if isinstance(module, nn.Dropout) or "DropPath" in type(module).__name__:
            module.p = module.drop_prob = 0.0
    plain = copy.deepcopy(model).train()
    plain(host.images).sum().backward()
    host.runs()
    model.train()
    model.set_grad_checkpointing(True)
    output = model(host.images)
    assert host.runs() == host.once
    output.sum().backward()
    assert set(host.runs()) <= {0, 1}  # 1 where the stage is recomputed
    gammas = grafts_of(plain).gammas()
    for key, gamma in grafts_of(model).gammas().items():
        assert gamma.grad.abs() > 0
        torch.testing.assert_close(gamma.grad, gammas[key].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TIMM)
def test_forward_intermediates(name: str):
    host = grafted(name)
    with torch.no_grad():
        final, maps = host.model.forward_intermediates(host.images)
    assert host.runs() == host.once
    assert_same(host.model.forward_head(final), host.output)
    assert len(maps) > 2


@pytest.mark.parametrize("name", mostly_slow(("timm-resnet18", "regnet", "convnext", "mambaout"), "regnet", "mambaout"))
def test_feature_list_made_of_a_grafted_model(name: str):
    host = grafted(name)
    flat = name in ("convnext", "mambaout")  # whose stages lie in one Sequential
    _, expected = host.model.forward_intermediates(host.images, output_fmt="NHWC" if name == "mambaout" else "NCHW")
    host.runs()
    maps = FeatureListNet(host.model, out_indices=(1, 2, 3), flatten_sequential=flat)(host.images)
    assert host.runs() == host.once
    assert_same(maps, expected[1:4])


@pytest.mark.parametrize("name", mostly_slow(TIMM_FOUR, "efficientnet"))
def test_feature_getter_made_of_a_grafted_model(name: str):
    host = grafted(name)
    _, expected = host.model.forward_intermediates(host.images)
    host.runs()
    maps = FeatureGetterNet(host.model, out_indices=(1, 2, 3))(host.images)
    assert host.runs() == host.once
    assert_same(maps, expected[1:4])


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("resnet18", "layer3"),
        ("convnext_atto", "stages_2"),
        ("regnetx_002", "s3"),
        ("efficientnet_b0", "blocks.4"),
        ("mambaout_femto", "stages_2"),
        pytest.param("swin_tiny_patch4_window7_224", "layers_2", marks=pytest.mark.slow),
    ],
)
def test_graft_into_a_features_only_model(name: str, site: str):
    images = HOSTS["regnet"].images()
    fixed: dict[str, Any] = {"img_size": 64, "window_size": 2} if name.startswith("swin") else {}
    model = timm.create_model(name, features_only=True, **fixed).eval()
    expected = model(images)
    grafts = graft(model, site, example_input=images)
    calls = count_calls(grafts[0].block)
    assert_same(model(images), expected)
    assert len(calls) == 1
    open_gates(grafts)
    same = [torch.equal(a, b) for a, b in zip(model(images), expected, strict=True)]
    assert same == [True] * (len(expected) - 2) + [False, False]
    assert len(calls) == 2


@pytest.mark.parametrize("name", mostly_slow(("tiny", *FOUR, "regnet", "swin"), "tiny", *FOUR, "regnet"))
def test_symbolic_trace(name: str):
    host = grafted(name)
    traced = fx.symbolic_trace(host.model)
    assert_same(traced(host.images), host.output)
    other = ANY_HOST[name].images(3)  # no size is frozen in
    assert_same(traced(other), host.model(other))
    assert attends(traced) == len(host.grafts)


@pytest.mark.parametrize("name", mostly_slow((*FOUR, "swin"), "tv-resnet18", "mambaout"))
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # swin drops paths in training
def test_torchvision_feature_extractor(name: str):
    host = grafted(name)
    sites = ANY_HOST[name].sites
    seen: dict[str, Tensor] = {}
    hooks = [
        host.model.get_submodule(site).register_forward_hook(lambda _, args, out, site=site: seen.update({site: out}))
        for site in sites
    ]
    host.model(host.images)
    for hook in hooks:  # tracing would call them as well
        hook.remove()
    extractor = create_feature_extractor(host.model, list(sites))
    maps = extractor(host.images)
    assert set(maps) == set(sites)
    for site, map_ in seen.items():
        assert_same(maps[site], map_)
    assert attends(extractor) == len(host.grafts)


@pytest.mark.parametrize("name", mostly_slow(("tiny", *FOUR, "swin"), "tiny", "convnext", "mambaout"))
def test_functional_call(name: str):
    host = grafted(name)
    model, images = host.model, host.images
    state = {key: value.clone() for key, value in model.state_dict().items()}
    open_gates(host.grafts, 0.1)  # the state given counts, not that in the model
    assert_same(torch.func.functional_call(model, state, (images,)), host.output)
    assert host.runs() == host.once
    for key in host.grafts.gammas():
        state[key] = torch.zeros(1)
    assert_same(torch.func.functional_call(model, state, (images,)), host.original)


@pytest.mark.parametrize("name", mostly_slow(("tiny", *FOUR, "swin"), "tiny", "convnext", "mambaout"))
def test_moving_average_of_the_weights(name: str):
    host = grafted(name)
    ema = ModelEmaV3(host.model, decay=0.5)
    open_gates(host.grafts, 0.1)
    ema.update(host.model)
    assert {round(g.item(), 5) for g in grafts_of(ema.module).gammas().values()} == {0.4}
    assert is_grafted(ema.module)
    with torch.no_grad():  # all other weights have stayed as they were
        for key, gamma in grafts_of(ema.module).gammas().items():
            host.grafts.gammas()[key].copy_(gamma)
    assert_same(ema.module(host.images), host.model(host.images))
    assert not torch.equal(ema.module(host.images), host.output)
    with grafts_of(ema.module).disabled():
        assert_same(ema.module(host.images), host.original)


def test_data_parallel_without_devices():
    host = grafted("tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no CUDA: DataParallel then calls the module itself
        wrapped = nn.DataParallel(host.model)
    if not wrapped.device_ids:
        assert_same(wrapped(host.images), host.output)
        assert host.runs() == host.once
    assert len(grafts_of(wrapped)) == 2
