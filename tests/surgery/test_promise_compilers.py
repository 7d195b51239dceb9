"""Promise 4 with compilers and exporters."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import ANY_HOST, assert_same, assert_unchanged, open_gates, snapshot
from roads import FOUR, grafted, mostly_slow

from sagan_attn import graft, ungraft
from sagan_attn.errors import GraftError

AUTO = torch.export.Dim.AUTO
ANY_SIZE = ({0: AUTO, 2: AUTO, 3: AUTO},)
# swin is missing: without grafts, too, it exports with a fixed size alone
EXPORTED = mostly_slow(("tiny", *FOUR, "regnet"), "tiny")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("name", mostly_slow(("tiny", *FOUR, "regnet", "swin"), "tiny"))
def test_compiles_and_notices_disabled(name: str):
    host = grafted(name, gate=0.0, count=False)
    model, images, grafts, original = host.model, host.images, host.grafts, host.original
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", *FOUR])
def test_a_compiled_graph_has_each_block_once(name: str):
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    host = grafted(name, count=False)
    compiled = torch.compile(host.model, fullgraph=True, backend=keep)
    assert_same(compiled(host.images), host.output)
    assert len(graphs) == 1
    softmaxes = [node for node in graphs[0].graph.nodes if "softmax" in str(node.target)]
    assert len(softmaxes) == len(host.grafts)  # these hosts have none of their own


@pytest.mark.parametrize("name", mostly_slow(("tiny", *FOUR, "swin"), "tiny", "mambaout"))
@pytest.mark.parametrize("way", ["wrapper", "in place"])
def test_a_graft_after_compilation_is_refused(name: str, way: str):
    host = ANY_HOST[name]
    model, images = host.build(), host.images(1)
    compiled: Any
    if way == "wrapper":
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        site = f"_orig_mod.{host.sites[0]}"
    else:
        compiled, site = model, host.sites[0]
        model.compile(fullgraph=True, backend="eager")
    before = snapshot(model)
    with pytest.raises(GraftError, match="'the model' is compiled and would ignore a graft: graft first, then compile"):
        graft(compiled, site, example_input=images)
    assert_unchanged(model, before)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"spectral_norm": True, "pool": 2}])
def test_trains_when_compiled(options: dict[str, Any]):
    host = grafted("tiny", count=False, **options)
    model, images = host.model.train(), host.images
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
    host = grafted("tiny", gate=0.0, count=False)
    compiled = torch.compile(host.model, fullgraph=True)
    torch.testing.assert_close(compiled(host.images), host.original)
    open_gates(host.grafts)
    torch.testing.assert_close(compiled(host.images), host.model(host.images))
    with host.grafts.disabled():
        torch.testing.assert_close(compiled(host.images), host.original)


@pytest.mark.parametrize("options", [{}, pytest.param({"pool": 2}, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EXPORTED)
def test_exports_with_dynamic_batch_and_size(name: str, options: dict[str, Any]):
    host = grafted(name, count=False, **options)
    program = torch.export.export(host.model, (host.images,), dynamic_shapes=ANY_SIZE)
    softmaxes = [node for node in program.graph.nodes if "softmax" in str(node.target)]
    assert len(softmaxes) == len(host.grafts)  # these hosts have none of their own
    exported = program.module()
    for shape in [tuple(host.images.shape), (5, 3, 64, 96), (1, 3, 104, 72)]:
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), host.model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # runs are exported by default
@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn about themselves
def test_onnx(name: str, tmp_path: Path):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    host = grafted(name, count=False)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(host.model, (host.images,), path, dynamo=True, dynamic_shapes=ANY_SIZE, verbose=False)
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count("Softmax") == len(host.grafts)
    session = ort.InferenceSession(path)
    for shape in [tuple(host.images.shape), (3, 3, 64, 96)]:
        x = torch.randn(shape)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), host.model(x), rtol=1e-3, atol=1e-4)
