"""Which source a state dict is taken for, what is refused, and what a conversion leaves alone."""

import copy
import re

import pytest
import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.non_local_attn import NonLocalAttn
from torch import Tensor, nn

from sagan_attn.blocks import block_names, create_block
from sagan_attn.blocks.converters import convert, convert_back, sources
from sagan_attn.errors import BlockError


def sagan(suffix: str = "", dims: int = 4, bias: bool = True, **changes: Tensor | None) -> dict[str, Tensor]:
    """A state dict of the plain form; changes by key with "__" for a point, None to leave it out."""
    state: dict[str, Tensor] = {"gamma": torch.ones(1)}
    for name, rows in (("query", 2), ("key", 2), ("value", 16)):
        state[f"{name}{suffix}.weight"] = torch.randn(rows, 16, *[1] * (dims - 2))
        if bias:
            state[f"{name}{suffix}.bias"] = torch.randn(rows)
    for key, tensor in changes.items():
        if tensor is None:
            del state[key.replace("__", ".")]
        else:
            state[key.replace("__", ".")] = tensor
    return state


def spectral(dims: int, inner: str = "") -> dict[str, Tensor]:
    """The same with spectral norms of torch's older kind."""
    state = {"gamma": torch.ones(1)}
    for name, rows in (("query", 2), ("key", 2), ("value", 16)):
        state[f"{name}{inner}.weight_orig"] = torch.randn(rows, 16, *[1] * (dims - 2))
        state[f"{name}{inner}.weight_u"], state[f"{name}{inner}.weight_v"] = torch.randn(rows), torch.randn(16)
    return state


def test_sources():
    assert set(sources()) == {
        "sagan",
        "sagan-conv",
        "biggan",
        "fastai",
        "timm-bottleneck",
        "timm-nonlocal",
        "nonlocal-alexhex7",
        "nonlocal-mmcv",
        "torch-multihead",
        "d2l-multihead",
        "torch-encoder-layer",
        "torch-decoder-layer",
    }
    quoted = {name for text in sources().values() for name in re.findall("block '(.+?)'", text)}
    assert {"biggan", "nonlocal-mmcv"} <= quoted <= set(block_names())


@pytest.mark.parametrize("name", ["sagan", "fastai"])
def test_our_own_state_dict_stays_as_it_is(name: str):
    state = create_block(name, 16, gamma_init=0.3).state_dict()
    ours = convert(state)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("direction", ["to ours", "to theirs"])
def test_the_result_is_a_copy(direction: str):
    state = sagan() if direction == "to ours" else BottleneckAttn(16, feat_size=(2, 2)).state_dict()
    if direction == "to theirs":
        state = convert(state)
    state = {key: nn.Parameter(tensor.to(torch.bfloat16)) for key, tensor in state.items()}
    before = copy.deepcopy(state)
    result = convert(state) if direction == "to ours" else convert_back(state, "timm-bottleneck")
    for tensor in result.values():
        assert tensor.dtype == torch.bfloat16
        assert not tensor.requires_grad
        tensor.add_(1)
    assert state.keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())


def test_on_another_device():
    for theirs in (BottleneckAttn(16, feat_size=(2, 2)).to("meta"), NonLocalAttn(16).to("meta")):
        assert {tensor.device.type for tensor in convert(theirs.state_dict()).values()} == {"meta"}


def test_a_prefix():
    state = sagan() | {"gammas": torch.ones(3)}
    model = {f"attn.{key}": tensor for key, tensor in sagan().items()} | {"attn2.query.weight": torch.ones(1)}
    assert convert(model, prefix="attn.").keys() == sagan().keys()
    with pytest.raises(BlockError, match=r"no key starts with the prefix 'attention.'; there are 'attn.gamma'"):
        convert(model, prefix="attention.")
    with pytest.raises(BlockError, match=r"unexpected: 'gammas'$"):
        convert(state)
    del model["attn2.query.weight"]
    with pytest.raises(BlockError, match=r"all keys start with 'attn\.': is it a prefix\?$"):
        convert(model)


def test_conv1d_with_a_spectral_norm_is_that_of_fastai():
    state = spectral(3)
    ours = convert(state)
    assert torch.equal(ours["query.weight"], state["key.weight_orig"][..., None])
    assert torch.equal(ours["key.weight_u"], state["query.weight_u"])
    state = spectral(4)
    ours = convert(state)
    assert torch.equal(ours["query.weight"], state["query.weight_orig"])


def test_a_left_singular_vector_alone():
    state = {key: tensor for key, tensor in spectral(4).items() if not key.endswith("_v")}
    ours = convert(state)
    matrix = state["key.weight_orig"].flatten(1)
    v = matrix.T @ state["key.weight_u"]
    torch.testing.assert_close(ours["key.weight_v"], v / v.norm())
    u = matrix @ v
    torch.testing.assert_close(ours["key.weight_u"], u / u.norm())
    assert convert_back(ours, "sagan", like=state).keys() == state.keys()


@pytest.mark.parametrize(
    ("state", "source", "message"),
    [
        (sagan(dims=3, bias=False), "auto", "fits 'sagan' and 'fastai': name its source"),
        (sagan(gamma=None), "auto", "no source fits the state dict; the nearest is 'sagan'; missing: 'gamma'$"),
        (sagan("_conv", extra=torch.ones(1)), "auto", "the nearest is 'sagan-conv'; unexpected: 'extra'$"),
        (sagan(key__bias=None), "sagan", "does not fit 'sagan'; missing: 'key.bias'$"),
        (sagan("_conv"), "timm-nonlocal", "missing: 't.weight', .*; unexpected: 'gamma', 'query_conv.weight'"),
        ({}, "auto", "the state dict is empty"),
        (sagan(), "sagan_conv", r"unknown source 'sagan_conv'; did you mean sagan-conv .*\(all: sagan, sagan-conv, "),
        (sagan(), "keras", r"unknown source 'keras'; did you mean .*\(all: sagan, "),
        ({**sagan(), "note": "x"}, "auto", "'note' holds str, but a tensor is required"),
        ({"state_dict": sagan()}, "auto", "'state_dict' holds dict, but a tensor is required"),
        (nn.Linear(1, 1), "auto", "a state dict is required, not Linear"),
        (
            sagan(key__weight=torch.ones(3, 16, 1, 1)),
            "auto",
            r"as 'sagan': 'key.weight' has shape \[3, 16, 1, 1\], but \[d, C, 1, 1\] is required, with d = 2 from",
        ),
        (
            sagan("_conv", query_conv__weight=torch.ones(2, 16, 3, 3)),
            "auto",
            r"'query_conv.weight' has shape \[2, 16, 3, 3\], but \[d, C, 1, 1\] is required$",
        ),
        (
            sagan(value__weight=torch.ones(8, 16, 1, 1)),
            "sagan",
            r"'value.weight' has shape \[8, 16, 1, 1\], but \[C, ",
        ),
        (sagan(key__bias=torch.ones(3)), "sagan", r"'key.bias' has shape \[3\], but \[d\] is required, with d = 2"),
        (sagan(gamma=torch.ones(2)), "sagan", r"'gamma' has shape \[2\], but \[1\] is required$"),
        (spectral(3), "sagan", r"'query.weight_orig' has shape \[2, 16, 1\], but \[d, C, 1, 1\] is required"),
        (spectral(4, ".0"), "auto", r"as 'fastai': 'key.0.weight_orig' has shape \[2, 16, 1, 1\], but \[d, C, 1\] is"),
        (
            spectral(4) | {"key.weight_v": torch.ones(2)},
            "auto",
            r"'key.weight_v' has shape \[2\], but \[C\] is required, with C = 16",
        ),
    ],
    ids=range(19),
)
def test_state_dicts_that_do_not_fit(state, source: str, message: str):
    with pytest.raises(BlockError, match=message):
        convert(state, source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv.weight": torch.ones(47, 16, 1, 1)}, r"\[47, 16, 1, 1\], but \[2d \+ C, C, 1, 1\] is required"),
        ({"qkv.weight": torch.ones(16, 16, 1, 1)}, r"\[16, 16, 1, 1\], but \[2d \+ C, C, 1, 1\] is required"),
        ({"qkv.weight": torch.ones(96, 16, 1, 1)}, "'height_rel' has 4 features a head, .* 40 query and 16 value"),
        ({"pos_embed.width_rel": torch.ones(4, 4)}, "'width_rel' has 4 rows, but an odd number is required"),
        ({"pos_embed.width_rel": torch.ones(5, 2)}, r"'pos_embed.width_rel' has shape \[5, 2\], .* with e = 4 from"),
    ],
    ids=range(5),
)
def test_bottlenecks_that_do_not_fit(changes: dict[str, Tensor], message: str):
    with pytest.raises(BlockError, match=message):
        convert(BottleneckAttn(16, feat_size=(3, 3)).state_dict() | changes)


@pytest.mark.parametrize(
    ("block", "source", "message"),
    [
        ("sagan", "timm-nonlocal", "which has no counterpart of 'gamma'; the block lacks 'output.weight', 'output.bi"),
        (
            "sagan",
            "biggan",
            "no counterpart of 'query.bias', 'key.bias', 'value.bias'; the block lacks 'output",
        ),
        ("botnet", "sagan", "no counterpart of 'height_rel', 'width_rel'$"),
        ("sagan", "auto", "unknown source 'auto'"),
        ("nonlocal-mmcv", "timm-nonlocal", "the block lacks 'norm.weight', 'norm.bias', 'norm.running_mean'"),
    ],
)
def test_blocks_that_cannot_be_expressed(block: str, source: str, message: str):
    with pytest.raises(BlockError, match=message):
        convert_back(create_block(block, 16).state_dict(), source)


def test_a_gate_of_another_shape_is_not_folded():
    state = create_block("botnet", 16).state_dict() | {"gamma": torch.ones(16)}
    with pytest.raises(BlockError, match=r"'gamma' has shape \[16\], but \[1\] is required"):
        convert_back(state, "timm-bottleneck")


def test_like_another_module():
    ours = create_block("sagan", 16).state_dict()
    with pytest.raises(BlockError, match=r"^like: the state dict does not fit 'sagan-conv'; missing: 'query_conv"):
        convert_back(ours, "sagan-conv", like=sagan())
    with pytest.raises(BlockError, match=r"which has no counterpart of 'query.bias', 'key.bias', 'value.bias'$"):
        convert_back(ours, "sagan-conv", like=sagan("_conv", bias=False))
    other = sagan("_conv", query_conv__weight=torch.ones(4, 16, 1, 1))
    with pytest.raises(BlockError, match=r"'query_conv.weight' has shape \[4, 16, 1, 1\], .* with d = 2 from 'query.w"):
        convert_back(ours, "sagan-conv", like=other)
