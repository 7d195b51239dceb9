"""Recording changes nothing and records what the output is made of."""

import copy

import pytest
import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.non_local_attn import NonLocalAttn
from torch import nn

from sagan_attn import SelfAttention2d, graft, record_attention
from sagan_attn.blocks import create_block
from sagan_attn.errors import BlockError, GraftError
from sagan_attn.surgery.interventions import foreign_keys, uniform_attention

BLOCKS = {
    "sagan": {"heads": 2},
    "biggan": {},
    "nonlocal": {"pool": 2},
    "multihead": {"position": "relative", "heads": 2},
    "encoder": {"heads": 2},
    "decoder": {"heads": 2},
    "cross": {"heads": 2},
    "additive": {},
}


def host() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()


def awake(model: nn.Module) -> nn.Module:
    """With every zero parameter drawn anew, so that attention counts."""
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def made(block: str = "sagan", gate: bool | None = None, **options) -> nn.Module:
    model = host()
    graft(model, "1", block, gate=gate, example_input=torch.rand(1, 3, 20, 28), options=options)
    return awake(model)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_gradients_buffers_and_strides_stay(block, training):
    model, images = made(block, **BLOCKS[block]).train(training), torch.rand(2, 3, 20, 28)
    other = copy.deepcopy(model)
    images = images.contiguous(memory_format=torch.channels_last)
    state = torch.random.get_rng_state()
    expected = other(images)
    torch.random.set_rng_state(state)
    with record_attention(model) as recording:
        found = model(images)
    assert all(len(records) == 1 for records in recording.values())
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    for output in (found, expected):
        output.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(getattr(module, "intervention", None) is None for module in model.modules())


@pytest.mark.parametrize("block", ["sagan", "biggan", "nonlocal", "multihead", "cross", "additive", "encoder"])
def test_weights_are_the_block_s_own(block):
    model, images = made(block, **BLOCKS[block]), torch.rand(2, 3, 20, 28)  # a map of 5 x 7
    with record_attention(model) as recording, torch.no_grad():
        model(images)
    record, x = recording.only(), model[:1](images).relu().detach()
    own = model[1].grafts.get_submodule(record.path.split(".")[2])
    torch.testing.assert_close(record.weights, own.attention_weights(x).detach(), rtol=1e-6, atol=1e-7)
    assert record.query_size == (5, 7)
    assert record.key_size == {"biggan": (3, 4), "nonlocal": (2, 3)}.get(block, (5, 7))
    assert record.pool == (2 if block in ("biggan", "nonlocal") else 1)
    assert torch.equal(record.queries, torch.arange(35))
    assert recording["1"] == recording[record.path] == (record,)
    for queries in (torch.tensor([34, 0, 3]), torch.tensor([[1, 2], [30, 4]])):
        with record_attention(model, queries) as some, torch.no_grad():
            model(images)
        index = queries.expand(2, -1)[:, None, :, None]
        expected = record.weights.take_along_dim(index, dim=2)
        torch.testing.assert_close(some.only().weights, expected, rtol=1e-6, atol=1e-7)


def test_decoder_has_two_and_gates_are_looked_into():
    model, images = made("decoder", heads=2), torch.rand(1, 3, 20, 28)
    with record_attention(model) as recording, torch.no_grad():
        model(images)
    assert [path.rsplit(".", 1)[1] for path in recording] == ["attention", "cross"]
    with pytest.raises(KeyError, match="means several attentions"):
        recording["1"]
    block = model[1].grafts.decoder
    x = block.norm1(model[:1](images).relu())
    assert torch.equal(recording.only("1.grafts.decoder.attention").weights, block.attention.attention_weights(x))
    gated = made("multihead", gate=True, zero_init=False)
    with record_attention(gated) as recording, torch.no_grad():
        gated(images)
    assert list(recording) == ["1.grafts.multihead.block"]
    assert recording.only("multihead").query_size == (5, 7)


def test_blocks_of_a_network_of_one_s_own():
    network = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Sequential(create_block("encoder", 8), SelfAttention2d(8)))
    images = torch.rand(1, 3, 8, 12)
    with record_attention(network) as recording, torch.no_grad():
        network(images)
    assert [(path, recording.only(path).query_size) for path in recording] == [
        ("1.0.attention", (4, 6)),
        ("1.1", (4, 6)),
    ]
    with record_attention(network, at="1.1") as recording, torch.no_grad():
        network(images)
    assert list(recording) == ["1.1"]


def test_a_context_has_its_own_keys():
    block = create_block("cross", 8, context_channels=4, heads=2)
    x, context = torch.rand(2, 8, 4, 6), torch.rand(2, 4, 3, 5)
    with record_attention(block) as recording, torch.no_grad():
        block(x, context)
    record = recording.only()
    assert (record.query_size, record.key_size) == ((4, 6), (3, 5))
    assert torch.equal(record.weights, block.attention_weights(x, context=context))


def test_several_calls_nesting_and_exceptions():
    model, images = made(), torch.rand(2, 3, 20, 28)
    with torch.no_grad(), record_attention(model) as outer:
        model(images[:1])
        with record_attention(model, [3]) as inner:
            model(images)
        model(images[1:, :, :8])
    assert [record.weights.shape for record in outer["1"]] == [(1, 1, 35, 35), (2, 1, 35, 35), (1, 1, 14, 14)]
    assert [record.call for record in outer["1"]] == [0, 1, 2]
    assert inner.only().weights.shape == (2, 1, 1, 35)
    torch.testing.assert_close(inner.only().weights, outer["1"][1].weights[:, :, 3:4], rtol=1e-6, atol=1e-8)
    with pytest.raises(GraftError, match="ran 3 times"):
        outer.only()
    with pytest.raises(ZeroDivisionError), record_attention(model):
        raise ZeroDivisionError
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model[1].grafts.sagan.intervention is None


def test_a_copy_made_inside_records_nothing():
    model, images = made(), torch.rand(1, 3, 20, 28)
    with record_attention(model) as recording:
        other = copy.deepcopy(model)
    assert torch.equal(other(images), model(images))
    assert not recording["1"]


def test_interventions_are_recorded_as_they_act():
    model, images = made(), torch.rand(2, 3, 20, 28)
    with uniform_attention(model), record_attention(model) as recording, torch.no_grad():
        model(images)
    torch.testing.assert_close(recording.only().weights, torch.full((2, 1, 35, 35), 1 / 35))
    with record_attention(model), foreign_keys(model), pytest.raises(GraftError, match="begin the recording inside"):
        model(images)


def test_checkpointing_is_recorded_once():
    model, images = made(), torch.rand(1, 3, 20, 28)
    with record_attention(model) as recording:
        torch.utils.checkpoint.checkpoint(model, images, use_reentrant=False).sum().backward()
    assert len(recording["1"]) == 1


def test_autocast_and_compiled_models():
    model, images = made("multihead", heads=2), torch.rand(1, 3, 20, 28)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        with record_attention(model) as recording:
            assert torch.equal(model(images), expected)
    assert recording.only().weights.dtype == torch.float32
    with record_attention(model) as plain, torch.no_grad():
        model(images)
    torch.testing.assert_close(recording.only().weights, plain.only().weights, rtol=0.05, atol=1e-3)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = compiled(images)
        with record_attention(compiled) as recording:
            compiled(images)
        with record_attention(model) as under_its_other_name:
            compiled(images)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(compiled(images), expected)
    assert torch.equal(recording.only().weights, plain.only().weights)
    assert torch.equal(under_its_other_name.only().weights, plain.only().weights)


def test_the_budget_is_asked_first():
    model, images = made(heads=2), torch.rand(2, 3, 20, 28)
    every = 4 * 2 * 2 * 35 * 35
    with record_attention(model, max_bytes=every) as recording, torch.no_grad():
        model(images)
    assert recording.bytes == every == recording.only().weights.nbytes
    with (
        record_attention(model, max_bytes=every - 1),
        pytest.raises(
            GraftError, match=r"\[2, 2, 35, 35\], take 19,600 bytes, and max_bytes allows 19,599: name fewer queries"
        ),
    ):
        model(images)
    with record_attention(model, max_bytes=every) as recording, torch.no_grad():
        model(images)
        with pytest.raises(GraftError, match="beside 19,600 recorded so far"):
            model(images)
    model(images)


def test_refusals():
    model, images = made(), torch.rand(1, 3, 20, 28)
    for at, message in (
        ("2", "'2' is a Conv2d: no attention weights"),
        ("sagen", "no attention is called 'sagen'; near names: sagan"),
        ([], "at is empty"),
    ):
        with pytest.raises(GraftError, match=message), record_attention(model, at=at):
            pass
    with pytest.raises(GraftError, match="no grafts, and no attention of its own"), record_attention(host()):
        pass
    summary = host()
    graft(summary, "1", "context-max", example_input=images)
    with pytest.raises(GraftError, match=r"its grafts \(GlobalContext2d\) have none"), record_attention(summary):
        pass
    with record_attention(model, [35]), pytest.raises(BlockError, match="from 0 to 34"):
        model(images)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_of_torch(batch_first, masked):
    """Against its own weights, which it gives when asked."""
    module = nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=batch_first, kdim=5, vdim=7, add_bias_kv=True).eval()
    query, key, value = torch.rand(6, 2, 12), torch.rand(4, 2, 5), torch.rand(4, 2, 7)
    if batch_first:
        query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    masks = {}
    if masked:
        masks = {"attn_mask": torch.randn(6, 6, 4), "key_padding_mask": torch.zeros(2, 4)}
        masks["key_padding_mask"][1, 3] = -torch.inf
    expected, weights = module(query, key, value, average_attn_weights=False, **masks)
    module.train()
    queries = torch.tensor([[5, 0], [1, 1]])
    state = torch.random.get_rng_state()
    with record_attention(module) as recording, record_attention(module, queries) as some:
        module(query, key, value, need_weights=False, **masks)
    torch.random.set_rng_state(state)
    torch.testing.assert_close(recording.only().weights, weights)
    torch.testing.assert_close(some.only().weights, weights.take_along_dim(queries[:, None, :, None], dim=2))
    assert recording.only().query_size is None
    assert not module._forward_pre_hooks
    module.eval()
    with record_attention(module):
        assert torch.equal(module(query, key, value, **masks)[0], expected)


def test_a_transformer_layer_of_torch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.rand(2, 5, 8)
    with torch.no_grad(), record_attention(layer) as recording:
        layer(x)
    _, weights = layer.self_attn(x, x, x, average_attn_weights=False)
    assert list(recording) == ["self_attn"]
    torch.testing.assert_close(recording.only().weights, weights)


@pytest.mark.parametrize("scaled", [False, True])
def test_attention_of_timm(scaled):
    """What the module makes of its softmax, found by giving it values that spell the weights out."""
    non_local = NonLocalAttn(16, use_scale=scaled).eval()
    bottleneck = BottleneckAttn(16, feat_size=(3, 5), num_heads=2, scale_pos_embed=scaled).eval()
    x = torch.rand(2, 16, 3, 5)
    with torch.no_grad(), record_attention(non_local) as first, record_attention(bottleneck, [14, 2]) as second:
        non_local(x)
        bottleneck(x)
    with torch.no_grad():
        t, p = (conv(x).flatten(2).double() for conv in (non_local.t, non_local.p))
        scores = torch.einsum("bdn,bdm->bnm", t, p) * (16**-0.5 if scaled else 1.0)
        torch.testing.assert_close(first.only().weights[:, 0].double(), scores.softmax(-1), rtol=1e-5, atol=1e-7)
        assert first.only().query_size == (3, 5)
        # timm's own forward on values that are unit vectors: 8 of the 15 positions at a time
        rows = []
        for start in (0, 8):
            ones = torch.zeros(2, 8, 15)
            for channel in range(min(8, 15 - start)):
                ones[:, channel, start + channel] = 1
            values = ones.repeat(1, 2, 1).view(2, 16, 3, 5)
            whole = torch.cat([bottleneck.qkv(x)[:, :32], values], dim=1)
            twin = copy.deepcopy(bottleneck)
            twin.qkv = nn.Identity()
            rows.append(twin(whole).view(2, 2, 8, 15))
        weights = torch.cat(rows, dim=2)[:, :, :15].mT  # [B, h, N, M]
    torch.testing.assert_close(second.only().weights, weights[:, :, [14, 2]], rtol=1e-5, atol=1e-7)
