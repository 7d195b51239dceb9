"""Promise 4 with compilers, exporters and several processes."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hosts import HOSTS, WIDE_HOSTS, assert_same, open_gates

from sagan_attn import graft, ungraft

ANY = {**HOSTS, **WIDE_HOSTS}
SLOW_HOSTS = [pytest.param(n, marks=pytest.mark.slow) for n in ("tv-resnet18", "regnet", "convnext", "swin")]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def grafted(name: str, **options):
    host = ANY[name]
    model, images = host.build(), host.images()
    original = model(images)
    grafts = graft(model, list(host.sites), example_input=images[:1], options=options)
    return model, images, grafts, original


@pytest.mark.parametrize("name", ["tiny", *SLOW_HOSTS])
def test_compiles_and_notices_disabled(name: str):
    model, images, grafts, original = grafted(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(compiled(images), original)
    open_gates(grafts)
    changed = model(images)
    assert not torch.equal(changed, original)
    assert_same(compiled(images), changed)
    with grafts.disabled():
        assert_same(compiled(images), original)
        with grafts[1:].disabled():
            assert_same(compiled(images), original)
    assert_same(compiled(images), changed)
    with grafts[:1].disabled():
        assert_same(compiled(images), model(images))
    ungraft(model)
    assert_same(compiled(images), original)


@pytest.mark.parametrize("options", [{}, {"spectral_norm": True, "pool": 2}])
def test_trains_when_compiled(options: dict):
    model, images, grafts, _ = grafted("tiny", **options)
    open_gates(grafts)
    model.train()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(images).square().sum().backward()
        reference(images).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor warns about the machine it is on
def test_compiles_with_inductor():
    model, images, grafts, original = grafted("tiny")
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images), original)
    open_gates(grafts)
    torch.testing.assert_close(compiled(images), model(images))
    with grafts.disabled():
        torch.testing.assert_close(compiled(images), original)


@pytest.mark.parametrize("options", [{}, {"pool": 2}])
@pytest.mark.parametrize("name", ["tiny", *SLOW_HOSTS[:-1]])
def test_exports_with_dynamic_batch_and_size(name: str, options: dict):
    model, images, grafts, _ = grafted(name, **options)
    open_gates(grafts)
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)).module()
    for shape in [tuple(images.shape), (5, 3, 64, 96), (1, 3, 104, 72)]:
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", *SLOW_HOSTS[:-1]])
@pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn about themselves
def test_onnx(name: str, tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    model, images, grafts, _ = grafted(name)
    open_gates(grafts)
    auto = torch.export.Dim.AUTO
    path = str(tmp_path / "model.onnx")
    shapes = ({0: auto, 2: auto, 3: auto},)
    torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = ort.InferenceSession(path)
    for shape in [tuple(images.shape), (3, 3, 64, 96)]:
        x = torch.randn(shape)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-3, atol=1e-4)


WORKER = """
import sys
import torch
import torch.distributed as dist
from hosts import HOSTS, open_gates
from sagan_attn import graft
from sagan_attn.errors import GraftError

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = HOSTS["tiny"].build()
del model.unused  # DDP wants every parameter used
grafts = graft(model, ["stage", "top"], example_input=torch.zeros(1, 3, 32, 32), seed=rank)
open_gates(grafts, 0.0 if rank else 0.5)  # DDP hands out those of rank 0
wrapped = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
for step in range(2):
    optimizer.zero_grad()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(10 * step + rank))
    wrapped(images).square().sum().backward()
    optimizer.step()
grads = {name: p.grad for name, p in model.named_parameters()}
torch.save((grads, model.state_dict()), f"{folder}/{rank}.pt")
try:
    graft(wrapped, "module.down", example_input=images)
except GraftError as error:
    assert "wrapped in DistributedDataParallel" in str(error)
else:
    raise SystemExit("a wrapped model was grafted into")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}"}
    workers = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], env=env, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
    (grads, state), (other_grads, other_state) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert any(".grafts." in name and grad.abs().sum() > 0 for name, grad in grads.items())
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name
    for name, value in state.items():
        if "running" not in name:
            assert torch.equal(value, other_state[name]), name
