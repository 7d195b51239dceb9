"""Converted state dicts on maps: the numbers of blocks written from their published formulas, and of timm's classes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversion_checks import assert_round_trip, assert_same, loaded, randomized
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.non_local_attn import NonLocalAttn
from torch import Tensor, nn

from sagan_attn.blocks import create_block
from sagan_attn.blocks.converters import convert, convert_back


def identity(module: nn.Module) -> nn.Module:
    return module


class BigganConv(nn.Conv2d):
    """A convolution over its largest singular value, estimated by one step of power iteration from a row u0."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("u0", torch.randn(1, self.out_channels))
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, input: Tensor) -> Tensor:
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(self.u0 @ matrix)
            u = F.normalize(v @ matrix.T)
        return F.conv2d(input, self.weight / (v @ matrix.T @ u.T).squeeze())


conv1x1 = partial(nn.Conv2d, kernel_size=1)


class Gated(nn.Module):
    """gamma * attention + x, the convolutions under names of one's own; the softmax over keys, or over queries."""

    def __init__(
        self,
        names: list[str],
        sizes: list[tuple[int, int]],
        wrap: Callable[[nn.Module], nn.Module] = identity,
        conv: Callable[..., nn.Module] = conv1x1,
        pool: int = 1,
        over: str = "keys",
        gamma: tuple[int, ...] = (1,),
    ) -> None:
        super().__init__()
        self.names, self.pool, self.over = names, pool, over
        for name, (columns, rows) in zip(names, sizes, strict=True):
            self.add_module(name, wrap(conv(columns, rows)))
        self.gamma = nn.Parameter(torch.zeros(gamma))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, *output = (self.get_submodule(name) for name in self.names)
        maps = query(x), key(x), value(x)
        if self.pool > 1:
            maps = maps[0], *(F.max_pool2d(features, self.pool) for features in maps[1:])
        q, k, v = (features.flatten(2) for features in maps)
        scores = torch.einsum("bdi,bdj->bij", q, k)  # [B, query, key]
        if self.over == "keys":
            result = torch.einsum("bij,bdj->bdi", scores.softmax(2), v)
        else:  # of the projection called query, and the sum as well
            result = torch.einsum("bij,bdi->bdj", scores.softmax(1), v)
        result = result.unflatten(2, x.shape[2:]) if x.dim() > 3 else result
        return self.gamma * (output[0](result) if output else result) + x


hook = nn.utils.spectral_norm
parametrized = nn.utils.parametrizations.spectral_norm
WRAPS = pytest.mark.parametrize("wrap", [identity, hook, parametrized])
SAGAN = [(16, 2), (16, 2), (16, 16)]
THETA = ["theta", "phi", "g", "o"]
BIGGAN = [(16, 2), (16, 2), (16, 8), (8, 16)]


@WRAPS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("source", "suffix"), [("sagan", ""), ("sagan-conv", "_conv")])
def test_sagan(source: str, suffix: str, wrap: Callable, bias: bool):
    names = [name + suffix for name in ("query", "key", "value")]
    theirs = Gated(names, SAGAN, wrap, partial(conv1x1, bias=bias))
    if wrap is hook:  # a forward makes its weight one of the module
        theirs(torch.randn(1, 16, 2, 2))
    theirs = randomized(theirs).eval()
    block = loaded("sagan", theirs, bias=bias, spectral_norm=wrap is not identity)
    assert_same(block, theirs, torch.randn(2, 16, 3, 4).double())
    assert_round_trip(source, theirs.state_dict(), like=wrap is hook)
    if wrap is parametrized:  # its power iteration is ours
        x = torch.randn(2, 16, 3, 4).double()
        for _ in range(3):
            assert_same(block.train(), theirs.train(), x)
        for key, tensor in convert(theirs.state_dict()).items():
            torch.testing.assert_close(block.state_dict()[key], tensor)


@pytest.mark.parametrize(
    ("wrap", "conv"), [(identity, nn.Conv2d), (hook, nn.Conv2d), (parametrized, nn.Conv2d), (identity, BigganConv)]
)
def test_biggan(wrap: Callable, conv: type[nn.Conv2d]):
    own = conv is BigganConv
    theirs = Gated(THETA, BIGGAN, wrap, partial(conv, kernel_size=1, bias=False), pool=2, gamma=())
    theirs = randomized(theirs).eval()
    block = loaded("biggan", theirs, spectral_norm=own or wrap is not identity)
    assert_same(block, theirs, torch.randn(2, 16, 4, 6).double())
    if not own:
        assert_round_trip("biggan", theirs.state_dict(), like=wrap is not identity)


def test_biggan_vectors_that_have_converged():
    block = randomized(create_block("biggan", 16)).eval()
    for conv in (block.query, block.key, block.value, block.output):
        conv.iterate(1000)
    theirs = Gated(THETA, BIGGAN, conv=partial(BigganConv, kernel_size=1, bias=False), pool=2, gamma=()).double()
    theirs.load_state_dict(convert_back(block.state_dict(), "biggan"))
    for ours, name in (("query", "theta"), ("output", "o")):
        sigma = torch.linalg.matrix_norm(block.get_submodule(ours).weight.flatten(1), 2).reshape(1)
        torch.testing.assert_close(theirs.get_submodule(name).sv0, sigma)
        assert torch.equal(theirs.get_submodule(name).u0[0], block.get_submodule(ours).weight_u)
    assert_same(block, theirs, torch.randn(2, 16, 4, 4).double())


@WRAPS
@pytest.mark.parametrize("version", [1, 2])
def test_fastai(version: int, wrap: Callable):
    def wrapped(conv: nn.Module) -> nn.Module:
        return wrap(conv) if version == 1 else nn.Sequential(wrap(conv))

    theirs = Gated(
        ["query", "key", "value"], SAGAN, wrapped, partial(nn.Conv1d, kernel_size=1, bias=False), over="queries"
    )
    theirs = randomized(theirs).eval()
    block = loaded("fastai", theirs, source="fastai", spectral_norm=wrap is not identity)
    x = torch.randn(2, 16, 3, 4).double()
    assert_same(block, lambda x: theirs(x.flatten(2)).view_as(x), x)
    assert_round_trip("fastai", theirs.state_dict(), like=True)
    if wrap is not identity or version == 2:
        assert convert(theirs.state_dict()).keys() == block.state_dict().keys()
    if wrap is hook and version == 2:
        assert_round_trip("fastai", theirs.state_dict())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gamma_and_matrices(dims: int):
    """Linear and Conv1d forms of the plain names with a gamma of no dimension."""
    conv = [nn.Linear, partial(nn.Conv1d, kernel_size=1), conv1x1][dims - 1]
    theirs = randomized(Gated(["query", "key", "value"], SAGAN, conv=conv, gamma=()))
    ours = convert(theirs.state_dict())
    assert ours["query.weight"].shape == (2, 16, 1, 1)
    assert ours["gamma"].shape == (1,)
    create_block("sagan", 16).load_state_dict(ours)
    assert_round_trip("sagan", theirs.state_dict(), like=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_timm_bottleneck(scaled: bool, bias: bool, ratio: float):
    theirs = BottleneckAttn(16, feat_size=(3, 5), qkv_bias=bias, scale_pos_embed=scaled, qk_ratio=ratio, num_heads=2)
    theirs = randomized(theirs)
    options = {"heads": 2, "bias": bias, "position_size": (3, 5), "reduction": round(1 / ratio)}
    block = loaded("botnet", theirs, **options, position="relative_scaled" if scaled else "relative")
    assert block.gamma.item() == 1
    x = torch.randn(2, 16, 3, 5).double()
    assert_same(lambda x: block(x) - x, theirs, x)
    assert_round_trip("timm-bottleneck", theirs.state_dict())
    with torch.no_grad():
        block.gamma.fill_(-0.7)
    theirs.load_state_dict(convert_back(block.state_dict(), "timm-bottleneck"))
    assert_same(lambda x: block(x) - x, theirs, x)


@pytest.mark.parametrize("training", [False, True])
def test_timm_nonlocal(training: bool):
    theirs = randomized(NonLocalAttn(32)).train(training)
    block = loaded("nonlocal-timm", theirs, 32)
    assert_same(block, theirs, torch.randn(2, 32, 3, 4).double())
    torch.testing.assert_close(block.state_dict(), convert(theirs.state_dict()))
    assert_round_trip("timm-nonlocal", theirs.state_dict())
