"""Parameter groups and schedules against numbers worked out by hand."""

import copy
import math

import pytest
import timm
import torch
import torchvision
from torch import nn

from sagan_attn import graft
from sagan_attn.errors import ConfigError
from sagan_attn.training.hosts import HostConfig, build_host
from sagan_attn.training.network import GraftConfig, build_network
from sagan_attn.training.optim import (
    OptimizerConfig,
    ScheduleConfig,
    clip_by_norm,
    create_optimizer,
    create_schedule,
    parameter_groups,
)


@pytest.fixture
def model():
    model = build_host(HostConfig("resnet20"), num_classes=10)
    graft(model, "layer2", example_input=torch.zeros(1, 3, 32, 32))
    return model


def test_groups_have_their_rates_and_decays(model):
    config = OptimizerConfig(
        lr=0.1, weight_decay=0.01, host_lr_scale=0.5, head_lr_scale=2.0, graft_lr_scale=3.0, gamma_lr_scale=7.0
    )
    groups = {group["name"]: group for group in parameter_groups(model, config)}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {
        "grafts": (pytest.approx(0.3), 0.01),
        "grafts/no_decay": (pytest.approx(0.3), 0.0),
        "grafts/gamma": (pytest.approx(2.1), 0.0),
        "host": (pytest.approx(0.05), 0.01),
        "host/no_decay": (pytest.approx(0.05), 0.0),
        "head": (pytest.approx(0.2), 0.01),
        "head/no_decay": (pytest.approx(0.2), 0.0),
    }
    members = [p for group in groups.values() for p in group["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    assert groups["head"]["params"] == [model.fc.weight]
    assert [p.numel() for p in groups["grafts/gamma"]["params"]] == [1]


@pytest.mark.parametrize(
    ("make", "site", "sibling"),
    [
        (lambda: timm.create_model("resnet18"), "layer2", "layer2.1.conv2.weight"),
        (lambda: timm.create_model("convnext_atto"), "stages.2.blocks.3", "stages.2.blocks.3.conv_dw.weight"),
        (lambda: torchvision.models.resnet18(), "layer2", "layer2.1.conv2.weight"),
    ],
)
def test_layer_decay_counts_a_graft_as_part_of_its_sites_layer(make, site, sibling):
    model = make()
    grafts = graft(model, site, example_input=torch.zeros(1, 3, 64, 64))
    groups = parameter_groups(model, OptimizerConfig(lr=1.0, layer_decay=0.7))
    rate = {p: group["lr"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert rate[grafts[0].block.query.weight] == pytest.approx(rate[named[sibling]])
    assert rate[grafts[0].block.gamma] == pytest.approx(10 * rate[named[sibling]])
    first, last = next(iter(named.values())), list(named.values())[-1]
    assert rate[last] == pytest.approx(1.0)
    assert rate[first] == min(rate.values()) < rate[grafts[0].block.query.weight] < 1.0


def test_frozen_parameters_are_left_out(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        parameter_groups(model, OptimizerConfig())


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_timm_makes_the_optimizer(model, name):
    optimizer = create_optimizer(model, OptimizerConfig(name=name, lr=0.2))
    assert {group["lr"] for group in optimizer.param_groups} == {0.2, 2.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(name="adamx"), "optimizer 'adamx'"),
        (OptimizerConfig(options={"beta": 1}), "beta"),
        (OptimizerConfig(lr=-1.0), r"optimizer.lr \(-1.0\) must be"),
        (OptimizerConfig(gamma_lr_scale=math.nan), r"optimizer.gamma_lr_scale \(nan\) must be"),
        (OptimizerConfig(layer_decay=0.0), r"layer_decay \(0.0\) must lie"),
    ],
)
def test_refusals(model, config, message):
    with pytest.raises(ConfigError, match=message):
        create_optimizer(model, config)


def test_cosine_rises_in_a_line_and_falls_along_a_cosine():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 10.0)])
    schedule = create_schedule(optimizer, ScheduleConfig("cosine", warmup_epochs=2), epochs=10, steps=100)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(1, 101):
        schedule.step_update(num_updates=step)
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(10 * rates[-1])
    expected = [s / 20 if s < 20 else 0.5 * (1 + math.cos(math.pi * (s - 20) / 80)) for s in range(101)]
    assert rates == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("warmup", [0, 3])
def test_onecycle_peaks_after_the_warm_up_and_ends_near_0(warmup):
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}], momentum=0.9)
    schedule = create_schedule(optimizer, ScheduleConfig("onecycle", warmup_epochs=warmup), epochs=10, steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == pytest.approx(10 * warmup, abs=1)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize("warmup", [0, 2])
def test_linear_rises_and_falls_in_lines(warmup):
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 10.0)])
    schedule = create_schedule(optimizer, ScheduleConfig("linear", warmup_epochs=warmup), epochs=10, steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(10 * rates[-1])
        optimizer.step()
        schedule.step()
    rise = max(10 * warmup, 1)
    expected = [(s + 1) / rise if s < 10 * warmup else (100 - s) / (100 - 10 * warmup) for s in range(100)]
    assert rates == pytest.approx(expected)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.02
    assert optimizer.param_groups[0]["lr"] == 0


def test_a_warm_up_as_long_as_training_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match=r"warmup_epochs \(5\) must lie in \[0, 5\)"):
        create_schedule(optimizer, ScheduleConfig(warmup_epochs=5), epochs=5, steps=10)


def test_clipping_is_torchs_and_the_hosts_norm_is_its_own():
    torch.manual_seed(0)
    model = build_network(HostConfig("lookup-cnn"), [GraftConfig("local")], 10, 3, 48)
    model(torch.rand(4, 3, 48, 48)).square().sum().backward()
    expected = copy.deepcopy([p.grad for p in model.parameters()])
    plain = [nn.Parameter(torch.zeros(gradient.shape)) for gradient in expected]
    for parameter, gradient in zip(plain, expected, strict=True):
        parameter.grad = gradient
    whole = nn.utils.clip_grad_norm_(plain, 0.5)
    assert whole > 0.5
    clip_by_norm(create_optimizer(model, OptimizerConfig()), 0.5)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=0)
    before = [p.grad.clone() for p in model.parameters()]
    clip_by_norm(create_optimizer(model, OptimizerConfig()), 10.0)  # below the limit
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), before, strict=True))
