"""Converted multi-head attention and transformer layers, against torch's classes and d2l's formula."""

from collections.abc import Callable

import pytest
import torch
from conversion_checks import assert_round_trip, assert_same, randomized
from torch import Tensor, nn

from sagan_attn.blocks import (
    CrossAttention2d,
    Decoder,
    DecoderBlock2d,
    DecoderLayer,
    Encoder,
    EncoderBlock2d,
    EncoderLayer,
    MultiHeadAttention,
    MultiHeadAttention2d,
)
from sagan_attn.blocks.converters import convert, convert_back
from sagan_attn.errors import BlockError

BIAS = pytest.mark.parametrize("bias", [False, True])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def on_rows(module: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A module on sequences as one on maps."""

    def call(x: Tensor, *others: Tensor) -> Tensor:
        rows = [tensor.flatten(2).transpose(1, 2) for tensor in (x, *others)]
        return module(*rows).transpose(1, 2).unflatten(2, x.shape[2:])

    return call


def assert_back(ours: nn.Module, theirs: nn.Module, source: str) -> None:
    """Other weights of ours give the converted numbers as well: leave them in theirs."""
    state = randomized(ours).state_dict()
    back = convert_back(state, source)
    theirs.load_state_dict(back)
    again = convert(back, source)
    assert again.keys() == state.keys()
    for key, tensor in again.items():
        assert torch.equal(tensor.view_as(state[key]), state[key]), key


@BIAS
@pytest.mark.parametrize(("key_size", "value_size"), [(8, 8), (6, 5), (8, 5), (6, 8)])
def test_torch_multihead(bias: bool, key_size: int, value_size: int):
    theirs = randomized(nn.MultiheadAttention(8, 2, bias=bias, kdim=key_size, vdim=value_size, batch_first=True))
    ours = MultiHeadAttention(8, key_size, value_size, 8, 2, bias=bias, dtype=torch.float64)
    ours.load_state_dict(convert(theirs.state_dict()))
    x = random(2, 3, 8), random(2, 5, key_size), random(2, 5, value_size)
    assert_same(ours, lambda *x: theirs(*x, need_weights=False)[0], *x)
    assert_round_trip("torch-multihead", theirs.state_dict())
    assert_back(ours, theirs, "torch-multihead")
    assert_same(ours, lambda *x: theirs(*x)[0], *x)


@BIAS
def test_torch_multihead_on_maps(bias: bool):
    theirs = randomized(nn.MultiheadAttention(8, 2, bias=bias, batch_first=True))
    ours = MultiHeadAttention2d(8, heads=2, bias=bias, dtype=torch.float64)
    ours.load_state_dict(convert(theirs.state_dict()))

    def expected(x: Tensor) -> Tensor:
        return x + on_rows(lambda x: theirs(x, x, x, need_weights=False)[0])(x)

    assert_same(ours, expected, random(2, 8, 3, 4))
    assert_back(ours, theirs, "torch-multihead")
    assert_same(ours, expected, random(2, 8, 3, 4))


def test_torch_multihead_to_another_map():
    ours = CrossAttention2d(8, 6, heads=2, bias=True)
    theirs = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True).double()
    assert_back(ours, theirs, "torch-multihead")
    attention = on_rows(lambda x, context: theirs(x, context, context)[0])
    assert_same(ours, lambda x, context: x + attention(x, context), random(2, 8, 3, 4), random(2, 6, 2, 2))


class Heads(nn.Module):
    """d2l's attention: concatenated heads of softmax(q k / sqrt(d)) v, then W_o."""

    def __init__(self, query_size: int, key_size: int, value_size: int, size: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.W_q = nn.Linear(query_size, size, bias)
        self.W_k = nn.Linear(key_size, size, bias)
        self.W_v = nn.Linear(value_size, size, bias)
        self.W_o = nn.Linear(size, size, bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads = []
        parts = [f(x).chunk(self.heads, -1) for f, x in ((self.W_q, queries), (self.W_k, keys), (self.W_v, values))]
        for q, k, v in zip(*parts, strict=True):
            heads.append(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)
        return self.W_o(torch.cat(heads, -1))


@BIAS
@pytest.mark.parametrize("sizes", [(8, 8, 8), (7, 6, 5)])
def test_d2l_multihead(bias: bool, sizes: tuple[int, int, int]):
    theirs = randomized(Heads(*sizes, 8, 2, bias))
    ours = MultiHeadAttention(*sizes, 8, 2, bias=bias, dtype=torch.float64)
    ours.load_state_dict(convert(theirs.state_dict()))
    x = random(2, 3, sizes[0]), random(2, 4, sizes[1]), random(2, 4, sizes[2])
    assert_same(ours, theirs, *x)
    assert_round_trip("d2l-multihead", theirs.state_dict())
    assert_back(ours, theirs, "d2l-multihead")
    assert_same(ours, theirs, *x)


@BIAS
@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoder_layer(bias: bool, norm_first: bool):
    theirs = randomized(nn.TransformerEncoderLayer(8, 2, 16, 0, "gelu", 1e-5, True, norm_first, bias))
    state = convert(theirs.state_dict())
    ours = EncoderLayer(8, 2, 16, 0, norm_first, "gelu", bias, dtype=torch.float64)
    ours.load_state_dict(state)
    assert_same(ours, theirs, random(2, 5, 8))
    block = EncoderBlock2d(8, heads=2, expansion=2, norm_first=norm_first, bias=bias, dtype=torch.float64)
    block.load_state_dict(state)
    assert_same(block, on_rows(theirs), random(2, 8, 3, 4))
    assert_round_trip("torch-encoder-layer", theirs.state_dict())
    assert_back(block, theirs, "torch-encoder-layer")
    assert_same(block, on_rows(theirs), random(2, 8, 3, 4))


@BIAS
@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_decoder_layer(bias: bool, norm_first: bool):
    theirs = randomized(nn.TransformerDecoderLayer(8, 2, 16, 0, "relu", 1e-5, True, norm_first, bias))
    state = convert(theirs.state_dict())
    ours = DecoderLayer(8, 2, 16, 0, norm_first, "relu", bias, dtype=torch.float64)
    ours.load_state_dict(state)
    assert_same(ours, theirs, random(2, 5, 8), random(2, 3, 8))
    options = {"norm_first": norm_first, "activation": "relu", "bias": bias}
    block = DecoderBlock2d(8, heads=2, expansion=2, **options, dtype=torch.float64)
    block.load_state_dict(state)
    assert_same(block, on_rows(theirs), random(2, 8, 3, 4), random(2, 8, 2, 2))
    assert_round_trip("torch-decoder-layer", theirs.state_dict())
    assert_back(block, theirs, "torch-decoder-layer")
    assert_same(block, on_rows(theirs), random(2, 8, 3, 4), random(2, 8, 2, 2))


@BIAS
@pytest.mark.parametrize("norm_first", [False, True])
def test_stacks(bias: bool, norm_first: bool):
    options = {"dropout": 0.0, "norm_first": norm_first, "bias": bias}
    layers = [
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options),
        nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, **options),
    ]
    norms = [nn.LayerNorm(8, bias=bias) if norm_first else None for _ in layers]
    encoder = randomized(nn.TransformerEncoder(layers[0], 3, norms[0], enable_nested_tensor=False))
    decoder = randomized(nn.TransformerDecoder(layers[1], 11, norms[1]))
    x = random(2, 5, 8), random(2, 3, 8)
    for theirs, ours, inputs in (
        (encoder, Encoder(3, 8, 2, 16, **options), x[:1]),
        (decoder, Decoder(11, 8, 2, 16, **options), x),
    ):
        source = f"torch-{type(ours).__name__.lower()}-layer"
        ours.double().load_state_dict(convert(theirs.state_dict()))
        assert_same(ours, theirs, *inputs)
        assert_round_trip(source, theirs.state_dict())
        assert_back(ours, theirs, source)
        assert_same(ours, theirs, *inputs)


def test_a_stack_without_one_of_its_layers():
    state = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False).state_dict()
    state = {key.replace("layers.0", "layers.5"): tensor for key, tensor in state.items()}
    message = r"missing: 'layers.0.self_attn.in_proj_weight', .*; unexpected: 'layers.5.self.*layers.5.norm2.bias'$"
    with pytest.raises(BlockError, match=message):
        convert(state)
    state |= {f"layers.5.{name}": torch.zeros(1) for name in "abc"}
    with pytest.raises(BlockError, match=r"'layers.5.norm2.bias' and 3 more$"):
        convert(state)


def test_layers_of_different_widths():
    state = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False).state_dict()
    state["layers.1.linear1.weight"] = torch.zeros(12, 8)
    message = r"'layers.1.linear1.weight' has shape \[12, 8\], .* F = 16 from 'layers.0.linear1.weight' and E = 8 from"
    with pytest.raises(BlockError, match=message):
        convert(state)


def test_keys_and_values_added_to_sequences_are_refused():
    theirs = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    with pytest.raises(BlockError, match="unexpected: 'bias_k', 'bias_v'; 'bias_k' has no counterpart: a key added"):
        convert(theirs.state_dict(), "torch-multihead")


@pytest.mark.parametrize("shape", [(25, 8), (24, 9), (16, 8), (24, 8, 1)])
def test_a_stacked_weight_of_another_shape(shape: tuple[int, ...]):
    state = nn.MultiheadAttention(8, 2).state_dict() | {"in_proj_weight": torch.zeros(shape)}
    with pytest.raises(BlockError, match=r"'in_proj_weight' has shape \[.*\], but \[3E, E\] is required"):
        convert(state)


@pytest.mark.parametrize(
    ("block", "source", "message"),
    [
        (MultiHeadAttention2d(8, score="additive"), "torch-multihead", "no counterpart of 'score_vector'"),
        (
            MultiHeadAttention2d(8, position="relative"),
            "d2l-multihead",
            "no counterpart of 'height_rel', 'width_rel'",
        ),
        (
            MultiHeadAttention2d(8, reduction=2),
            "torch-multihead",
            r"'query.weight' has shape \[4, 8, 1, 1\], but \[E, E, 1, 1\] is required",
        ),
        (
            DecoderBlock2d(8, 6),
            "torch-decoder-layer",
            r"'cross.key.weight' has shape \[8, 6, 1, 1\], but \[E, E, 1, 1\] is required, with E = 8 from 'attention",
        ),
        (EncoderBlock2d(8, position="relative"), "torch-encoder-layer", "no counterpart of 'attention.height_rel'"),
        (DecoderBlock2d(8), "torch-encoder-layer", "no counterpart of 'cross.query.weight'"),
        (EncoderBlock2d(8), "torch-decoder-layer", "; the block lacks 'cross.query.weight', 'cross.key.weight'"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_expressed_there(block: nn.Module, source: str, message: str):
    with pytest.raises(BlockError, match=message):
        convert_back(block.state_dict(), source)
