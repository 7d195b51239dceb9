"""Transformer layers on sequences and on maps against torch's, with the same weights."""

from typing import Any

import pytest
import torch
from from_torch import assert_same_gradients, tensors
from references import fill
from torch import Tensor, nn

from sagan_attn.blocks import (
    CrossAttention2d,
    Decoder,
    DecoderBlock2d,
    DecoderLayer,
    Encoder,
    EncoderBlock2d,
    EncoderLayer,
    MultiHeadAttention2d,
)
from sagan_attn.errors import BlockError

C, B, N, M = 12, 3, 5, 7
LENS = torch.tensor([3, 5, 1])
MEMORY_LENS = torch.tensor([2, 7, 4])
CAUSAL = torch.ones(N, N).tril().bool()
STYLES = [
    {"norm_first": norm_first, "activation": activation, "bias": bias}
    for norm_first in (False, True)
    for activation in ("relu", "gelu")
    for bias in (True, False)
]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def beyond(lens: Tensor, size: int) -> Tensor:
    """True at what torch is to ignore, [B, size]."""
    return torch.arange(size) >= lens[:, None]


def sequence(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def torchs(kind: type[nn.Module], style: dict[str, Any]) -> nn.Module:
    return fill(kind(C, 3, 2 * C, dropout=0.0, batch_first=True, **style).double())


def check(ours: nn.Module, theirs: nn.Module, inputs: list[Tensor], own: dict[str, Any], other: dict[str, Any]) -> None:
    """Outputs, and gradients of inputs and of all parameters."""
    ours.load_state_dict(tensors(theirs))
    copied = [x.detach().clone().requires_grad_() for x in inputs]
    output, expected = ours(*inputs, **own), theirs(*copied, **other)
    close(output, expected)
    towards = torch.randn_like(expected)
    output.backward(towards)
    expected.backward(towards)
    for one, two in zip(inputs, copied, strict=True):
        close(one.grad, two.grad)
    assert_same_gradients(ours, theirs)
    single = ours.float()(*[x.detach().float() for x in inputs], **own)
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=2e-6)


# What our encoder is given, and torch's.
SELF: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "causal": ({"causal": True}, {"mask": ~CAUSAL, "is_causal": True}),
    "lengths": ({"valid_lens": LENS}, {"key_padding": beyond(LENS, N)}),
    "lengths, causal": (
        {"valid_lens": LENS, "causal": True},
        {"mask": ~CAUSAL, "key_padding": beyond(LENS, N)},
    ),
    "lengths of queries, causal": (
        {"valid_lens": torch.tensor([2, 1, 5, 3, 4]).expand(B, -1), "causal": True},
        {"mask": ~(CAUSAL & (torch.arange(N) < torch.tensor([2, 1, 5, 3, 4])[:, None]))},
    ),
    "mask": ({"mask": ~beyond(LENS, N)[:, None]}, {"key_padding": beyond(LENS, N)}),
    "mask, causal": (
        {"mask": ~beyond(LENS, N)[:, None], "causal": True},
        {"mask": ~CAUSAL, "key_padding": beyond(LENS, N)},
    ),
}


def for_encoder(arguments: dict[str, Any]) -> dict[str, Any]:
    names = {"mask": "src_mask", "key_padding": "src_key_padding_mask", "is_causal": "is_causal"}
    return {names[key]: value for key, value in arguments.items()}


def for_decoder(arguments: dict[str, Any]) -> dict[str, Any]:
    names = {"mask": "tgt_mask", "key_padding": "tgt_key_padding_mask", "is_causal": "tgt_is_causal"}
    return {names[key]: value for key, value in arguments.items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", SELF)
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_encoder_layer(style: dict[str, Any], masked: str, training: bool):
    theirs = torchs(nn.TransformerEncoderLayer, style).train(training)
    ours = EncoderLayer(C, 3, 2 * C, **style).double().train(training)
    own, other = SELF[masked]
    check(ours, theirs, [sequence(B, N, C)], own, for_encoder(other))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", SELF)
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_decoder_layer(style: dict[str, Any], masked: str, training: bool):
    theirs = torchs(nn.TransformerDecoderLayer, style).train(training)
    ours = DecoderLayer(C, 3, 2 * C, **style).double().train(training)
    own, other = SELF[masked]
    memory = {"memory_key_padding_mask": beyond(MEMORY_LENS, M)} if masked != "none" else {}
    if masked.startswith("mask"):
        own = {**own, "memory_mask": ~beyond(MEMORY_LENS, M)[:, None]}
    elif masked != "none":
        own = {**own, "memory_valid_lens": MEMORY_LENS}
    check(ours, theirs, [sequence(B, N, C), sequence(B, M, C)], own, for_decoder(other) | memory)


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_without_gradients_torch_takes_a_fused_path(style: dict[str, Any]):
    theirs = torchs(nn.TransformerEncoderLayer, style).eval()
    ours = EncoderLayer(C, 3, 2 * C, **style).double()
    ours.load_state_dict(tensors(theirs))
    x = sequence(B, N, C).detach()
    with torch.no_grad():
        close(ours.eval()(x), theirs(x))


@pytest.mark.parametrize("masked", ["none", "lengths, causal"])
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_stacks(style: dict[str, Any], masked: str):
    """With the norm first torch's stacks are given a last norm, as in `nn.Transformer`; else none."""
    norm_first, bias = style["norm_first"], style["bias"]
    own, other = SELF[masked]
    x, memory = sequence(B, N, C), sequence(B, M, C)

    def last() -> nn.Module | None:
        return nn.LayerNorm(C, bias=bias, dtype=torch.float64) if norm_first else None

    encoder = nn.TransformerEncoder(torchs(nn.TransformerEncoderLayer, style), 3, last(), enable_nested_tensor=False)
    arguments = for_encoder(other)
    if "src_mask" in arguments:
        arguments["mask"] = arguments.pop("src_mask")
    ours = Encoder(3, C, 3, 2 * C, **style).double()
    check(ours, fill(encoder), [x], own, arguments)
    assert (ours.norm is not None) == norm_first

    decoder = nn.TransformerDecoder(torchs(nn.TransformerDecoderLayer, style), 2, last())
    ours = Decoder(2, C, 3, 2 * C, **style).double()
    arguments = for_decoder(other) | {"memory_key_padding_mask": beyond(MEMORY_LENS, M)}
    x.grad = None
    check(ours, fill(decoder), [x, memory], {**own, "memory_valid_lens": MEMORY_LENS}, arguments)


class OnRows(nn.Module):
    """A torch layer on the positions of maps, and its result as a map again."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *maps: Tensor, **masks: Tensor) -> Tensor:
        rows = [one.flatten(2).transpose(1, 2) for one in (x, *maps)]
        out = self.layer(*rows, **{key: ~mask.flatten(1) for key, mask in masks.items()})
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


def check_maps(ours: nn.Module, theirs: nn.Module, maps: list[Tensor], own: dict, other: dict) -> None:
    ours.load_state_dict(tensors(theirs))  # weights of linear maps load as 1x1 convolutions
    copied = [x.detach().clone().requires_grad_() for x in maps]
    output, expected = ours(*maps, **own), OnRows(theirs)(*copied, **other)
    close(output, expected)
    towards = torch.randn_like(expected)
    output.backward(towards)
    expected.backward(towards)
    for one, two in zip(maps, copied, strict=True):
        close(one.grad, two.grad)
    assert_same_gradients(ours, theirs)


def random_mask(*size: int) -> Tensor:
    mask = torch.rand(B, *size, generator=torch.Generator().manual_seed(7)) < 0.5
    mask[:, 0, 0] = True
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_encoder_block_on_maps(style: dict[str, Any], masked: bool):
    ours = EncoderBlock2d(C, heads=3, expansion=2, **style).double()
    mask = random_mask(4, 5)
    own, other = ({"mask": mask}, {"src_key_padding_mask": mask}) if masked else ({}, {})
    check_maps(ours, torchs(nn.TransformerEncoderLayer, style), [sequence(B, C, 4, 5)], own, other)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_decoder_block_on_maps(style: dict[str, Any], masked: bool):
    ours = DecoderBlock2d(C, heads=3, expansion=2, **style).double()
    mask, context_mask = random_mask(4, 5), random_mask(3, 2)
    own: dict[str, Any] = {"mask": mask, "context_mask": context_mask} if masked else {}
    other = {"tgt_key_padding_mask": mask, "memory_key_padding_mask": context_mask} if masked else {}
    maps = [sequence(B, C, 4, 5), sequence(B, C, 3, 2)]
    check_maps(ours, torchs(nn.TransformerDecoderLayer, style), maps, own, other)


@pytest.mark.parametrize("norm_first", [False, True])
def test_causal_hides_the_future(norm_first: bool):
    encoder = fill(Encoder(2, C, 3, 2 * C, norm_first=norm_first).double())
    decoder = fill(Decoder(2, C, 3, 2 * C, norm_first=norm_first).double())
    x, memory = sequence(B, N, C), sequence(B, M, C)
    changed = x.detach().clone()
    changed[:, 3:] = torch.randn_like(changed[:, 3:])
    for stack, others in ((encoder, ()), (decoder, (memory,))):
        before, after = (stack(one, *others, causal=True) for one in (x, changed))
        assert torch.equal(before[:, :3], after[:, :3])
        assert (before[:, 3:] != after[:, 3:]).all()
        assert (stack(x, *others)[:, :3] != stack(changed, *others)[:, :3]).any()
        (gradient,) = torch.autograd.grad(before[:, 2].sum(), x)
        assert not gradient[:, 3:].any()
        assert gradient[:, :3].abs().amax(dim=(0, 2)).all()


@pytest.mark.parametrize("layer", ["encoder", "decoder", "encoder map", "decoder map"])
def test_dropout_is_for_training_and_keeps_the_mean(layer: str):
    torch.manual_seed(2)
    if "map" in layer:
        kind = EncoderBlock2d if "encoder" in layer else DecoderBlock2d
        block, x = fill(kind(C, heads=3, expansion=2, dropout=0.3)), torch.randn(1, C, 2, 2)
    else:
        kind = EncoderLayer if layer == "encoder" else DecoderLayer
        block, x = fill(kind(C, 3, 2 * C, 0.3, norm_first=True)), torch.randn(1, 4, C)
    inputs = (x,) if layer == "encoder" or "map" in layer else (x, x)
    block.eval()
    assert torch.equal(block(*inputs), block(*inputs))
    block.train()
    outputs = block(*[one.expand(2000, *one.shape[1:]) for one in inputs])
    assert (outputs[0] != outputs[1]).any()
    # A last step that is linear in what was dropped: the ffn behind a fixed x. Its own mean is kept exactly.
    block.linear1.weight.data.zero_()
    with torch.no_grad():
        hidden = block.ffn(x.expand(20_000, *x.shape[1:]))
        expected = block.eval().ffn(x)
    error = hidden.std(0) / len(hidden) ** 0.5
    assert ((hidden.mean(0) - expected[0]).abs() < 5 * error).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, r"num_heads \(5\) must divide num_hiddens \(12\)"),
        ({"num_hiddens": 0}, r"num_hiddens \(0\) must be a whole number"),
        ({"ffn_hiddens": 0}, r"ffn_hiddens \(0\) must be a whole number"),
        ({"activation": "tanh"}, r"activation \('tanh'\) must be 'relu' or 'gelu'"),
        ({"dropout": 1}, r"dropout \(1\) must be a number of at least 0 and below 1"),
        ({"path": "fast"}, r"path \('fast'\) must be"),
    ],
)
@pytest.mark.parametrize("kind", [EncoderLayer, DecoderLayer])
def test_options_out_of_range(kind: type[nn.Module], options: dict[str, Any], message: str):
    with pytest.raises(BlockError, match=message):
        kind(**{"num_hiddens": 12, "num_heads": 3, "ffn_hiddens": 24, **options})


def test_stacks_refuse_what_is_not_a_number_of_layers():
    with pytest.raises(BlockError, match=r"num_layers \(0\) must be a whole number of at least 1"):
        Encoder(0, C, 3, 2 * C)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lens", [[1, 2, 3, 4], [2], 2, [[2], [1], [3]], [[2] * 5], [1.0, 2.0, 3.0], [True, True, False], [[True] * 5] * 3]
)
def test_lengths_that_do_not_fit(lens: Any, causal: bool):
    layer, x = EncoderLayer(C, 3, 2 * C), torch.randn(B, N, C)
    with pytest.raises(BlockError, match=r"valid_lens of shape .* must be whole numbers of shape \(3,\) or \(3, 5\)"):
        layer(x, torch.tensor(lens), causal=causal)


@pytest.mark.parametrize("kind", [MultiHeadAttention2d, CrossAttention2d, EncoderBlock2d, DecoderBlock2d])
@pytest.mark.parametrize("dropout", [1.0, 1.5, -0.1, True, "0.1"])
def test_dropout_of_maps_out_of_range(kind: type[nn.Module], dropout: Any):
    with pytest.raises(BlockError, match="dropout"):
        kind(8, dropout=dropout)
