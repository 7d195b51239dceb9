"""Spectral normalisation against torch.nn.utils.parametrizations.spectral_norm."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from sagan_attn import SelfAttention2d
from sagan_attn.blocks.pointwise import SpectralPointwise


def pair(out: int = 6, bias: bool = True) -> tuple[SpectralPointwise, nn.Conv2d]:
    """Ours and torch's, with the same weights and singular vectors."""
    ours = SpectralPointwise(8, out, bias)
    conv = nn.Conv2d(8, out, 1, bias=bias)
    theirs = spectral_norm(conv)
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(ours.weight)
        theirs.parametrizations.weight[0]._u.copy_(ours.weight_u)
        theirs.parametrizations.weight[0]._v.copy_(ours.weight_v)
        if bias:
            theirs.bias.copy_(ours.bias)
    return ours, theirs


@pytest.mark.parametrize("out", [1, 6])
def test_several_training_steps_are_the_same(out: int):
    ours, theirs = pair(out)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, theirs)]
    norm = theirs.parametrizations.weight
    for _ in range(5):
        x = torch.randn(2, 8, 5, 3)
        outputs = []
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(module(x))
            outputs[-1].square().mean().backward()
        torch.testing.assert_close(outputs[0], outputs[1])
        torch.testing.assert_close(ours.weight.grad, norm.original.grad)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours.weight_u, norm[0]._u)
        torch.testing.assert_close(ours.weight_v, norm[0]._v)
    u = ours.weight_u.clone()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(ours.weight_u, u)


def test_two_forwards_before_a_backward():
    ours, theirs = pair()
    x = torch.randn(2, 8, 4, 4)
    for module in (ours, theirs):
        (module(x).sum() * module(2 * x).square().sum()).backward()
    torch.testing.assert_close(ours.weight.grad, theirs.parametrizations.weight.original.grad)


def test_the_estimate_becomes_the_largest_singular_value():
    ours, _ = pair()
    for _ in range(100):
        ours(torch.randn(1, 8, 1, 1))
    expected = ours.weight / torch.linalg.matrix_norm(ours.weight[:, :, 0, 0], ord=2)
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(ours.eval()(x), nn.functional.conv2d(x, expected, ours.bias))
    assert torch.linalg.vector_norm(ours.weight_u).item() == pytest.approx(1)


def test_under_autocast_the_norm_is_computed_in_float32():
    ours, _ = pair()
    x = torch.randn(2, 8, 4, 4)
    plain = copy.deepcopy(ours)
    plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(ours.weight_u, plain.weight_u)
    assert torch.equal(ours.weight_v, plain.weight_v)
    torch.testing.assert_close(output.float(), plain.eval()(x), rtol=0.02, atol=0.02)
    output.float().sum().backward()
    assert ours.weight.grad.dtype == torch.float32
    assert ours.weight.grad.isfinite().all()


def test_a_block_with_spectral_norm():
    block = SelfAttention2d(16, spectral_norm=True, value_reduction=2, bias=False, pool=2, gamma_init=0.5).eval()
    plain = SelfAttention2d(16, value_reduction=2, bias=False, pool=2, gamma_init=0.5).eval()
    for name in ("query", "key", "value", "output"):
        conv = block.get_submodule(name)
        weight = conv.weight[:, :, 0, 0]
        sigma = conv.weight_u @ weight @ conv.weight_v
        assert sigma.item() == pytest.approx(torch.linalg.matrix_norm(weight, ord=2).item(), rel=0.1)
        with torch.no_grad():
            plain.get_parameter(f"{name}.weight").copy_(conv.weight / sigma)
    x = torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(block(x), plain(x))
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), block(x))
    assert [key for key in block.state_dict() if key.startswith("query")] == [
        "query.weight",
        "query.weight_u",
        "query.weight_v",
    ]
