"""Pruned heads against heads set to 0 in an independent computation, importance against single gradients."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS, Tiny, assert_unchanged, open_gates, rng_states, snapshot
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sagan_attn import graft, grafts_of
from sagan_attn.blocks import CrossAttention2d, MultiHeadAttention2d, SelfAttention2d
from sagan_attn.blocks.base import MapAttention
from sagan_attn.errors import GraftError
from sagan_attn.surgery.heads import prune_heads
from sagan_attn.surgery.importance import head_importance

HOST = HOSTS["tiny"]
IMAGE = torch.zeros(1, 3, 32, 32)
FORMS = {
    "multihead": {"block": "multihead"},
    "bias": {"block": "multihead", "bias": True, "heads": 8},
    "relative": {"block": "multihead", "position": "relative", "position_size": 3},
    "sinusoidal": {"block": "multihead", "position": "sinusoidal"},
    "additive": {"block": "additive", "heads": 2, "reduction": 1, "bias": True},
    "cross": {"block": "cross"},
    "sagan": {"block": "sagan", "heads": 4, "reduction": 2, "value_reduction": 1, "pool": 2},
    "botnet": {"block": "botnet", "value_reduction": 1},
    "chunked": {"block": "multihead", "path": "chunked"},
    "gated": {"block": MultiHeadAttention2d, "gate": True, "zero_init": False},
    "encoder": {"block": "encoder"},
}


def grafted(at, host: str = "tiny"):
    model = HOSTS[host].build()
    open_gates(graft(model, at, example_input=HOSTS[host].images(1)))
    return model


def core(model: nn.Module, number: int = 0) -> MapAttention:
    return [m for m in model.modules() if isinstance(m, MapAttention)][number]


def without_heads(model: nn.Module, attention: MapAttention, heads: list[int], images: Tensor) -> Tensor:
    """The model's output with these heads' part of what `output` takes set to 0, channel by channel."""
    size = attention.output.in_channels // attention.heads
    mask = torch.ones(attention.output.in_channels, dtype=images.dtype)
    for head in heads:
        mask[head * size : (head + 1) * size] = 0
    reference = copy.deepcopy(model)
    twin = dict(reference.named_modules())[{m: n for n, m in model.named_modules()}[attention]]
    twin.output.register_forward_pre_hook(lambda module, args: (torch.einsum("bchw,c->bchw", args[0], mask),))
    return reference(images)


@pytest.mark.parametrize("form", FORMS)
def test_pruned_equals_masked(form: str):
    model, images = grafted({"top": FORMS[form]}).double(), HOST.images().double()
    whole = model(images)
    attention = core(model)
    gone = [1] if attention.heads == 2 else [0, 2]
    expected = without_heads(model, attention, gone, images)
    assert (expected - whole).abs().max() > 1e-6
    kept, count = attention.heads - len(gone), sum(p.numel() for p in model.parameters())
    x = torch.randn(1, 16, 3, 3).double()
    expected_weights = attention.attention_weights(x)[:, [h for h in range(attention.heads) if h not in gone]]

    assert prune_heads(model, {"top": gone}) is None

    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention.attention_weights(x), expected_weights, rtol=1e-12, atol=1e-12)
    assert core(model) is attention
    assert attention.attention_shape(4, 4)[0] == attention.heads == kept
    assert f"heads={kept}" in repr(attention)
    assert sum(p.numel() for p in model.parameters()) < count
    inner = attention.value.out_channels
    assert attention.value.weight.shape == (inner, 16, 1, 1)
    assert attention.output.weight.shape == (16, inner, 1, 1)
    assert f"({inner}, 16" in repr(attention.output).replace("Pointwise", "")
    assert len(attention.key.weight) == attention.key.out_channels == attention.query.out_channels


@pytest.mark.parametrize("host", ["tiny", pytest.param("timm-resnet18", marks=pytest.mark.slow)])
def test_parameters_and_flops_drop_and_the_rest_still_works(host: str):
    site, images = HOSTS[host].sites[1], HOSTS[host].images()
    model = grafted({site: {"block": "multihead", "bias": True}}, host)
    fresh = grafted({site: {"block": "multihead", "bias": True}}, host)
    graft_ = grafts_of(model)[0]
    channels = graft_.block.in_channels
    expected = without_heads(model, graft_.block, [0, 1, 3], images)
    costs, counts = [], []
    for heads in ([], [0, 1, 3]):
        if heads:
            prune_heads(model, {graft_: heads})
        counts.append(sum(p.numel() for p in model.parameters()))
        with FlopCounterMode(display=False) as counter:
            model(images)
        costs.append(counter.get_total_flops())
    assert counts[0] - counts[1] == 3 * (channels // 4) * (4 * channels + 3)
    assert costs[1] < costs[0]
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in fresh.named_parameters()]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))) if host == "tiny" else (model,):
        torch.testing.assert_close(other(images), model(images), rtol=0, atol=0)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))
    model.train()(images).square().sum().backward()
    assert graft_.block.query.weight.grad.shape == graft_.block.query.weight.shape


def test_pruning_again_and_frozen_parameters_stay_frozen():
    model, images = grafted({"top": {"block": "multihead"}}).double(), HOST.images().double()
    core(model).query.weight.requires_grad_(False)
    expected = without_heads(model, core(model), [1, 2], images)
    prune_heads(model, {"top": [2]})
    prune_heads(model, {"multihead": [1]})
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)
    assert not core(model).query.weight.requires_grad
    assert core(model).value.weight.requires_grad


def test_decoder_and_several_grafts_by_every_kind_of_key():
    model = HOST.build()
    at = {"stage": {"block": "multihead", "heads": 2}, "top": "decoder"}
    grafts = graft(model, at, example_input=IMAGE)
    open_gates(grafts)
    model, images = model.double(), HOST.images().double()
    reference = copy.deepcopy(model)
    for number, mask in ((0, [0, 1]), (1, [0, 1, 1, 1]), (2, [1, 1, 0, 0])):
        attention = core(reference, number)
        size = attention.output.in_channels // attention.heads
        by_channel = torch.tensor(mask).double().repeat_interleave(size)[:, None, None]
        attention.output.register_forward_pre_hook(lambda module, args, m=by_channel: (args[0] * m,))
    expected = reference(images)
    by_part, by_path = copy.deepcopy(model), copy.deepcopy(model)
    prune_heads(by_part, {grafts_of(by_part)[0]: [0], "top": {"attention": [0], "cross": [2, 3]}})
    paths = {
        "stage.1.grafts.multihead": [0],
        "top.grafts.decoder.attention": [0],
        "top.grafts.decoder.cross": (2, 3),
    }
    prune_heads(by_path, paths)
    for pruned in (by_part, by_path):
        torch.testing.assert_close(pruned(images), expected, rtol=1e-12, atol=1e-12)
        assert [core(pruned, number).heads for number in range(3)] == [1, 3, 2]
    assert paths.keys() == head_importance(model, [(images, torch.tensor([0, 1]))]).keys()


REFUSED = [
    ({}, "heads is empty"),
    ({"topp": [0]}, "no graft has the site or path 'topp'; near names: top"),
    ({"stage": [0]}, "'stage' means several grafts; choose one by its path: stage.1.grafts.sagan, stage.1.grafts.b"),
    ({"down": [0]}, "graft 'context_max' at 'down' is a GlobalContext2d: it has no heads to remove"),
    ({"multihead": [4]}, r"head 4 of '\S+multihead' must be a whole number from 0 to 3"),
    ({"multihead": [-1]}, "head -1 of"),
    ({"multihead": [True]}, "head True of"),
    ({"multihead": [1.0]}, "head 1.0 of"),
    ({"multihead": "01"}, "must be a list of whole numbers"),
    ({"multihead": 1}, "must be a list of whole numbers"),
    ({"multihead": [1, 1]}, "name one twice"),
    ({"multihead": []}, "is empty: name at least one head"),
    ({"multihead": [0, 1, 2, 3]}, "has 4 heads, and all would go: take the whole graft out with ungraft"),
    ({"multihead": [0], "top.grafts.multihead": [1]}, "is named twice"),
    ({"stage.1.grafts.sagan": [0]}, "no output convolution.*value_reduction=1"),
    ({"stage.1.grafts.b": [0]}, "spectral norms.*spectral_norm=False"),
    ({"decoder": [0]}, r"has several attentions: pass \{'attention': \[...\], 'cross': \[...\]\}"),
    ({"decoder": {"self": [0]}}, "has no attention 'self'; it has 'attention', 'cross'"),
    ({"nonlocal_": [0]}, "has 1 heads, and all would go"),
    ({"odd": [0]}, r"its convolutions \(Conv2d, Pointwise, Pointwise, Pointwise\) are not plain ones"),
]


def odd(channels: int) -> nn.Module:
    block = CrossAttention2d(channels)
    block.query = nn.Conv2d(channels, channels, 1)
    return block


@pytest.fixture(scope="module")
def every_kind():
    model = HOST.build()
    graft(model, "stage", options={"heads": 2, "reduction": 1}, example_input=IMAGE)
    options = {"heads": 2, "reduction": 1, "value_reduction": 1, "spectral_norm": True}
    graft(model, "stage", name="b", options=options, example_input=IMAGE)
    graft(model, {"down": "context-max", "top": "multihead"}, example_input=IMAGE)
    graft(model, "top", block="decoder", example_input=IMAGE)
    graft(model, "top", block="nonlocal", example_input=IMAGE)
    graft(model, "top", block=odd, example_input=IMAGE)
    return model


@pytest.mark.parametrize(("heads", "message"), REFUSED)
def test_refusals_change_nothing(every_kind, heads, message: str):
    before = snapshot(every_kind)
    for asked in (heads, {"decoder": {"cross": [0]}, **heads}) if heads and "decoder" not in heads else (heads,):
        with pytest.raises(GraftError, match=message):
            prune_heads(every_kind, asked)
        assert_unchanged(every_kind, before)


def test_a_graft_of_another_model_is_refused(every_kind):
    with pytest.raises(GraftError, match="graft 'multihead' at 'top' is not in this model"):
        prune_heads(grafted({"top": "multihead"}), {grafts_of(every_kind)[3]: [0]})


# Importance


def two_grafts(**options):
    at = {"stage": {"block": "sagan", "heads": 2, "reduction": 1, **options}, "top": {"block": "multihead"}}
    return grafted(at).double()


BATCHES = [
    (torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)).double(), torch.tensor([0, 3, 1])),
    (torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5)).double(), torch.tensor([4])),
]


def head_outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and of each attention the output of its heads, [B, h, D, H, W], by einsum of weights and values."""
    outputs = []

    def replace(attention, x):
        weights = attention.attention_weights(x)
        pooled = F.max_pool2d(attention.value(x), attention.pool, ceil_mode=True)
        value = pooled.flatten(2).unflatten(1, (attention.heads, -1))  # [B, h, D, M]
        own = torch.einsum("bhnm,bhdm->bhdn", weights, value).unflatten(3, x.shape[2:])
        own.retain_grad()
        outputs.append(own)
        branch = own.flatten(1, 2)
        return x + (attention.gamma * branch if attention.output is None else attention.output(branch))

    model = copy.deepcopy(model)
    for attention in [m for m in model.modules() if isinstance(m, MapAttention)]:
        attention.forward = lambda x, attention=attention: replace(attention, x)
    return model(images), outputs


@pytest.mark.parametrize("options", [{}, {"pool": 2}])
def test_gradient_importance_is_that_of_single_samples(options: dict):
    model = two_grafts(**options)
    sums: list = [0, 0]
    for images, labels in BATCHES:
        for image, label in zip(images, labels, strict=True):
            logits, outputs = head_outputs(model, image[None])
            F.cross_entropy(logits, label[None]).backward()
            for number, own in enumerate(outputs):  # |<Att_h, dL/dAtt_h>|, the second form of Michel et al.
                sums[number] = sums[number] + torch.einsum("bhdyx,bhdyx->h", own, own.grad).abs()
    found = head_importance(model, BATCHES)
    assert list(found) == ["stage.1.grafts.sagan", "top.grafts.multihead"]
    for importance, total in zip(found.values(), sums, strict=True):
        assert importance.dtype == torch.float32
        torch.testing.assert_close(importance, (total / total.norm()).float().detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [None, lambda logits, labels: (logits - labels[:, None]).square().sum(1)])
def test_leaving_one_out_is_the_loss_without_the_head(loss):
    model = two_grafts(value_reduction=1)
    own = loss or (lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"))
    found = head_importance(model, iter(BATCHES), "leave_one_out", loss)
    for number, importance in enumerate(found.values()):
        for head, value in enumerate(importance):
            grown = 0.0
            for images, labels in BATCHES:
                masked = without_heads(model, core(model, number), [head], images)
                grown += (own(masked, labels) - own(model(images), labels)).sum().item() / 4
            assert float(value) == pytest.approx(grown, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("method", ["gradient", "leave_one_out"])
def test_importance_leaves_the_model_alone(method):
    model = two_grafts()
    model.top.add_module("dropout", nn.Dropout())
    model.train()
    model.stem.eval()
    model(BATCHES[0][0]).sum().backward()
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad.clone()
    before, grads, rng = snapshot(model), {n: (p.grad, p.grad.clone()) for n, p in graded(model)}, rng_states()
    head_importance(model, BATCHES, method)
    with pytest.raises(ZeroDivisionError):
        head_importance(model, BATCHES, method, loss=lambda logits, labels: 1 / 0)
    with torch.no_grad():
        head_importance(model, BATCHES, method)
    assert_unchanged(model, before)
    assert rng_states() == rng
    assert grads.keys() == dict(graded(model)).keys()
    for name, p in graded(model):
        assert p.grad is grads[name][0]
        assert torch.equal(p.grad, grads[name][1])


def graded(model: nn.Module):
    return [(name, p) for name, p in model.named_parameters() if p.grad is not None]


def test_closed_gates_frozen_models_and_a_pretrained_host():
    host = HOSTS["timm-resnet18"]
    model = host.build()
    graft(model, {"layer3.0": {"block": "botnet"}, "layer4": "encoder"}, example_input=host.images(1))
    model.requires_grad_(False)
    batches = [(host.images(2), torch.tensor([1, 2]))]
    found = head_importance(model, batches)
    assert [v.tolist() for v in found.values()] == [[0, 0, 0, 0]] * 2
    open_gates(grafts_of(model))
    found = head_importance(model, batches)
    assert list(found) == ["layer3.0.grafts.botnet", "layer4.1.grafts.encoder.attention"]
    assert all(float(v.norm()) == pytest.approx(1) for v in found.values())
    weakest = {path: [int(v.argmin())] for path, v in found.items() if "encoder" in path}
    prune_heads(model, weakest)
    assert [len(v) for v in head_importance(model, batches).values()] == [4, 3]


class Twice(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x]))[: len(x)]


def test_importance_refusals():
    model = two_grafts()
    with pytest.raises(GraftError, match=re.escape("method ('michel') must be 'gradient' or 'leave_one_out'")):
        head_importance(model, BATCHES, "michel")
    with pytest.raises(GraftError, match="Tiny has no grafted attention"):
        head_importance(HOST.build(), BATCHES)
    with pytest.raises(GraftError, match="batches is empty"):
        head_importance(model, [])
    with pytest.raises(GraftError, match=r"loss gave shape \(\) for 3 images; .*reduction='none'"):
        head_importance(model, BATCHES, loss=F.cross_entropy)
    with pytest.raises(GraftError, match="loss gave a float"):
        head_importance(model, BATCHES, loss=lambda logits, labels: 1.0)
    for method in ("gradient", "leave_one_out"):
        with (
            grafts_of(model)[:1].disabled(),
            pytest.raises(GraftError, match=r"attention of stage\S+ did not run: the graft is disabled"),
        ):
            head_importance(model, BATCHES, method)
    twice = Twice().eval()
    graft(twice, "top", block=SelfAttention2d, example_input=IMAGE)
    with pytest.raises(GraftError, match="gets 6 maps for 3 images"):
        head_importance(twice.double(), BATCHES)
