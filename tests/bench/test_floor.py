"""FLOPs against torch's own counts, and the ceilings."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sagan_attn.bench.floor import Case, Ceilings, attention_flops, measure_ceilings
from sagan_attn.bench.peers import Plain

CPU = torch.device("cpu")


def test_attention_as_torch_counts_it():
    b, h, n, m, d = 2, 3, 10, 14, 8
    query, key = (b, h, n, d), (b, h, m, d)
    assert b * h * attention_flops(n, m, d, d, backward=False) == sdpa_flop_count(query, key, key)
    assert b * h * attention_flops(n, m, d, d, backward=True) == sdpa_backward_flop_count(query, query, key, key)


@pytest.mark.parametrize("backward", [False, True])
def test_block_as_torch_counts_it(backward: bool):
    case = Case(2, 32, 3, 5, "fp32", backward)
    x = torch.randn(2, 32, 3, 5, requires_grad=backward)
    with FlopCounterMode(display=False) as count, torch.set_grad_enabled(backward):
        out = Plain(32)(x)
        if backward:
            out.backward(torch.randn_like(out))
    # The plain block keeps its scores, which the formula has made once more: 2 N M d for each sample.
    kept = 2 * 2 * 15 * 15 * 4 if backward else 0
    assert case.flops() == count.get_total_flops() + kept


def test_bytes():
    n, c, d = 15, 32, 4
    once = 2 * n * (c + d + d + c + c) + c * (d + d + c)
    assert Case(2, 32, 3, 5, "fp32", False).compulsory_bytes() == 4 * once
    assert Case(2, 32, 3, 5, "bf16", True).compulsory_bytes() == 2 * 3 * once
    assert Case(2, 32, 3, 5, "bf16", True).weight_bytes(heads=4) == 2 * 2 * 4 * 15 * 15


def test_ceilings_are_positive_and_make_a_floor():
    found = measure_ceilings(["fp32"], CPU, seconds=0.02)
    assert all(0 < rate < math.inf for rate in (found.flops["fp32"], found.bandwidth))
    case = Case(2, 32, 3, 5, "fp32", True)
    assert found.floor(case) > 0
    assert Ceilings({"fp32": 1e3}, 1e12).floor(case) == case.flops() / 1e3
    assert Ceilings({"fp32": 1e12}, 1e3).floor(case) == case.compulsory_bytes() / 1e3


def test_the_better_of_two_measurements():
    best = Ceilings({"fp32": 1.0, "bf16": 4.0}, 5.0).best(Ceilings({"fp32": 2.0, "bf16": 3.0}, 1.0))
    assert best == Ceilings({"fp32": 2.0, "bf16": 4.0}, 5.0)
