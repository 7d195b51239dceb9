"""Attention made uniform or given another image's keys, against weights and outputs worked out by hand."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from block_forms import ATTENDING, Case, contributing, cores, swept
from hosts import HOSTS, assert_unchanged, open_gates, snapshot
from torch import Tensor, nn

from sagan_attn import fuse, graft
from sagan_attn.blocks import MultiHeadAttention2d
from sagan_attn.blocks.base import MapAttention
from sagan_attn.errors import GraftError
from sagan_attn.surgery import foreign_keys, grafts_of, uniform_attention

INTERVENTIONS = [uniform_attention, foreign_keys]
SHAPE = (3, 8, 5, 4)
FEW = [case for case in ATTENDING if case.id in ("sagan", "biggan", "botnet", "nonlocal dot product", "decoder")]


def grafted(case: Case, **more) -> tuple[nn.Module, nn.Module]:
    """A model of one 1x1 convolution and a grafted block that does something, in float64; and the block."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(8, 8, 1))
    options = {**case.options, "dropout": 0.0} if "dropout" in case.options else case.options
    gate = None if case.identity else True
    (one,) = graft(model, "0", case.name, options={**options, **more}, gate=gate, example_input=torch.zeros(SHAPE))
    contributing(one.block)
    return model.double().eval(), one.block


def maps() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def with_weights(core: MapAttention, x: Tensor, weights: Tensor) -> Tensor:
    """The branch of an attention whose weights are these [B, h, N, M]."""
    value = core._keys_of(core.value, x, None).flatten(2).unflatten(1, (core.heads, -1))  # [B, h, D, M]
    rows = torch.einsum("bhnm,bhdm->bhdn", weights, value).flatten(1, 2).unflatten(2, x.shape[2:])
    return rows if core.output is None else core.output(rows)


@pytest.mark.parametrize("case", swept(ATTENDING))
def test_uniform_weights(case: Case):
    model, block = grafted(case)
    x = maps()
    found = [(core.attention_weights(x).sum(-1, keepdim=True), core.branch(x)) for core in cores(block)]
    before, output = snapshot(model), model(x)
    with uniform_attention(model) as count:
        assert count == len(cores(block))
        for core, (sums, branch) in zip(cores(block), found, strict=True):
            weights = core.attention_weights(x)
            even = sums / weights.shape[-1]
            assert (weights - even).abs().max() < 1e-12
            if case.softmax:
                torch.testing.assert_close(sums, torch.ones_like(sums))
            some = core.attention_weights(x, torch.tensor([7, 0]))
            torch.testing.assert_close(some, weights[:, :, [7, 0]], rtol=1e-12, atol=1e-15)
            expected = with_weights(core, x, even.expand_as(weights))
            torch.testing.assert_close(core.branch(x), expected, rtol=1e-10, atol=1e-12)
            assert (core.branch(x) - branch).abs().max() > 1e-4
        assert (model(x) - output).abs().max() > 1e-5
    assert_unchanged(model, before)
    assert torch.equal(model(x), output)
    single = copy.deepcopy(model).float()
    with uniform_attention(single):
        for core, (sums, _) in zip(cores(single), found, strict=True):
            weights = core.attention_weights(x.float())
            torch.testing.assert_close(
                weights.double(), (sums / weights.shape[-1]).expand_as(weights), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("case", swept(ATTENDING))
def test_keys_of_the_next_image(case: Case):
    model, block = grafted(case)
    x = maps()
    following = x[[1, 2, 0]]
    found = [(core.attention_weights(x, context=following), core.branch(x)) for core in cores(block)]
    before, output = snapshot(model), model(x)
    with foreign_keys(model) as count:
        assert count == len(cores(block))
        for core, (expected, branch) in zip(cores(block), found, strict=True):
            torch.testing.assert_close(core.attention_weights(x), expected, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(core.branch(x), with_weights(core, x, expected), rtol=1e-10, atol=1e-12)
            assert (core.branch(x) - branch).abs().max() > 1e-4
        assert (model(x) - output).abs().max() > 1e-6
    assert_unchanged(model, before)
    assert torch.equal(model(x), output)


def test_formulas_of_whole_models():
    by_name = {case.id: case for case in ATTENDING}
    x = maps()
    model, block = grafted(by_name["sagan"])
    at = model[0].weight[:, :, 0, 0] @ x.flatten(2) + model[0].bias[:, None]  # [B, C, N]
    value = block.value.weight[:, :, 0, 0] @ at + block.value.bias[:, None]
    expected = at + block.gamma * value.mean(dim=2, keepdim=True)
    with uniform_attention(model):
        torch.testing.assert_close(model(x).flatten(2), expected, rtol=1e-12, atol=1e-12)
    query, key = (conv.weight[:, :, 0, 0] @ at + conv.bias[:, None] for conv in (block.query, block.key))
    weights = torch.einsum("bci,bcj->bij", query, key.roll(-1, dims=0)).softmax(dim=2)
    with foreign_keys(model):
        torch.testing.assert_close(
            model(x).flatten(2), at + block.gamma * torch.einsum("bij,bcj->bci", weights, value), rtol=1e-10, atol=1e-12
        )

    model, block = grafted(by_name["biggan"])
    value, output = (  # their norms are tracked, and eval mode uses the vectors as they are
        conv.weight[:, :, 0, 0] / (conv.weight_u @ conv.weight[:, :, 0, 0] @ conv.weight_v)
        for conv in (block.value, block.output)
    )
    at = model[0].weight[:, :, 0, 0] @ x.flatten(2) + model[0].bias[:, None]
    pooled = F.max_pool2d((value @ at).unflatten(2, x.shape[2:]), 2, ceil_mode=True).flatten(2)
    expected = at + block.gamma * (output @ pooled.mean(dim=2, keepdim=True))
    with uniform_attention(model):
        torch.testing.assert_close(model(x).flatten(2), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", swept(ATTENDING))
def test_masked_keys_stay_masked(case: Case):
    x, mask = maps(), torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[1] = False
    host, block = grafted(case)
    for core in cores(block):
        free = core.attention_weights(x, mask=mask)
        allowed = _allowed(core, mask)[:, None, None].expand_as(free)
        sums, counts = free.sum(-1, keepdim=True), allowed.sum(-1, keepdim=True).clamp(min=1)
        of_next = core.attention_weights(x, context=x[[1, 2, 0]], mask=mask)
        with uniform_attention(host):
            weights = core.attention_weights(x, mask=mask)
            assert not weights[~allowed].any()
            torch.testing.assert_close(weights, (sums / counts) * allowed, rtol=1e-10, atol=1e-14)
            assert not core.branch(x, mask=mask)[1].isnan().any()
        with foreign_keys(host):
            weights = core.attention_weights(x, mask=mask)
            assert not weights[~allowed].any()
            if core.pool == 1:  # pooling is over the masked positions of the image that the keys are of
                torch.testing.assert_close(weights, of_next, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", swept(ATTENDING))
def test_one_key_alone_leaves_nothing_to_choose(case: Case):
    model, _ = grafted(case)
    x = torch.randn(3, 8, 1, 1, dtype=torch.float64)
    before = model(x)
    for intervention in INTERVENTIONS if case.softmax else [uniform_attention]:
        with intervention(model):
            torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_empty_maps_and_batches():
    for case in FEW:
        model, block = grafted(case)
        for shape in [(0, 8, 4, 4), (2, 8, 0, 3)]:
            for intervention in INTERVENTIONS:
                with intervention(model):
                    assert block(torch.randn(shape, dtype=torch.float64)).shape == shape


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_a_context_of_another_size(intervention):
    host = nn.Sequential(nn.Conv2d(8, 8, 1))
    (one,) = graft(host, "0", "cross", example_input=torch.zeros(SHAPE))
    block, x, context = contributing(one.block), torch.randn(SHAPE), torch.randn(3, 8, 2, 3)
    expected = block.attention_weights(x, context=context[[1, 2, 0]])
    with intervention(host):
        weights = block.attention_weights(x, context=context)
    assert weights.shape == (3, 4, 20, 6)
    if intervention is uniform_attention:
        expected = torch.full_like(weights, 1 / 6)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("intervention", INTERVENTIONS)
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.slow
def test_compiled_models_follow(case: Case, intervention):
    model, _ = grafted(case)
    x = maps()
    torch._dynamo.reset()
    for compiled in (torch.compile(model, backend="eager", fullgraph=True), _compiled_in_place(model)):
        before = compiled(x)
        with intervention(model):
            inside = compiled(x)
            torch.testing.assert_close(inside, model.forward(x), rtol=1e-12, atol=1e-12)
            assert (inside - before).abs().max() > 1e-6
        assert torch.equal(compiled(x), before)
        with intervention(compiled):
            assert torch.equal(compiled(x), inside)


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager", fullgraph=True)
    return model


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_fused_models_follow(intervention):
    for case in FEW:
        model, _ = grafted(case)
        fused = fuse(model)
        with intervention(model) as count, intervention(fused) as of_fused:
            assert count == of_fused
            torch.testing.assert_close(fused(maps()), model(maps()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_after_an_error_all_is_as_before(intervention):
    model = HOSTS["tiny"].build()
    open_gates(graft(model, {"stage": "sagan", "top": "decoder"}, example_input=HOSTS["tiny"].images(1)))
    images = HOSTS["tiny"].images()
    before, output = snapshot(model), model(images)
    with pytest.raises(KeyError), intervention(model) as count:  # noqa: PT012
        assert count == 3
        assert not torch.equal(model(images), output)
        raise KeyError
    assert_unchanged(model, before)
    assert torch.equal(model(images), output)


def test_a_gate_around_attention():
    model = HOSTS["tiny"].build()
    at = {"top": {"block": MultiHeadAttention2d, "gate": True, "zero_init": False}}
    open_gates(graft(model, at, example_input=HOSTS["tiny"].images(1)))
    images = HOSTS["tiny"].images()
    before = model(images)
    for intervention in INTERVENTIONS:
        with intervention(model) as count:
            assert count == 1
            assert not torch.equal(model(images), before)


def test_copies_made_inside_have_none():
    model, _ = grafted(FEW[0])
    x = maps()
    before = model(x)
    stored = io.BytesIO()
    with uniform_attention(model):
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        torch.save(model, stored)
        assert not torch.equal(model(x), before)
    stored.seek(0)
    for other in (*others, torch.load(stored, weights_only=False)):
        assert torch.equal(other(x), before)


def test_the_inner_of_two_counts():
    model, _ = grafted(FEW[0])
    x, results = maps(), []
    for intervention in INTERVENTIONS:
        with intervention(model):
            results.append(model(x))
    uniform, foreign = results
    with uniform_attention(model):
        with foreign_keys(model):
            assert torch.equal(model(x), foreign)
        assert torch.equal(model(x), uniform)
        with uniform_attention(model):
            assert torch.equal(model(x), uniform)
        assert torch.equal(model(x), uniform)


def test_refusals():
    model = HOSTS["tiny"].build()
    for intervention in INTERVENTIONS:
        with pytest.raises(GraftError, match="Tiny has no grafted attention"), intervention(model):
            pass
    graft(model, {"top": "identity", "stage": "context-max"}, example_input=HOSTS["tiny"].images(1))
    for intervention in INTERVENTIONS:
        with pytest.raises(GraftError, match="Tiny has no grafted attention"), intervention(model):
            pass
    model, _ = grafted(FEW[0])
    before = snapshot(model)
    with pytest.raises(GraftError, match="a batch of two images or more, not of one"), foreign_keys(model):
        model(maps()[:1])
    assert_unchanged(model, before)
    with uniform_attention(model):
        model(maps()[:1])


def test_a_shared_block_counts_once():
    model = HOSTS["tiny"].build()
    graft(model, {("stage.0", "stage.1"): "sagan"}, example_input=HOSTS["tiny"].images(1))
    assert len(grafts_of(model)) == 2
    blocks = {graft.block for graft in grafts_of(model)}
    with uniform_attention(model) as count:
        assert count == len(blocks)


def _allowed(core: MapAttention, mask: Tensor) -> Tensor:
    """Which keys [B, M] a mask [B, H, W] leaves, after pooling."""
    ones = mask[:, None].double()
    if core.pool > 1:
        ones = F.max_pool2d(ones, core.pool, ceil_mode=core.pool_ceil)
    return ones.flatten(1) > 0
