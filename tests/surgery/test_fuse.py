"""Fused copies compute what the trained model does, from fewer numbers."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from block_forms import CASES, Case, cases
from hosts import HOSTS, assert_same, assert_unchanged, open_gates, rng_states, snapshot
from timm.layers import SEModule
from torch import Tensor, nn

from sagan_attn import graft, grafts_of, is_grafted
from sagan_attn.blocks import CrossAttention2d, GlobalContext2d, MultiHeadAttention2d, SelfAttention2d
from sagan_attn.blocks.base import MapAttention
from sagan_attn.blocks.fused import FusedAttention2d
from sagan_attn.blocks.pointwise import SpectralPointwise
from sagan_attn.errors import BlockError, GraftError
from sagan_attn.surgery.fuse import fuse
from sagan_attn.surgery.heads import prune_heads

HOST = HOSTS["tiny"]
IMAGE = torch.zeros(1, 3, 32, 32)


def with_block(block: nn.Module) -> nn.Module:
    """A host of 8 channels with that block as it is."""
    model = HOST.build()
    graft(model, "stage", block=lambda channels: block, gate=False, name="one", example_input=IMAGE)
    return model


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_blocks_compute_the_same(case: Case):
    block = case.opened()
    fused = grafts_of(fuse(with_block(block)))[0].block
    found = [type(m) for m in fused.modules() if isinstance(m, MapAttention)]
    assert set(found) == ({FusedAttention2d} if case.attends else set())
    for shape in ((2, 8, 6, 5), (1, 8, 7, 7), (2, 8, 1, 1), (0, 8, 4, 4), (2, 8, 0, 3)):
        x = torch.randn(shape)
        close(fused(x), block(x), 1e-5)
        close(copy.deepcopy(fused).double()(x.double()), copy.deepcopy(block).double()(x.double()), 1e-6)
    last = torch.randn(2, 8, 5, 4).to(memory_format=torch.channels_last)
    close(fused(last), block(last), 1e-5)
    if case.attends:
        mask = torch.ones(2, 5, 4, dtype=torch.bool)
        mask[0, :, 2:] = False
        hidden = {"mask": mask}
        expected = block(last, **case.masks(mask))
        close(fused(last, **(case.masks(mask) if case.name == "decoder" else hidden)), expected, 1e-5)
        assert fused.attention_shape(5, 4) == block.attention_shape(5, 4)
        torch.testing.assert_close(fused.attention_weights(last), block.attention_weights(last))


@pytest.mark.parametrize("case", cases("sagan", "biggan", "nonlocal", "nonlocal-caffe2", "botnet", "decoder"), ids=str)
def test_exact_in_float64_from_float64(case: Case):
    block = case.opened()
    fused = grafts_of(fuse(with_block(block).double()))[0].block
    x = torch.randn(2, 8, 6, 5).double()
    close(fused(x), block(x), 1e-13)


@pytest.mark.parametrize("gamma", [-0.5, 0.5])
@pytest.mark.parametrize(("pool", "value_reduction"), [(1, None), (2, None), (2, 2)])
def test_signs_of_gamma(gamma: float, pool: int, value_reduction: int | None):
    block = SelfAttention2d(8, pool=pool, value_reduction=value_reduction, gamma_init=gamma).eval()
    fused = FusedAttention2d(block)
    x = torch.randn(2, 8, 5, 5)
    close(fused(x), block(x), 1e-6)
    assert fused.sign == (-1 if gamma < 0 and pool == 2 and value_reduction is None else 1)


def test_what_is_folded():
    block = SelfAttention2d(16, spectral_norm=True, gamma_init=0.5).eval()
    fused = FusedAttention2d(block)
    (conv,) = fused.projections.values()
    assert list(fused.state_dict()) == ["projections.map.weight", "projections.map.bias"]
    assert conv.weight.shape == (2 + 2 + 16, 16, 1, 1)
    assert not conv.bias[2:4].count_nonzero()  # of the keys
    value = block.value.weight.flatten(1)
    estimate = block.value.weight_u @ value @ block.value.weight_v
    torch.testing.assert_close(conv.weight[4:].flatten(1), 0.5 * value / estimate)
    torch.testing.assert_close(conv.bias[4:], 0.5 * block.value.bias)
    assert not any(isinstance(m, SpectralPointwise) for m in fused.modules())
    assert not any(p.requires_grad for p in fused.parameters())
    names = {case.id: list(FusedAttention2d(case.opened()).state_dict()) for case in CASES if case.name == "nonlocal"}
    assert names["nonlocal gaussian"] == [
        "output.weight",
        "output.bias",
        "projections.map.weight",
        "projections.map.bias",
    ]
    assert names["nonlocal concatenation pooled"][3:] == [f"projections.map.{p}" for p in ("weight", "bias")] + [
        f"projections.pooled.{p}" for p in ("weight", "bias")
    ]
    for name, keep in (("nonlocal", 0), ("nonlocal dot product", 4), ("nonlocal concatenation", 4)):
        bias = FusedAttention2d(cases(name)[0].opened()).projections["map"].bias
        assert bias[4:8].count_nonzero() == keep, name


@pytest.mark.parametrize(
    "at",
    [
        {"stage": "sagan", "top": "biggan"},
        {"stage": "nonlocal", "top": "nonlocal-mmcv"},
        {"stage": {"block": "multihead", "zero_init": True}, "top": "encoder"},
        {"stage": {"block": "sagan", "gate": None, "gamma_init": 0.0}, "down": "context-max", "top": "decoder"},
        {"stage": {"block": SEModule, "gate": True}, "top": {"block": CrossAttention2d, "gate": None}},
    ],
)
def test_fresh_grafts_vanish(at):
    model, images = HOST.build(), HOST.images()
    expected = model(images)
    graft(model, at, example_input=IMAGE)
    fused = fuse(model)
    assert not is_grafted(fused)
    assert_same(fused(images), expected)
    assert list(fused.state_dict()) == list(HOST.build().state_dict())
    assert len(grafts_of(model)) == len(at)


def test_only_those_that_do_something_stay_and_keep_order_and_name():
    model = HOST.build()
    for name in ("one", "two", "three"):
        graft(model, "stage", name=name, example_input=IMAGE)
    open_gates(grafts_of(model)[::2])
    fused = fuse(model)
    assert [g.path for g in grafts_of(fused)] == ["stage.1.grafts.one", "stage.1.grafts.three"]
    close(fused(HOST.images()), model(HOST.images()), 1e-5)
    with grafts_of(fused).disabled():
        assert_same(fused(HOST.images()), HOST.build()(HOST.images()))
    again = fuse(fused)
    assert_same(again(HOST.images()), fused(HOST.images()))


class Own(SelfAttention2d):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) + 1


def test_what_is_not_known_stays_as_it_is():
    hooked = SelfAttention2d(8, gamma_init=1.0)
    hooked.value.register_forward_hook(lambda module, args, output: output * 2)
    swapped = MultiHeadAttention2d(8, zero_init=False)
    swapped.query = nn.Conv2d(8, 8, 1)
    parametrized = SelfAttention2d(8, gamma_init=1.0)
    nn.utils.parametrizations.weight_norm(parametrized.value)
    for block in (Own(8), hooked, swapped, parametrized, GlobalContext2d(8, gamma_init=1.0), nn.Conv2d(8, 8, 1)):
        model = with_block(block.eval())
        fused = fuse(model)
        assert type(grafts_of(fused)[0].block) is type(block)
        assert_same(fused(HOST.images()), model(HOST.images()))


def test_inside_a_gate_and_at_two_places_and_pruned():
    model, images = HOST.build(), HOST.images()
    graft(model, "stage", block=SelfAttention2d, gate=True, options={"gamma_init": 1.0}, example_input=IMAGE)
    shared = MultiHeadAttention2d(8, zero_init=False)
    graft(model, ["stage.0", "stage.1"], block=lambda c: shared, name="s", gate=False, example_input=IMAGE)
    graft(model, "top", block="multihead", example_input=IMAGE)
    open_gates(grafts_of(model))
    prune_heads(model, {"top": [0, 3]})
    fused = fuse(model)
    close(fused(images), model(images), 1e-5)
    by_path = {g.path: g.block for g in grafts_of(fused)}
    assert by_path["stage.0.grafts.s"] is by_path["stage.1.grafts.s"]
    assert isinstance(by_path["stage.1.grafts.selfattention2d"].block, FusedAttention2d)
    assert by_path["top.grafts.multihead"].heads == 2
    with pytest.raises(GraftError, match="is a FusedAttention2d: it has no heads to remove"):
        prune_heads(fused, {"top": [0]})


def test_the_original_is_untouched():
    model = HOST.build().train()
    open_gates(graft(model, {"stage": "biggan", "top": "encoder"}, example_input=IMAGE))
    before, rng = snapshot(model), rng_states()
    fused = fuse(model)
    assert_unchanged(model, before)
    assert rng_states() == rng
    assert not any(m.training for m in fused.modules())
    own = {t.data_ptr() for t in model.state_dict().values()}
    assert not own & {t.data_ptr() for t in fused.state_dict().values()}


def test_refusals():
    with pytest.raises(GraftError, match="Tiny has no grafts to fuse"):
        fuse(HOST.build())
    with pytest.raises(BlockError, match=r"context_channels \(4\) of their own"):
        FusedAttention2d(CrossAttention2d(8, 4))
    block = cases("nonlocal")[0].opened()
    block.norm.running_mean = block.norm.running_var = None
    with pytest.raises(BlockError, match="without running statistics"):
        FusedAttention2d(block)
    fused = FusedAttention2d(SelfAttention2d(8))
    with pytest.raises(BlockError, match="context must be None"):
        fused.branch(torch.randn(1, 8, 2, 2), torch.randn(1, 8, 2, 2))
    with pytest.raises(BlockError, match=r"a map \[B, 8, H, W\] is required"):
        fused(torch.randn(1, 4, 2, 2))


AT = {"layer2": "nonlocal", "layer3": {"block": "sagan", "gate": None}, "layer4": "biggan"}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_pretrained_host(dtype: torch.dtype):
    host = HOSTS["timm-resnet18"]
    model = host.build()
    open_gates(graft(model, AT, example_input=host.images(1)), 0.3)
    for layout in (torch.contiguous_format, torch.channels_last):
        images = host.images().to(dtype, memory_format=layout)
        fused = fuse(model.to(dtype, memory_format=layout))
        close(fused(images), model(images), 1e-5 if dtype == torch.float32 else 0.05)
        assert {t.dtype for t in fused.parameters()} == {dtype}
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in model.parameters())
    assert [g.path for g in grafts_of(fused)] == [g.path for g in grafts_of(model)]


def test_half_layouts_of_channels_last_hosts():
    host = HOSTS["convnext"]
    model, images = host.build(), host.images()
    open_gates(graft(model, list(host.sites), example_input=images))
    close(fuse(model)(images), model(images), 1e-5)


AUTO = torch.export.Dim.AUTO
SHAPES = ({0: AUTO, 2: AUTO, 3: AUTO},)


@pytest.mark.slow
def test_compiles_exports_and_copies():
    model, images = HOST.build(), HOST.images()
    at = {"stage": {"block": "sagan", "pool": 2}, "top": "nonlocal-caffe2"}
    grafts = graft(model, at, example_input=IMAGE)
    open_gates(grafts)
    grafts[0].block.gamma.data.neg_()
    fused = fuse(model)
    expected = fused(images)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.fx.symbolic_trace(fused)):
        assert_same(other(images), expected)
    torch.compiler.reset()
    assert_same(torch.compile(fused, fullgraph=True, backend="eager")(images), expected)
    exported = torch.export.export(fused, (images,), dynamic_shapes=SHAPES).module()
    for shape in [tuple(images.shape), (3, 3, 64, 96), (1, 3, 40, 72)]:
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), fused(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # exports of runs are tested fast
@pytest.mark.parametrize("case", cases("sagan", "nonlocal-caffe2", "botnet", "encoder", "additive"), ids=str)
@pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn about themselves
def test_onnx(case: Case, tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    fused = grafts_of(fuse(with_block(case.opened())))[0].block
    path = str(tmp_path / "block.onnx")
    torch.onnx.export(fused, (torch.randn(2, 8, 6, 5),), path, dynamo=True, dynamic_shapes=SHAPES, verbose=False)
    session = ort.InferenceSession(path)
    for shape in [(2, 8, 6, 5), (3, 8, 9, 4)]:
        x = torch.randn(shape)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), fused(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn about themselves
def test_a_whole_fused_model_runs_in_onnx_runtime_as_the_unfused_one_did(tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    host = HOSTS["tv-resnet18"]
    model, images = host.build(), host.images()
    open_gates(graft(model, {"layer2": "nonlocal", "layer3": {"block": "sagan", "pool": 2}}, example_input=images), 0.5)
    before, expected = snapshot(model), model(images)
    fused, path = fuse(model), str(tmp_path / "model.onnx")
    torch.onnx.export(copy.deepcopy(fused), (images,), path, dynamo=True, dynamic_shapes=SHAPES, verbose=False)
    session = ort.InferenceSession(path)
    for x in (images, torch.randn(3, 3, 64, 96)):
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        close(torch.from_numpy(output), model(x).detach(), 1e-4)
    assert_same(pickle.loads(pickle.dumps(fused))(images), fused(images))
    assert_unchanged(model, before)
    assert_same(model(images), expected)
