"""Converted non-local blocks of AlexHex7 and mmcv, written here from the formulas under their names."""

import itertools

import pytest
import torch
from conversion_checks import assert_round_trip, assert_same, loaded, randomized
from torch import Tensor, nn

from sagan_attn.blocks import create_block
from sagan_attn.blocks.converters import convert, convert_back
from sagan_attn.errors import BlockError

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MODES = ["embedded_gaussian", "gaussian", "dot_product", "concatenation"]


class Theirs(nn.Module):
    """x + W(y) in one of four modes, on maps of one to three dimensions; parts are held by their public names."""

    def __init__(self, mode: str, dims: int, parts: dict[str, nn.Module], score: str, scale: float = 1.0) -> None:
        super().__init__()
        self.mode, self.scale, self.score, self.dims = mode, scale, score, dims
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        value = self.g(x).flatten(2)
        if self.mode == "gaussian":
            query, key = x.flatten(2), (self.pool(x) if hasattr(self, "pool") else x).flatten(2)
        else:
            query, key = self.theta(x).flatten(2), self.phi(x).flatten(2)
        if self.mode == "concatenation":
            count = query.shape[2], key.shape[2]
            pairs = [query[..., None].expand(-1, -1, *count), key[:, :, None].expand(-1, -1, *count)]
            weights = self.get_submodule(self.score)(torch.cat(pairs, 1))[:, 0].relu() / count[1]
        else:
            weights = torch.einsum("bdi,bdj->bij", query, key)
            weights = weights / key.shape[2] if self.mode == "dot_product" else (self.scale * weights).softmax(2)
        y = torch.einsum("bij,bdj->bdi", weights, value).unflatten(2, x.shape[2:])
        return x + (self.W if hasattr(self, "W") else self.conv_out)(y)


class NormedConv(nn.Module):
    """A convolution, under the names of mmcv's module, with a norm and then without bias."""

    def __init__(self, columns: int, rows: int, dims: int = 2, norm: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.conv = CONV[dims](columns, rows, 1, bias=bias and not norm)
        if norm:
            self.bn = NORM[dims](rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if hasattr(self, "bn") else self.conv(x)


def pooling(dims: int) -> nn.Module:
    return {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims](2)


def projections(conv, dims: int, pooled: bool, mode: str) -> dict[str, nn.Module]:
    def pool(part: nn.Module) -> nn.Module:
        return nn.Sequential(part, pooling(dims)) if pooled else part

    parts = {"g": pool(conv(16, 8))}
    if mode == "gaussian":
        return parts | {"pool": pooling(dims)} if pooled else parts
    return parts | {"theta": conv(16, 8), "phi": pool(conv(16, 8))}


def alexhex7(mode: str, pooled: bool, norm: bool, dims: int = 2) -> Theirs:
    def conv(columns: int, rows: int) -> nn.Module:
        return CONV[dims](columns, rows, 1)

    parts = projections(conv, dims, pooled, mode)
    parts["W"] = nn.Sequential(conv(8, 16), NORM[dims](16)) if norm else conv(8, 16)
    if mode == "concatenation":
        parts["concat_project"] = nn.Sequential(nn.Conv2d(16, 1, 1, bias=False), nn.ReLU())
    return randomized(Theirs(mode, dims, parts, "concat_project"))


def mmcv(mode: str, pooled: bool, norm: bool, dims: int = 2) -> Theirs:
    def conv(columns: int, rows: int) -> nn.Module:
        return NormedConv(columns, rows, dims)

    parts = projections(conv, dims, pooled, mode)
    parts["conv_out"] = NormedConv(8, 16, dims, norm)
    if mode == "concatenation":
        parts["concat_project"] = NormedConv(16, 1, bias=False)
    return randomized(Theirs(mode, dims, parts, "concat_project", 8**-0.5 if mode == "embedded_gaussian" else 1))


@pytest.mark.parametrize("build", [alexhex7, mmcv])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("pooled", "norm"), list(itertools.product([False, True], repeat=2)))
def test_nonlocal(build, mode: str, pooled: bool, norm: bool):
    theirs = build(mode, pooled, norm)
    name = f"nonlocal-{build.__name__}"
    options = {"mode": mode, "norm": norm, "pool": 2 if pooled else 1}
    x = torch.randn(2, 16, 4, 6).double()
    for training in (False, True):
        theirs.train(training)
        block = loaded(name, theirs, **options)
        assert_same(block, theirs, x)
        torch.testing.assert_close(block.state_dict(), convert(theirs.state_dict()))  # running statistics as well
    assert_round_trip(name, theirs.state_dict(), like=True)
    if not pooled:
        assert_round_trip(name, theirs.state_dict())
    ours = block.state_dict()
    again = convert(convert_back(ours, name, like=theirs.state_dict()), name)
    assert all(torch.equal(again[key], tensor) for key, tensor in ours.items())


@pytest.mark.parametrize("build", [alexhex7, mmcv])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dims", "size"), [(1, (12,)), (3, (2, 3, 2))])
def test_sequences_and_volumes(build, mode: str, dims: int, size: tuple[int, ...]):
    theirs = build(mode, False, True, dims).eval()
    name = f"nonlocal-{build.__name__}"
    block = loaded(name, theirs, mode=mode, norm=True, pool=1)
    assert_same(
        block, lambda x: theirs(x.unflatten(2, size)[..., 0]).flatten(2)[..., None], torch.randn(2, 16, 12, 1).double()
    )
    assert_round_trip(name, theirs.state_dict(), like=True)


@pytest.mark.parametrize("training", [False, True])
def test_a_bias_before_a_norm_is_folded_into_its_mean(training: bool):
    block = randomized(create_block("nonlocal-mmcv", 16, norm=True)).train(training)
    theirs = mmcv("embedded_gaussian", False, True).train(training)
    back = convert_back(block.state_dict(), "nonlocal-mmcv")
    torch.testing.assert_close(back["conv_out.bn.running_mean"], block.norm.running_mean - block.output.bias)
    theirs.load_state_dict(back)
    assert_same(block, theirs, torch.randn(2, 16, 3, 4).double())


def test_a_norm_that_has_not_counted_its_batches():
    state = alexhex7("embedded_gaussian", False, True).state_dict()
    del state["W.1.num_batches_tracked"]
    ours = convert(state)
    assert "norm.num_batches_tracked" not in ours
    create_block("nonlocal-alexhex7", 16, pool=1).load_state_dict(ours)
    assert_round_trip("nonlocal-alexhex7", state)
    back = convert_back(create_block("nonlocal-alexhex7", 16).state_dict(), "nonlocal-alexhex7", like=state)
    assert back.keys() == state.keys()


def test_a_score_vector_that_does_not_fit():
    state = alexhex7("concatenation", False, True).state_dict()
    state["concat_project.0.weight"] = torch.zeros(1, 15, 1, 1)
    message = r"'concat_project.0.weight' has shape \[1, 15, 1, 1\], but \[1, 2i, 1, 1\] is required, with i = 8 from"
    with pytest.raises(BlockError, match=message):
        convert(state)
