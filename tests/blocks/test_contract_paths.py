"""What every attending form promises about the ways to compute attention: the same numbers."""

from typing import Any

import pytest
import torch
from block_forms import ATTENDING, Case, cases, cores, seed, swept
from chunk_sizes import chunk_scores
from torch import Tensor, nn

from sagan_attn.blocks import create_block
from sagan_attn.errors import BlockError
from sagan_attn.functional import chunks as grouped
from sagan_attn.functional import paths

FACTORED = cases("nonlocal dot product", "nonlocal dot product without norm")


@pytest.fixture
def chunks(monkeypatch) -> list[int]:
    """The list takes the number of queries of each part that is computed at once, 7 in a chunk of `small_chunks`."""
    seen: list[int] = []
    original = paths._materialised

    def counted(query: Tensor, *args) -> Tensor:
        seen.append(query.shape[2])
        return original(query, *args)

    monkeypatch.setattr(paths, "_materialised", counted)
    monkeypatch.setitem(paths._WAYS, "materialised", counted)
    parts = grouped._chunks

    def listed(*args):
        for part in parts(*args):
            seen.append(part[2].shape[2])
            yield part

    monkeypatch.setattr(grouped, "_chunks", listed)
    return seen


def small_chunks(block: nn.Module, monkeypatch) -> None:
    """Chunks of 7 queries for two maps of 5 x 4."""
    heads, _, keys = block.attention_shape(5, 4)
    features = cores(block)[0].score_vector.shape[1] if cores(block)[0].score == "additive" else 1
    chunk_scores(monkeypatch, 7 * 2 * heads * keys * features)
    monkeypatch.setattr(grouped, "CHUNK_SCORES", 14 * keys)
    monkeypatch.setattr(grouped, "CHUNK_MAPS", 1)


def run(block: nn.Module, x: Tensor, **options) -> list[Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    output = block(x, **options)
    wanted = [x, *block.parameters()]
    return [output, *torch.autograd.grad(output.square().sum(), wanted)]


def assert_all_close(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def modes() -> list[Any]:
    """Every case in eval mode, and in train mode; of these the ones beside a few as slow."""
    few = cases("sagan", "biggan", "nonlocal", "multihead relative", "encoder dropout")
    slow = [[] if case in few else [pytest.mark.slow] for case in ATTENDING]
    evaluation = [pytest.param(case, False, id=case.id) for case in ATTENDING]
    training = zip(ATTENDING, slow, strict=True)
    return evaluation + [pytest.param(case, True, id=f"{case} training", marks=marks) for case, marks in training]


@pytest.mark.parametrize(("case", "training"), modes())
def test_chunked_is_materialised(case: Case, training: bool, chunks: list[int], monkeypatch):
    off = {"dropout": 0.0} if "dropout" in case.options else {}
    chunked, materialised = (
        case.opened(path=path, **off).double().train(training) for path in ("chunked", "materialised")
    )
    small_chunks(chunked, monkeypatch)
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    mask = torch.rand(2, 5, 4) < 0.5
    for options in ({}, case.masks(mask)):
        ours = run(chunked, x, **options)
        assert set(chunks) == {14, 6}
        chunks.clear()
        theirs = run(materialised, x, **options)
        assert set(chunks) == {20}
        chunks.clear()
        assert_all_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(chunked(x), materialised(x))


@pytest.mark.parametrize("case", swept(ATTENDING))
def test_chunked_is_materialised_under_autocast_and_in_half_precision(case: Case, chunks: list[int], monkeypatch):
    small_chunks(case.opened(), monkeypatch)
    off = {"dropout": 0.0} if "dropout" in case.options else {}
    x = torch.randn(2, 8, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (run(case.opened(path=path, **off), x) for path in ("chunked", "materialised"))
    whole = torch.stack([tensor.norm() for tensor in theirs]).max()
    for one, other in zip(ours, theirs, strict=True):  # gradients of keys and values are summed in bfloat16
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.03 * other.norm() + 0.003 * whole
    ours, theirs = (case.opened(path=path).half()(x.half()) for path in ("chunked", "materialised"))
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)
    assert set(chunks) == {14, 6, 20}


@pytest.mark.parametrize("case", FACTORED, ids=str)
def test_factored_is_materialised(case: Case):
    factored, auto, materialised = (case.opened(path=path).double() for path in ("factored", "auto", "materialised"))
    x, mask = torch.randn(2, 8, 5, 4, dtype=torch.float64), torch.rand(2, 5, 4) < 0.5
    mask[1] = False
    for options in ({}, {"mask": mask}):
        assert_all_close(run(factored, x, **options), run(materialised, x, **options))
        assert_all_close(run(auto, x, **options), run(factored, x, **options), rtol=0, atol=0)


@pytest.mark.parametrize("case", [case for case in ATTENDING if case not in FACTORED], ids=str)
def test_forced_factoring_is_refused_where_it_would_be_another_function(case: Case):
    if case.options.get("mode") == "dot_product":
        pytest.skip("serves it, whatever path the case asks for")
    reason = "path 'factored' cannot serve score '(dot|additive|concatenation)' with normalize '(softmax|mean)'"
    with pytest.raises(BlockError, match=reason):
        case.opened(path="factored")(torch.randn(1, 8, 3, 3))


@pytest.mark.slow
def test_chunks_in_training_drop_weights_as_often(chunks: list[int], monkeypatch):
    """The backward pass drops what the forward pass dropped, and as many in chunks as in one piece."""
    chunk_scores(monkeypatch, 4 * 400 * 30)
    block = create_block("multihead", 8, dropout=0.5, path="chunked", zero_init=False).double().train()
    with torch.no_grad():
        block.query.weight.zero_()  # all weights are 1 / 400
        block.value.weight.copy_(torch.eye(8)[:, :, None, None])
        block.output.weight.copy_(torch.eye(8)[:, :, None, None])
    x = torch.ones(1, 8, 20, 20, dtype=torch.float64)
    branch = block(x) - x
    assert branch.mean().item() == pytest.approx(1, abs=0.01)
    assert branch.std().item() == pytest.approx((1 / 400) ** 0.5, rel=0.1)
    assert set(chunks) == {30, 10}
    chunk_scores(monkeypatch, 4 * 12 * 5)

    small = torch.randn(1, 8, 4, 3, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        seed(5)
        return block(x)

    assert torch.autograd.gradcheck(call, small)
