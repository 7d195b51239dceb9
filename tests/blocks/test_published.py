"""Forms against the real classes of timm and torch with the same weights, and what the papers' codes start with."""

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from references import fill
from timm.layers import NonLocalAttn
from timm.layers.bottleneck_attn import BottleneckAttn
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks import MultiHeadAttention, MultiHeadAttention2d, SelfAttention2d, create_block


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def random_map(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@torch.no_grad()
def load(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set parameters and buffers by name."""
    state = module.state_dict()
    for key, value in values.items():
        state[key].copy_(value.reshape(state[key].shape))


def check_gradients(ours: Tensor, theirs: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Output, and gradients of each pair of a tensor of ours and one of theirs, flattened."""
    close(ours, theirs)
    towards = torch.randn_like(ours)
    one = torch.autograd.grad(ours, [p for p, _ in pairs], towards, retain_graph=True)
    other = torch.autograd.grad(theirs, [p for _, p in pairs], towards, retain_graph=True)
    for a, b in zip(one, other, strict=True):
        close(a.flatten(), b.flatten())


# --- timm's NonLocalAttn

TIMM = {"query": "t", "key": "p", "value": "g", "output": "z", "norm": "norm"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(32, (6, 8)), (20, (5, 7)), (132, (3, 3))])
def test_timm_non_local(channels: int, size: tuple[int, int], training: bool):
    theirs = fill(NonLocalAttn(channels).double()).train(training)
    ours = create_block("nonlocal-timm", channels).double().train(training)
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in TIMM.items() for kind in ("weight", "bias")}
    statistics = {f"norm.{kind}": f"norm.{kind}" for kind in ("running_mean", "running_var")}
    state = theirs.state_dict()
    load(ours, {one: state[other] for one, other in (names | statistics).items()})
    x = random_map(2, channels, *size)
    pairs = [(ours.get_parameter(one), theirs.get_parameter(other)) for one, other in names.items()]
    check_gradients(ours(x), theirs(x), [(x, x), *pairs])
    for buffer in statistics:
        close(ours.get_buffer(buffer), theirs.get_buffer(buffer))
    assert ours.norm.num_batches_tracked == theirs.norm.num_batches_tracked == int(training)

    single = ours.float()(x.detach().float())
    torch.testing.assert_close(single, theirs.float()(x.detach().float()), rtol=1e-5, atol=3e-5)


@pytest.mark.slow
def test_timm_non_local_widths():
    for channels in [*range(1, 68), *range(68, 261, 3), 260, 512, 1000, 2048]:
        ours = create_block("nonlocal-timm", channels, device="meta")
        theirs = NonLocalAttn(channels, device="meta")
        assert ours.query.weight.shape == theirs.t.weight.shape, channels
        assert ours.value.weight.shape == theirs.g.weight.shape, channels
        assert ours.scale == pytest.approx(theirs.scale, rel=1e-15)


def test_timm_non_local_first_weights():
    torch.manual_seed(3)
    ours, theirs = create_block("nonlocal-timm", 512), NonLocalAttn(512)
    for one, other in TIMM.items():
        weights = [m.get_parameter(f"{name}.weight") for m, name in ((ours, one), (theirs, other))]
        assert weights[0].std().item() == pytest.approx(weights[1].std().item(), rel=0.03)
        assert weights[0].mean().item() == pytest.approx(0, abs=0.003)
        assert not ours.get_parameter(f"{one}.bias").any()
    assert not ours.norm.weight.any()


# --- timm's BottleneckAttn


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("heads", "size"), [(4, (6, 8)), (1, (5, 7)), (8, (4, 4)), (2, (1, 1))])
def test_timm_bottleneck_attention(heads: int, size: tuple[int, int], scaled: bool):
    theirs = fill(BottleneckAttn(32, feat_size=size, num_heads=heads, scale_pos_embed=scaled).double())
    position = "relative_scaled" if scaled else "relative"
    ours = create_block("botnet", 32, heads=heads, position=position, position_size=size, gamma_init=0.7).double()
    q, k, v = theirs.qkv.weight.chunk(3)
    tables = {"height_rel": theirs.pos_embed.height_rel, "width_rel": theirs.pos_embed.width_rel}
    load(ours, {"query.weight": q, "key.weight": k, "value.weight": v, **tables})
    x = random_map(2, 32, *size)
    output, expected = ours(x), x + ours.gamma * theirs(x)
    pairs = [(ours.get_parameter(name), table) for name, table in tables.items()]
    check_gradients(output, expected, [(x, x), (ours.gamma, ours.gamma), *pairs])
    fused = torch.autograd.grad(expected.square().sum(), theirs.qkv.weight)[0].chunk(3)
    convs = [ours.query.weight, ours.key.weight, ours.value.weight]
    for one, other in zip(torch.autograd.grad(output.square().sum(), convs), fused, strict=True):
        close(one, other)


# --- torch


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_torch_multihead_attention(heads: int, bias: bool):
    theirs = fill(nn.MultiheadAttention(16, heads, bias=bias, batch_first=True).double())
    ours = MultiHeadAttention2d(16, heads=heads, bias=bias).double()
    for kind in ("weight", "bias") if bias else ("weight",):
        q, k, v = theirs.get_parameter(f"in_proj_{kind}").chunk(3)
        out = theirs.get_parameter(f"out_proj.{kind}")
        load(ours, {f"query.{kind}": q, f"key.{kind}": k, f"value.{kind}": v, f"output.{kind}": out})
    x = random_map(2, 16, 5, 6)
    rows = x.flatten(2).transpose(1, 2)
    out, weights = theirs(rows, rows, rows, average_attn_weights=False)
    expected = x + out.transpose(1, 2).unflatten(2, (5, 6))
    check_gradients(ours(x), expected, [(x, x), (ours.output.weight, theirs.out_proj.weight)])
    close(ours.attention_weights(x), weights)
    fused = torch.autograd.grad(expected.square().sum(), theirs.in_proj_weight)[0].chunk(3)
    convs = [ours.query.weight, ours.key.weight, ours.value.weight]
    for one, other in zip(torch.autograd.grad(ours(x).square().sum(), convs), fused, strict=True):
        close(one[..., 0, 0], other)


def test_scaled_dot_product_attention():
    block = fill(create_block("multihead", 16, heads=2).double())
    x = random_map(2, 16, 4, 5)
    rows = [functional.split_heads(conv(x), 2) for conv in (block.query, block.key, block.value)]
    expected = F.conv2d(functional.merge_heads(F.scaled_dot_product_attention(*rows), x), block.output.weight)
    check_gradients(block(x), x + expected, [(x, x), *[(p, p) for p in block.parameters()]])


# --- the worked example

INPUTS = torch.tensor([[1, 0, 1, 0], [0, 2, 0, 2], [1, 1, 1, 1]], dtype=torch.float64)
MATRICES = {
    "key.weight": torch.tensor([[0, 0, 1], [1, 1, 0], [0, 1, 0], [1, 1, 0]], dtype=torch.float64).T,
    "query.weight": torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 1]], dtype=torch.float64).T,
    "value.weight": torch.tensor([[0, 2, 0], [0, 3, 0], [1, 0, 3], [1, 1, 0]], dtype=torch.float64).T,
}
OUTPUTS = torch.tensor(
    [[1.936621, 6.683105, 1.595068], [1.999994, 7.963991, 0.053976], [1.999704, 7.759892, 0.358389]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("form", ["sagan", "multihead"])
def test_worked_example_on_maps(form: str):
    """The three inputs are the positions of a 1 x 3 map; the three features come out in the first three channels."""
    shared = {"bias": False, "scale": None}
    if form == "sagan":
        # A fifth and a sixth channel of zeros make room for 3 features each: 6 // 2.
        block = SelfAttention2d(6, reduction=2, value_reduction=2, gamma_init=1.0, **shared).double()
    else:
        block = MultiHeadAttention2d(6, reduction=2, heads=1, **shared).double()
    wide = {name: F.pad(matrix, (0, 2)) for name, matrix in MATRICES.items()}
    load(block, {**wide, "output.weight": torch.eye(6, 3)})
    x = F.pad(INPUTS, (0, 2)).T.reshape(1, 6, 1, 3)
    added = (block(x) - x)[0, :, 0].T
    torch.testing.assert_close(added[:, :3], OUTPUTS, rtol=0, atol=1e-6)
    assert not added[:, 3:].any()
    scores = torch.tensor([[2, 4, 4], [4, 16, 12], [4, 12, 10]], dtype=torch.float64)
    close(block.attention_weights(x)[0, 0], scores.exp() / scores.exp().sum(dim=1, keepdim=True))


def test_worked_example_on_sequences():
    block = MultiHeadAttention(4, 4, 4, 3, 1).double()
    load(block, {**MATRICES, "query.weight": MATRICES["query.weight"] * math.sqrt(3), "output.weight": torch.eye(3)})
    output = block(INPUTS[None], INPUTS[None], INPUTS[None])
    torch.testing.assert_close(output[0], OUTPUTS, rtol=0, atol=1e-6)


# --- facts


def test_fastai_is_sagan_with_query_and_key_exchanged():
    fastai = fill(create_block("fastai", 16).double()).eval()
    sagan = create_block("sagan", 16, bias=False).double()
    sigma = {n: c.weight_u @ c.weight[:, :, 0, 0] @ c.weight_v for n, c in fastai.named_children()}
    load(sagan, {f"{n}.weight": c.weight / sigma[n] for n, c in fastai.named_children()} | {"gamma": fastai.gamma})
    x = random_map(2, 16, 4, 5)
    close(fastai(x), sagan(x))
    # As fastai has it, whose query is our key.
    f, g, h = (getattr(sagan, name)(x).flatten(2) for name in ("key", "query", "value"))
    beta = torch.bmm(f.transpose(1, 2), g).softmax(dim=1)
    close(fastai(x), sagan.gamma * torch.bmm(h, beta).view_as(x) + x)


@pytest.mark.parametrize("name", ["sagan", "multihead", "nonlocal", "nonlocal-timm"])
def test_key_bias_has_no_effect(name: str):
    block, x = fill(create_block(name, 16, bias=True).double()).eval(), random_map(2, 16, 4, 4)
    before = block(x).detach()
    with torch.no_grad():
        block.key.bias.normal_(std=3)
    close(block(x), before)
    (gradient,) = torch.autograd.grad(block(x).square().sum(), block.key.bias)
    close(gradient, torch.zeros_like(gradient))


def test_concatenation_is_the_literal_formula_without_its_tensor():
    block = fill(create_block("nonlocal", 16, mode="concatenation").double()).eval()
    x = random_map(2, 16, 5, 6)
    theta, phi = (getattr(block, name)(x).flatten(2).transpose(1, 2) for name in ("query", "key"))  # [B, N, 8]
    pairs = torch.stack([torch.cat([theta[:, i : i + 1].expand_as(phi), phi], dim=2) for i in range(30)], dim=1)
    close(block.attention_weights(x)[:, 0], (pairs @ block.score_vector[0]).relu() / 30)

    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        block(x)
    assert max(sizes) <= 2 * 30 * 30


# --- first weights

WIDE = 512


def convs(block: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in block.named_parameters() if name.endswith(".weight") and p.dim() == 4}


@pytest.mark.parametrize("name", ["nonlocal-caffe2", "nonlocal-mmcv"])
def test_normal_first_weights(name: str):
    block = create_block(name, WIDE)
    zero = ["norm.weight", "norm.bias"] if block.norm is not None else ["output.weight"]
    for key, parameter in block.named_parameters():
        if key.endswith("bias") or key in zero:
            assert not parameter.any(), key
        else:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.02), key
            assert parameter.mean().item() == pytest.approx(0, abs=2e-4), key
    with_norm = create_block("nonlocal-mmcv", WIDE, norm=True)
    assert with_norm.output.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not with_norm.norm.weight.any()


@pytest.mark.parametrize("norm", [True, False])
def test_alexhex7_first_weights_are_those_of_torch(norm: bool):
    block = create_block("nonlocal-alexhex7", WIDE, norm=norm)
    for key, weight in convs(block).items():
        bound = weight.shape[1] ** -0.5
        if key == "output.weight" and not norm:
            assert not weight.any()
            assert not block.output.bias.any()
            continue
        assert bound * 0.999 < weight.abs().max().item() <= bound, key  # uniform
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), key
        assert block.get_parameter(key.replace("weight", "bias")).std().item() == pytest.approx(
            bound / math.sqrt(3), rel=0.15
        )
    if norm:
        assert not block.norm.weight.any()
        assert not block.norm.bias.any()


def test_biggan_first_weights_and_shapes():
    block = create_block("biggan", 64)
    assert block.gamma.item() == 0
    assert {key: list(value.shape[:2]) for key, value in convs(block).items()} == {
        "query.weight": [8, 64],
        "key.weight": [8, 64],
        "value.weight": [32, 64],
        "output.weight": [64, 32],
    }
    assert not any(key.endswith("bias") for key in block.state_dict())
    for conv in (block.query, block.key, block.value, block.output):
        sigma = torch.linalg.matrix_norm(conv.weight[:, :, 0, 0], ord=2)
        estimate = conv.weight_u @ conv.weight[:, :, 0, 0] @ conv.weight_v
        assert estimate.item() == pytest.approx(sigma.item(), rel=0.05)


def test_botnet_first_weights():
    block = create_block("botnet", WIDE, position_size=64)
    assert block.gamma.item() == 0
    assert not any(key.endswith("bias") for key in block.state_dict())
    for weight in convs(block).values():
        assert weight.std().item() == pytest.approx(WIDE**-0.5, rel=0.02)
    for table in (block.height_rel, block.width_rel):
        assert table.shape == (127, WIDE // 4)
        assert table.std().item() == pytest.approx((WIDE // 4) ** -0.5, rel=0.03)
        assert table.mean().item() == pytest.approx(0, abs=0.004)
