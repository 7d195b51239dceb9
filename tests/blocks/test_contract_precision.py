"""What every form promises about half precision and autocast."""

import copy

import pytest
import torch
from block_forms import ATTENDING, Case, cores, learning, swept
from gated_forms import CONTRACT

from sagan_attn.blocks.pointwise import SpectralPointwise

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("case", swept(CONTRACT))
def test_half_precision_is_near_float64(case: Case, dtype: torch.dtype):
    x = torch.randn(2, 8, 5, 6)
    expected = case.opened().double()(x.double())
    output = case.opened().to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(case.opened()(x).double(), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype):
        mixed = case.opened()(x)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("case", swept(CONTRACT))
def test_training_under_autocast_gives_finite_gradients_of_the_parameters_dtype(case: Case, dtype: torch.dtype):
    block = case.opened().train()
    x = torch.randn(2, 8, 3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype):
        block(x).square().mean().backward()
    for tensor in (x, *learning(block).values()):
        assert tensor.grad.dtype == torch.float32
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("case", swept(ATTENDING))
def test_scores_over_65504_stay_finite_in_float16(case: Case):
    block = case.opened().half()
    x = torch.randn(1, 8, 3, 3).sign().half()
    with torch.no_grad():
        for core in cores(block):
            if isinstance(core.query, SpectralPointwise) or core.query is None:
                x = 400 * x  # weights are normalised, or there are none
            elif core.score != "additive":
                core.query.weight.normal_().mul_(300)
                core.key.weight.copy_(core.query.weight)
            if core.score_vector is not None:
                core.score_vector.fill_(60000 if core.score == "additive" else 300)
            for parameter in core.value.parameters():
                parameter.mul_(1e-3)  # means of scores times values belong to the output: they must be in its range
    for core in cores(block):
        query, key = (rows.double() for rows in core.query_and_key(x, x))
        if core.score == "dot":
            assert (query * core.scale @ key.transpose(2, 3)).abs().max() > 65504
    assert copy.deepcopy(block).double()(x.double()).abs().max() < 65504
    assert block(x).isfinite().all()
