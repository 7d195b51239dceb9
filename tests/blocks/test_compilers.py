"""Every form is traced, compiled, exported and run by ONNX runtime, with the same numbers.

What runs by default is small; `-m slow` runs every form on every road.
"""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from block_forms import ATTENDING, SHAPES, Case, cores, swept
from chunk_sizes import chunk_scores
from gated_forms import CONTRACT
from torch import fx, nn

AUTO = torch.export.Dim.AUTO
DYNAMIC = {0: AUTO, 2: AUTO, 3: AUTO}


def some(*ids: str, of: list[Case] = CONTRACT) -> list[Any]:
    """All cases, those beside the ones named as slow."""
    assert {case.id for case in of} >= set(ids)
    return [pytest.param(c, id=c.id, marks=[] if c.id in ids else [pytest.mark.slow]) for c in of]


@pytest.mark.parametrize("case", swept(CONTRACT))
def test_symbolic_trace(case: Case):
    block = case.opened()
    traced = fx.symbolic_trace(block)
    for shape in filter(case.takes, SHAPES[1:7]):
        x = torch.randn(shape)
        # Not equal: where a context is an argument, a trace cannot join what reads the map with what reads the context.
        torch.testing.assert_close(traced(x), block(x))
    x = torch.randn(2, 8, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    torch.testing.assert_close(traced.bfloat16()(x), block.bfloat16()(x))


def check_compiled(block: nn.Module, dynamic: bool, **options: torch.Tensor) -> None:
    """Output, gradients and what training does to the buffers, on one size or on two with `dynamic`."""
    torch.compiler.reset()
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [(2, 8, 4, 4), (3, 8, 5, 7)][: 1 + dynamic]:
        x = torch.randn(shape, requires_grad=True)
        masks = {name: torch.rand(shape[0], *shape[2:]) < 0.7 for name in options}
        ours, theirs = compiled(x, **masks), eager(x, **masks)
        torch.testing.assert_close(ours, theirs)
        grads = [
            torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
            for output, module in ((ours, block), (theirs, eager))
        ]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        for one, other in zip(block.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", some())
def test_compiles_without_graph_breaks(case: Case):
    check_compiled(case.opened(**without_dropout(case)).train(), dynamic=True)


@pytest.mark.parametrize("case", some("sagan"))
def test_compiles_for_fixed_sizes(case: Case):
    check_compiled(case.opened(**without_dropout(case)).train(), dynamic=False)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", some(of=ATTENDING))
def test_compiles_with_masks(case: Case, dynamic: bool):
    block = case.opened(**without_dropout(case)).train()
    check_compiled(block, dynamic, **case.masks(torch.ones(1, dtype=torch.bool)))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", some(of=[case for case in ATTENDING if "chunked" in case.id]))
def test_chunks_compile(case: Case, dynamic: bool, monkeypatch):
    chunk_scores(monkeypatch, 200)
    check_compiled(case.opened().train(), dynamic=dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("case", swept(CONTRACT))
def test_compiles_under_autocast(case: Case):
    torch.compiler.reset()
    block, x = case.opened(), torch.randn(2, 8, 4, 5)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), block(x), rtol=0.02, atol=0.02)


def without_dropout(case: Case) -> dict[str, float]:
    return {"dropout": 0.0} if "dropout" in case.options else {}


def exportable(case: Case) -> Case:
    """Chunks are fixed in number by an export: it is asked for the same form without them."""
    kept = {option: value for option, value in case.options.items() if value != "chunked"}
    return dataclasses.replace(case, options=kept)


def smallest(block: nn.Module) -> tuple[int, int]:
    """torch.export takes no side of 1 where it was shown larger ones, and so none that pooling makes one of 1."""
    pool = cores(block)[0].pool if cores(block) else 1
    return (2, 3) if pool == 1 else (pool + 1, pool + 2)


@pytest.mark.parametrize(
    "case",
    some("sagan", "global-context"),
)
def test_exports_with_dynamic_batch_and_size(case: Case):
    block = exportable(case).opened()
    exported = torch.export.export(block, (torch.randn(2, 8, 6, 7),), dynamic_shapes=(DYNAMIC,))
    module = exported.module()
    for shape in [(2, 8, 6, 7), (5, 8, 4, 9), (1, 8, *smallest(block))]:
        x = torch.randn(shape)
        torch.testing.assert_close(module(x), block(x))
    assert not any("autocast" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("case", some(of=ATTENDING))
def test_exports_with_a_mask(case: Case):
    block, x = exportable(case).opened(), torch.randn(2, 8, 6, 7)
    options = case.masks(torch.rand(2, 6, 7) < 0.7)
    shapes = {"x": DYNAMIC} | {name: {0: AUTO, 1: AUTO, 2: AUTO} for name in options}
    module = torch.export.export(block, (x,), options, dynamic_shapes=shapes).module()
    for shape in [(2, 8, 6, 7), (5, 8, 4, 9), (3, 8, *smallest(block))]:
        x, options = torch.randn(shape), case.masks(torch.rand(shape[0], *shape[2:]) < 0.7)
        torch.testing.assert_close(module(x, **options), block(x, **options))


@pytest.mark.slow  # runs are exported by default
@pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn about themselves
@pytest.mark.parametrize("case", some("sagan"))
def test_onnx(case: Case, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    block = exportable(case).opened()
    torch.onnx.export(
        block,
        (torch.randn(2, 8, 6, 8),),
        str(tmp_path / "block.onnx"),
        dynamo=True,
        dynamic_shapes=(DYNAMIC,),
        verbose=False,
    )
    session = ort.InferenceSession(str(tmp_path / "block.onnx"))
    for shape in [(2, 8, 6, 8), (3, 8, 4, 5), (1, 8, 3, 7)]:
        x = torch.randn(shape)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), block(x), rtol=1e-4, atol=1e-5)
