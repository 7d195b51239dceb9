"""What a graft promises, for timm's squeeze-and-excitation, CBAM and global context behind the gate.

That the gated blocks alone keep the contract of the library's own is in `tests/blocks`, over `gated_forms.GATED`.
"""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from block_forms import SHAPES
from gated_forms import GATED, HALF, TIMM, GatedCase
from hosts import HOSTS, WIDE_HOSTS, assert_same, assert_unchanged, count_calls, open_gates, rng_states, snapshot
from torch import Tensor, fx, nn

from sagan_attn import Grafts, graft, grafts_of, is_grafted, ungraft
from sagan_attn.blocks import Gated

ANY = {**HOSTS, **WIDE_HOSTS}
BLOCKS = pytest.mark.parametrize("block", TIMM)
TINY = HOSTS["tiny"]


def gate_in(model: nn.Module, block: str, host: str = "tiny") -> Grafts:
    at, images = list(ANY[host].sites), ANY[host].images(1)
    return graft(model, at, block=TIMM[block], gate=True, options=HALF, example_input=images)


def some_hosts(*names: str) -> list:
    return [pytest.param(name, marks=[] if name in names else [pytest.mark.slow]) for name in ANY]


@BLOCKS
@pytest.mark.parametrize("host", some_hosts("tiny"))
def test_output_is_bit_identical_and_ungraft_restores_everything(host: str, block: str):
    model, images = ANY[host].build(), ANY[host].images()
    untouched, before, random = copy.deepcopy(model), snapshot(model), rng_states()
    grafts = gate_in(model, block, host)
    assert rng_states() == random
    assert all(type(g.block) is Gated for g in grafts)
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            maps = images.to(memory_format=layout)
            assert_same(model(maps), untouched(maps))
            with torch.autocast("cpu", torch.bfloat16):
                assert_same(model(maps), untouched(maps))
        assert [key for key in model.state_dict() if ".grafts." not in key] == before["keys"]
        open_gates(grafts)
        assert not torch.equal(model(images), untouched(images))
        with grafts.disabled():
            assert_same(model(images), untouched(images))
        open_gates(grafts, 0.0)
        torch.manual_seed(3)
        expected = untouched.train()(images)
        torch.manual_seed(3)
        assert_same(model.train()(images), expected)
    host_state = {key: value for key, value in model.state_dict().items() if ".grafts." not in key}
    for key, value in untouched.state_dict().items():  # batch norms of the host saw what they always see
        assert torch.equal(host_state[key], value), key
    model.eval().load_state_dict(dict(zip(before["keys"], before["values"], strict=True)), strict=True)
    ungraft(model)
    assert_unchanged(model, before)


@BLOCKS
def test_what_is_grafted_is_the_formula(block: str):
    model, images = TINY.build(), TINY.images()
    grafts = gate_in(model, block)
    open_gates(grafts)
    reference, size = TINY.build(), 0.7
    for module, one in ((reference.stage, grafts[0]), (reference.top, grafts[1])):
        bare = copy.deepcopy(one.block.block)
        module.register_forward_hook(lambda m, args, x, bare=bare: x + size * (bare(x) - x))
    for shape in [(2, 3, 32, 32), (1, 3, 33, 47), (1, 3, 1, 1), (0, 3, 32, 32)]:
        x = torch.randn(shape)
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)
    open_gates(grafts, size := 1.0)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-4, atol=1e-5)


@BLOCKS
@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (1, 3, 8, 8), (3, 3, 33, 47), (1, 3, 1, 1)])
def test_any_batch_and_image_size(shape: tuple[int, ...], block: str):
    model, x = TINY.build(), torch.randn(shape)
    expected = model(x)
    grafts = gate_in(model, block)
    assert_same(model(x), expected)
    open_gates(grafts)
    assert model(x).isfinite().all()


def attempt(module: nn.Module, x: Tensor) -> str:
    """Kind of what goes wrong in a pass forward and backward, "" for nothing."""
    try:
        module(x).sum().backward()
    except (IndexError, RuntimeError, ValueError) as error:
        return type(error).__name__
    finite = all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    return "" if finite else "gradients that are not finite"


@pytest.mark.parametrize("case", GATED, ids=str)
def test_the_gate_takes_what_the_block_takes_and_nothing_else(case: GatedCase):
    for shape in [*SHAPES, (1, 8, 1, 1)]:
        for training in (False, True):
            x = torch.randn(shape)
            alone, gated = attempt(case.bare().train(training), x), attempt(case.opened().train(training), x)
            assert alone == gated, (shape, training)
            assert (alone == "") == case.takes(shape, training), (shape, training)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.randn(2, 8, 5, 6, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            alone, gated = attempt(case.bare().to(dtype), x), attempt(case.opened().to(dtype), x)
        assert alone == gated, dtype
        assert (alone == "") == case.takes_autocast(dtype), dtype


@BLOCKS
def test_a_gradient_reaches_gamma_at_once_and_everything_after_its_first_step(block: str):
    model, images = TINY.build().train(), TINY.images(8)
    grafts = gate_in(model, block)
    optimizer = torch.optim.SGD(grafts.param_groups(lr=0.05))
    model(images).square().sum().backward()
    gammas = grafts.gammas()
    assert len(gammas) == len(grafts)
    for name, parameter in grafts.named_parameters():
        assert bool(parameter.grad.any()) == (name in gammas), name
    optimizer.step()
    optimizer.zero_grad()
    assert all(gamma.abs() > 0 for gamma in gammas.values())
    model(images).square().sum().backward()
    for name, parameter in grafts.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("conv_attn.bias"):  # adds one number to a whole row of scores before a softmax
            assert parameter.grad.any(), name


@BLOCKS
def test_copies_and_state_dicts_carry_their_own_grafts(block: str):
    model, images = TINY.build(), TINY.images()
    original, pretrained = model(images), model.state_dict()
    open_gates(gate_in(model, block))
    changed = model(images)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    fresh = TINY.build()
    gate_in(fresh, block)
    fresh.load_state_dict(model.state_dict(), strict=True)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, fresh):
        assert_same(other(images), changed)
        open_gates(grafts_of(other), 0.0)
        assert_same(other(images), original)
        ungraft(other)
        assert not is_grafted(other)
        other.load_state_dict(pretrained, strict=True)
    assert_same(model(images), changed)


@BLOCKS
def test_exactly_once_on_every_road(block: str):
    host = HOSTS["timm-resnet18"]
    model, images = host.build(), host.images()
    grafts = gate_in(model, block, "timm-resnet18")
    open_gates(grafts)
    expected = model(images)
    calls = [count_calls(g.block) for g in grafts]

    def counted() -> list[int]:
        found = [len(c) for c in calls]
        for c in calls:
            c.clear()
        return found

    assert_same(model(images), expected)
    assert counted() == [1, 1]
    with torch.no_grad():
        final, _ = model.forward_intermediates(images)
    assert counted() == [1, 1]
    assert_same(model.forward_head(final), expected)
    assert_same(fx.symbolic_trace(model)(images), expected)
    counted()
    model.set_grad_checkpointing(True)
    output = model.train()(images)
    assert counted() == [1, 1]
    output.sum().backward()
    assert all(gamma.grad.abs() > 0 for gamma in grafts.gammas().values())


AUTO = torch.export.Dim.AUTO
DYNAMIC = ({0: AUTO, 2: AUTO, 3: AUTO},)


@pytest.mark.slow
@pytest.mark.parametrize("block", TIMM)
def test_compiles_and_exports(block: str):
    model, images = TINY.build(), TINY.images()
    original = model(images)
    grafts = gate_in(model, block)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(compiled(images), original)
    open_gates(grafts)
    assert_same(compiled(images), model(images))
    with grafts.disabled():
        assert_same(compiled(images), original)
    exported = torch.export.export(model, (images,), dynamic_shapes=DYNAMIC).module()
    for shape in [tuple(images.shape), (5, 3, 64, 96), (1, 3, 104, 72)]:
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@BLOCKS
@pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn about themselves
def test_onnx(block: str, tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    model, images = TINY.build(), TINY.images()
    open_gates(gate_in(model, block))
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    session = ort.InferenceSession(path)
    for shape in [tuple(images.shape), (3, 3, 64, 96)]:
        x = torch.randn(shape)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-3, atol=1e-4)
