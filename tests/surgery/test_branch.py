"""How much grafts add, against norms taken by hand."""

import copy
import math

import pytest
import torch
from hosts import HOSTS, assert_unchanged, open_gates, rng_states, snapshot
from torch import Tensor, nn

from sagan_attn import graft, grafts_of
from sagan_attn.errors import GraftError
from sagan_attn.surgery import branch_share

HOST = HOSTS["tiny"]


def batches(*sizes: int) -> list[tuple[Tensor, None]]:
    return [(HOST.images(size), None) for size in sizes]


def opened(at, **options) -> nn.Module:
    model = HOST.build()
    open_gates(graft(model, at, example_input=HOST.images(1), **options))
    return model


def test_the_mean_over_images():
    model = opened({"stage": "sagan", "top": "conv", "down": {"block": "biggan", "gamma_init": 0.0}})
    expected: dict[str, list[float]] = {one.path: [] for one in grafts_of(model)}
    reference = copy.deepcopy(model)
    for one in grafts_of(reference):

        def note(block, args, output, path=one.path):
            for x, y in zip(args[0].double(), output.double(), strict=True):
                expected[path].append(((y - x).square().sum().sqrt() / x.square().sum().sqrt()).item())

        one.block.register_forward_hook(note)
    images = batches(3, 1, 2)
    for batch, _ in images:
        reference(batch)
    model.train()
    before, states = snapshot(model), rng_states()
    shares = branch_share(model, images)
    assert_unchanged(model, before)
    assert rng_states() == states
    assert list(shares) == list(expected)
    assert len(expected[next(iter(shares))]) == 6
    for path, share in shares.items():
        assert share == pytest.approx(sum(expected[path]) / 6, rel=1e-5)


def test_known_numbers():
    model = nn.Sequential(nn.Identity())
    (one,) = graft(model, "0", "conv", options={"gamma_init": 0.0}, example_input=torch.zeros(1, 2, 3, 3))
    images = torch.ones(2, 2, 3, 3)
    assert branch_share(model, [(images, 0)]) == {one.path: 0.0}
    with torch.no_grad():
        one.block.gamma.fill_(-0.5)
        one.block.squeeze.weight.zero_()[0].fill_(1)
        one.block.expand.weight.zero_()[:, 0].fill_(2)
        for conv in (one.block.squeeze, one.block.expand):
            if conv.bias is not None:
                conv.bias.zero_()
    assert branch_share(model, [(images, 0)])[one.path] == pytest.approx(0.5 * 2 * 2)
    assert branch_share(model, [(0 * images, 0)]) == {one.path: 0.0}
    with torch.no_grad():
        one.block.squeeze.weight.fill_(torch.nan)
    assert math.isnan(branch_share(model, [(images, 0)])[one.path])  # not hidden


@pytest.mark.slow
def test_compiled_models_are_measured_as_they_were_before():
    model, images = opened("top"), batches(2)
    expected = branch_share(model, images)
    compiled = torch.compile(model, backend="eager")
    outputs = compiled(images[0][0])
    assert branch_share(compiled, images) == {f"_orig_mod.{path}": share for path, share in expected.items()}
    model.compile(backend="eager")
    model(images[0][0])
    assert branch_share(model, images) == expected
    assert torch.equal(compiled(images[0][0]), outputs)


def test_refusals():
    with pytest.raises(GraftError, match="Tiny has no grafts"):
        branch_share(HOST.build(), batches(1))
    model = opened("top")
    before = snapshot(model)
    for nothing in ([], iter([])):
        with pytest.raises(GraftError, match="batches is empty"):
            branch_share(model, nothing)
    with grafts_of(model).disabled(), pytest.raises(GraftError, match=r"top.*grafts.sagan did not run: .* disabled"):
        branch_share(model, batches(1))
    with pytest.raises(RuntimeError):
        branch_share(model, [(torch.zeros(1, 5, 8, 8), None)])
    assert_unchanged(model, before)
