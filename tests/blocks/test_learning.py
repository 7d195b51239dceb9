"""Every parameter of a fresh block learns, but for those that provably change nothing."""

import pytest
import torch
from block_forms import CASES, CONTROLS, Case, learning, seed
from torch import nn

# Parameters without effect on the output in training, and why.
SOFTMAX = "adds one number to a whole row of scores, which the softmax takes away again"
BATCH_NORM = "adds one number to a whole channel, which the batch norm behind it takes away again in training"
ROWS_OF_1 = f"weights of a row sum to 1, so it is such a number behind the output convolution: {BATCH_NORM}"
EMBEDDED = {"key.bias": SOFTMAX, "value.bias": ROWS_OF_1, "output.bias": BATCH_NORM}
WITHOUT_EFFECT: dict[str, dict[str, str]] = {
    "sagan": {"key.bias": SOFTMAX},
    "sagan 2 heads": {"key.bias": SOFTMAX},
    "sagan pooled": {"key.bias": SOFTMAX},
    "sagan pooled in threes": {"key.bias": SOFTMAX},
    "sagan relative": {"key.bias": SOFTMAX},
    "sagan sinusoidal": {"key.bias": SOFTMAX},
    "sagan chunked": {"key.bias": SOFTMAX},
    "nonlocal": EMBEDDED,
    "nonlocal-caffe2": EMBEDDED,
    "nonlocal-alexhex7": EMBEDDED,
    "nonlocal-timm": EMBEDDED,
    "nonlocal chunked": EMBEDDED,
    "nonlocal-mmcv": {"key.bias": SOFTMAX},
    "nonlocal without norm": {"key.bias": SOFTMAX},
    "nonlocal gaussian": {"value.bias": ROWS_OF_1, "output.bias": BATCH_NORM},
    "nonlocal gaussian pooled": {"value.bias": ROWS_OF_1, "output.bias": BATCH_NORM},
    "nonlocal dot product": {"output.bias": BATCH_NORM},
    "nonlocal dot product materialised": {"output.bias": BATCH_NORM},
    "nonlocal concatenation": {"output.bias": BATCH_NORM},
    "nonlocal concatenation pooled": {"output.bias": BATCH_NORM},
    "multihead bias": {"key.bias": SOFTMAX},
    "cross bias": {"key.bias": SOFTMAX},
    "encoder": {"attention.key.bias": SOFTMAX},
    "encoder relative": {"attention.key.bias": SOFTMAX},
    "encoder norm last": {"attention.key.bias": SOFTMAX},
    "encoder dropout": {"attention.key.bias": SOFTMAX},
    "encoder chunked": {"attention.key.bias": SOFTMAX},
    "decoder": {"attention.key.bias": SOFTMAX, "cross.key.bias": SOFTMAX},
    "gc": {"score.bias": SOFTMAX},
    "decoder sinusoidal": {"attention.key.bias": SOFTMAX, "cross.key.bias": SOFTMAX},
    "decoder norm last": {"attention.key.bias": SOFTMAX, "cross.key.bias": SOFTMAX},
}

# Parameters that get a gradient other than 0 on the first step of a fresh block, by the ends of their names.
FIRST = {
    "sagan": ("gamma",),
    "nonlocal": ("norm.weight", "norm.bias"),
    "multihead": ("output.weight", "output.bias"),
    "encoder": ("output.weight", "output.bias", "linear2.weight", "linear2.bias"),
}
FIRST |= dict.fromkeys(("sagan-paper", "biggan", "fastai", "botnet", *CONTROLS), FIRST["sagan"])
FIRST |= dict.fromkeys(("nonlocal-caffe2", "nonlocal-alexhex7", "nonlocal-timm"), FIRST["nonlocal"])
FIRST |= dict.fromkeys(("additive", "cross", "nonlocal-mmcv"), FIRST["multihead"])
FIRST |= {"decoder": FIRST["encoder"]}

# Parameters of which some numbers may rest, because what they multiply is cut off for all of the few maps.
POOLED = ("squeeze.weight", "squeeze.bias", "norm.weight", "norm.bias", "expand.weight")  # one value a channel and map
SOME_MOVE = {"context-max": ("expand.weight",), "se": POOLED, "gc": POOLED}


def first_parameters(case: Case) -> tuple[str, ...]:
    if case.options.get("norm") is False:
        return FIRST["multihead"]
    if not case.identity:  # what is added is 0, but the norms behind it are open
        return *FIRST[case.name], *(f"norm{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias"))
    return FIRST[case.name]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 8, 4, 5, dtype=torch.float64), torch.randn(4, 8, 4, 5, dtype=torch.float64)


def loss_of(block: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (block(x) - target).square().sum()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_first_step_the_ends_of_the_branch_move_and_nothing_else(case: Case):
    block, (x, target) = case.fresh().double().train(), data()
    loss_of(block, x, target).backward()
    for name, parameter in learning(block).items():
        largest = parameter.grad.abs().max()
        if name.endswith(first_parameters(case)):
            assert largest > 1e-6, name
        else:
            assert largest == 0, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_learns(case: Case):
    block, (x, target) = case.fresh().double().train(), data()
    before = {name: parameter.detach().clone() for name, parameter in learning(block).items()}
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(block, x, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0]
    for name, parameter in learning(block).items():
        moved = (parameter.detach() - before[name]).abs()
        if name in WITHOUT_EFFECT.get(case.id, {}):
            assert moved.max() < 1e-5, name  # rounding, which Adam makes much of
        elif name.endswith("_rel"):  # maps smaller than the table leave some offsets out
            assert moved.amax(dim=0).min() > 1e-5, name
        elif name in SOME_MOVE.get(case.name, ()):
            assert moved.max() > 1e-5, name
        else:
            assert moved.min() > 1e-5, name


@pytest.mark.parametrize("case", [case for case in CASES if WITHOUT_EFFECT.get(case.id)], ids=str)
def test_parameters_without_effect_have_none(case: Case):
    for name, reason in WITHOUT_EFFECT[case.id].items():
        modes = (True, False) if reason == SOFTMAX else (True,)
        for training in modes:
            block, (x, target) = case.opened().double().train(training), data()
            parameter = block.get_parameter(name)
            loss_of(block, x, target).backward()
            assert parameter.grad.abs().max() < 1e-10, name
            step = torch.randn_like(parameter)
            seed(1)  # for dropout
            before = block(x).detach()
            with torch.no_grad():
                parameter += step
            seed(1)
            torch.testing.assert_close(block(x), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_other_parameters_have_an_effect(case: Case):
    if case.options.get("dropout"):
        pytest.skip("outputs of training are random")
    x, _ = data()
    before = case.opened().double().train()(x).detach()
    for name, parameter in learning(block := case.opened().double()).items():
        if name in WITHOUT_EFFECT.get(case.id, {}):
            continue
        block.load_state_dict(case.opened().double().state_dict())
        with torch.no_grad():
            parameter += 0.5 * torch.randn_like(parameter)
        assert (block.train()(x) - before).abs().max() > 1e-4, name


def test_the_table_names_cases_and_parameters_that_exist():
    assert set(WITHOUT_EFFECT) <= {case.id for case in CASES}
    for case in CASES:
        parameters = dict(case.fresh().named_parameters())
        assert set(WITHOUT_EFFECT.get(case.id, {})) <= set(parameters)


def test_value_and_output_biases_before_a_batch_norm_act_in_evaluation():
    """The running statistics do not follow them there."""
    for case in CASES:
        for name, reason in WITHOUT_EFFECT.get(case.id, {}).items():
            if reason == SOFTMAX:
                continue
            block, (x, _) = case.opened().double(), data()
            before = block(x).detach()
            with torch.no_grad():
                block.get_parameter(name).add_(1)
            assert (block(x) - before).abs().max() > 1e-3, (case.id, name)
