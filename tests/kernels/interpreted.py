"""The fused kernels in Triton's interpreter, on the CPU.

`test_fused_interpreted.py` runs these in processes of their own, because Triton looks at TRITON_INTERPRET once.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from block_forms import ATTENDING
from fused_cases import LAYOUTS, LENS, MASKS, Case, errors, finite_differences, poisoned, random_case, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime import interpreter

from sagan_attn import functional
from sagan_attn.blocks import create_block
from sagan_attn.errors import BlockError
from sagan_attn.kernels import launch, tables

ops = torch.ops.sagan_attn
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="session")
def _interpreter():
    """Of Triton 3.9, which multiplies the bits of bfloat16, and replaces the language anew at each call of a helper."""
    assert triton.knobs.runtime.interpret
    create = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return create(self, *(_as_float32(x) for x in (a, b)), *more)

    find, known = interpreter._patch_lang, {}

    def found_once(function: Any) -> Any:
        at = id(function.__globals__)
        if at not in known:
            known[at] = find(function)
            known[at].restore = lambda: None
        return known[at]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(interpreter, "_patch_lang", found_once)
        yield


def _as_float32(x: Any) -> Any:
    if x.dtype.scalar != tl.bfloat16:
        return x
    bits = x.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that small tensors take several, in every direction."""
    small = tables.Tiles(16, 16, 16, 4, 1)
    monkeypatch.setattr(launch, "choose", lambda *arguments, **more: small)


def check(case: Case, **more: Any) -> None:
    with poisoned():
        found = run(case, **more)
    errors(case, *found)


CASES = [
    Case(1, 1, 1, 1),
    Case(16, 16, 16, 16, dtype=torch.bfloat16),
    Case(33, 18, 5, 19, b=1, heads=2, dtype=torch.bfloat16),
    Case(40, 35, 8, 40, b=1, narrow="columns", wide="columns"),
    Case(18, 33, 17, 33, heads=2, b=1, narrow="heads inside", wide="heads inside", dtype=torch.float16),
    Case(20, 37, 3, 20, b=1, heads=2, narrow="part", wide="spread"),
    Case(18, 33, 4, 18, narrow="spread", wide="same for all", scale=-0.7),
    *(Case(20, 36, 4, 16, heads=2, mask=mask) for mask in MASKS),
    *(Case(35, 35, 4, 16, lens=lens, dtype=torch.bfloat16) for lens in LENS),
    Case(19, 33, 4, 20, mask="keys", lens="rows"),
    Case(35, 35, 4, 20, b=1, sides=(5, 7)),
    Case(36, 36, 20, 8, sides=(18, 2), mask="keys", dtype=torch.bfloat16, narrow="columns", scale=0.2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_tiles(case: Case, small_tiles: None):
    check(case)


@pytest.mark.parametrize("case", [CASES[3], CASES[4], CASES[9], CASES[11]], ids=str)
def test_sums_in_one_order(case: Case, small_tiles: None):
    torch.use_deterministic_algorithms(True)
    try:
        check(case)
    finally:
        torch.use_deterministic_algorithms(False)


WIDE = [
    Case(70, 65, 8, 64, dtype=torch.bfloat16),
    Case(30, 70, 64, 512, b=1, dtype=torch.bfloat16, narrow="columns", wide="columns"),
    Case(9, 17, 128, 1024, b=1, dtype=torch.float16),
    Case(40, 33, 100, 200, b=1),
    Case(33, 33, 40, 320, b=1, sides=(3, 11), dtype=torch.bfloat16, scale=0.2),
]


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_the_tiles_in_use(case: Case):
    check(case)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[] if n < 8 else pytest.mark.slow) for n in range(60)])
def test_random_shapes(seed: int):
    check(random_case(seed, 60, DTYPES))


def test_scores_far_from_zero(small_tiles: None):
    case = Case(40, 40, 4, 8)
    tensors = [(30 * x.detach()).requires_grad_() for x in case.inputs()[0]]
    out = case.attend(tensors, {})
    towards = torch.randn_like(out)
    errors(case, tensors, {}, out, torch.autograd.grad(out, tensors, towards), towards)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of NumPy, which computes here
@pytest.mark.parametrize("place", range(3), ids=["query", "key", "value"])
def test_what_is_not_finite_shows(place: int, small_tiles: None):
    """In the same places as on the other paths."""
    tensors = [torch.randn(2, 2, n, d) for n, d in ((20, 4), (37, 4), (37, 20))]
    tensors[place][1, 0, 18, 3] = torch.nan
    fused, chunked, materialised = (
        functional.attend(*tensors, path=path).isnan() for path in ("fused", "chunked", "materialised")
    )
    assert materialised.any()
    assert torch.equal(fused, materialised)
    assert torch.equal(chunked, materialised)


def test_small_weights_in_float16():
    """Weights below what float16 holds in full, and gradients of scores below what it holds at all."""
    case = Case(16, 4000, 4, 4, b=1, dtype=torch.float16, scale=0.01)
    check(case)


@pytest.mark.parametrize("deterministic", [False, True])
def test_dropout_grows_large_weights_in_float16(deterministic: bool):
    case = Case(40, 24, 16, 20, b=1, dtype=torch.float16)
    tensors = case.inputs()[0]
    with torch.no_grad():
        tensors[0].fill_(1)
        tensors[1][:, :, 5].fill_(1)  # whose weight is nearly 1 for every query
    eye = torch.eye(24, dtype=torch.float16)[None, None]
    torch.manual_seed(3)
    stays = case.attend([*tensors[:2], eye], {}, dropout=0.9) != 0
    assert stays[..., 5].any()
    torch.manual_seed(3)
    out = case.attend(tensors, {}, dropout=0.9)
    expected = (case.expected_weights([x.double() for x in tensors], {}) * stays * 10) @ tensors[2].double()
    towards = torch.randn_like(out)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = torch.autograd.grad(out, tensors, towards)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(found, torch.autograd.grad(expected, tensors, towards.double()), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-2, atol=5e-2)  # sums of outputs near 40


def test_half_precision_queries_of_other_values(small_tiles: None):
    q, k, v = (torch.randn(1, 1, n, d) for n, d in ((20, 4), (30, 4), (30, 20)))
    out = functional.attend(q, k.bfloat16(), v.bfloat16(), path="fused")
    assert out.dtype == torch.bfloat16
    expected = (q.double() @ k.bfloat16().double().mT).softmax(-1) @ v.bfloat16().double()
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (4, 0, 4, 3), (4, 5, 0, 3), (4, 5, 4, 0)], ids=str)
def test_empty_tensors(shape: tuple[int, ...]):
    n, m, d, size = shape
    results = []
    for path in ("fused", "materialised"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 1, *x, requires_grad=True) for x in ((n, d), (m, d), (m, size)))
        out = functional.attend(q, k, v, path=path)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wide", LAYOUTS)
def test_the_output_lies_as_the_values_do(wide: str):
    q, k, v = Case(6, 5, 4, 3, heads=2, narrow=wide, wide=wide).inputs()[0]
    out = functional.attend(q, k, v, path="fused")
    if wide == "columns":
        assert out.mT.is_contiguous()
    elif wide in ("heads inside", "part"):
        assert out.transpose(1, 2).is_contiguous()
    elif wide == "rows":
        assert out.is_contiguous()
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.stride() == torch.empty_like(x).stride()


def test_dropped_weights():
    m = 40
    query, key = torch.randn(2, 2, 30, 4), torch.randn(2, 2, m, 4)
    weights = (query @ key.mT).softmax(-1)
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(functional.attend(query, key, torch.eye(m).expand(2, 2, m, m), dropout=0.3, path="fused"))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    assert not torch.equal(seen[0] == 0, seen[2] == 0)
    stays = seen[0] != 0
    torch.testing.assert_close(seen[0], weights * stays / 0.7, rtol=1e-4, atol=1e-6)
    bound = 4 * (0.3 * 0.7) ** 0.5  # deviations of the mean of independent throws, by the root of their number
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (1, 2, 3), (0, 2, 3)):  # all; each key, query, sample, head
        share = stays.float().mean(dims)
        assert (share - 0.7).abs().max() < bound / (stays.numel() / share.numel()) ** 0.5
    for one, other in ((stays[0], stays[1]), (stays[:, 0], stays[:, 1]), (stays[..., :-1], stays[..., 1:])):
        together = (one & other).float().mean().item()
        assert together == pytest.approx(0.49, abs=4 * (0.49 * 0.51 / one.numel()) ** 0.5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_know_what_was_dropped(small_tiles: None, deterministic: bool):
    case = Case(20, 24, 4, 20, b=1, heads=2, mask="keys")
    tensors, how = case.inputs()
    eye = torch.eye(24).expand(1, 2, 24, 24)
    torch.manual_seed(3)
    stays = case.attend([*tensors[:2], eye], how, dropout=0.4) != 0
    torch.manual_seed(3)
    out = case.attend(tensors, how, dropout=0.4)
    expected = (case.expected_weights(tensors, how) * stays / 0.6).float() @ tensors[2]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    towards = torch.randn_like(out)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = torch.autograd.grad(out, tensors, towards)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(found, torch.autograd.grad(expected, tensors, towards), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_all_weights_dropped():
    q, k, v = Case(5, 6, 4, 3).inputs()[0]
    out = functional.attend(q, k, v, dropout=1.0, path="fused")
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_finite_differences():
    finite_differences(Case(5, 7, 3, 4, lens="rows"))
    finite_differences(Case(6, 6, 3, 4, sides=(2, 3)))


@pytest.mark.parametrize("sides", [None, (2, 3)])
def test_second_derivatives(sides: tuple[int, int] | None):
    case = Case(6, 6, 3, 4, mask="keys", sides=sides)
    tensors, how = case.inputs()
    results = []
    for path in ("fused", "materialised"):
        first = torch.autograd.grad(case.attend(tensors, how, path=path).square().sum(), tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), tensors))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_second_derivatives_with_dropout_are_refused():
    q, k, v = Case(5, 6, 4, 3).inputs()[0]
    out = functional.attend(q, k, v, dropout=0.5, path="fused")
    grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    with pytest.raises(BlockError, match="second derivatives with dropout of weights need another path"):
        grads[0].sum().backward()


def test_transforms():
    inputs = [torch.randn(3, 2, n, d) for n, d in ((5, 4), (6, 4), (6, 3))]
    mask = torch.rand(3, 1, 1, 6) > 0.3

    def losses(path: Any):
        def loss(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
            return functional.attend(q[None], k[None], v[None], 0.5, path=path, mask=m[None]).square().sum()

        return torch.func.grad(loss, argnums=(0, 1, 2))

    for in_dims in ((0, 0, 0, 0), (0, None, None, None)):
        arguments = [x if dim == 0 else x[0] for x, dim in zip([*inputs, mask], in_dims, strict=True)]
        ours, theirs = (torch.func.vmap(losses(path), in_dims)(*arguments) for path in ("fused", "materialised"))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    drop = torch.func.vmap(lambda x: functional.attend(x, x, x, dropout=0.5, path="fused"), randomness="different")
    with pytest.raises(BlockError, match=r"torch.vmap with dropout of weights needs another path"):
        drop(inputs[0][:, None])


def test_the_operators_keep_torchs_rules():
    tests = ("test_schema", "test_faketensor")
    for case in (Case(5, 6, 4, 3), Case(6, 6, 4, 3, heads=2, sides=(2, 3), mask="keys", wide="heads inside")):
        (query, key, value, *_), how = case.inputs()
        inputs = [x.detach() for x in (query, key, value)]
        rows, columns = (torch.randn(2, 2, 6, side) for side in case.sides) if case.sides else (None, None)
        options = how.get("mask"), torch.full((2, 5), 4, dtype=torch.int32), rows, columns, None, 0.5, 0.0
        options = options if case.sides is None else (options[0], None, *options[2:])
        torch.library.opcheck(ops.fused_attention.default, (*inputs, *options), test_utils=tests)
        out, lse = ops.fused_attention(*inputs, *options)
        arguments = (torch.randn_like(out), *inputs, out, lse, *options)
        torch.library.opcheck(ops.fused_attention_backward.default, arguments, test_utils=tests)


def test_compiles_in_one_graph():
    torch.compiler.reset()
    case = Case(12, 12, 4, 3, sides=(3, 4), lens="samples")
    tensors, how = case.inputs()
    compiled = torch.compile(lambda *x: case.attend(list(x), how), fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(*tensors), case.attend(tensors, how, path="materialised")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), tensors) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_exports_as_one_operator():
    block = create_block("sagan", 8, path="fused").eval()
    program = torch.export.export(block, (torch.randn(1, 8, 4, 4),))
    assert "sagan_attn.fused_attention" in program.graph_module.code
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(program.module()(x), block(x))


def test_checkpoints_drop_the_same_weights():
    results = []
    for checkpointed in (False, True):
        tensors = Case(20, 20, 4, 8).inputs()[0]
        with torch.no_grad():
            for number, x in enumerate(tensors):
                x.copy_(torch.linspace(-1, 1, x.numel()).view(x.shape).sin() + number)
        torch.manual_seed(5)

        def attend(*x: Tensor) -> Tensor:
            return functional.attend(*x, dropout=0.5, path="fused")

        out = checkpoint(attend, *tensors, use_reentrant=False) if checkpointed else attend(*tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_changes_no_dtypes():
    q, k, v = Case(20, 20, 4, 8).inputs()[0]
    expected = functional.attend(q, k, v, path="fused")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(functional.attend(q, k, v, path="fused"), expected)
        assert functional.attend(q, k.bfloat16(), v.bfloat16(), path="fused").dtype == torch.bfloat16


SERVED = [
    case
    for case in ATTENDING
    if case.options.get("mode") not in ("dot_product", "concatenation") and case.name != "additive"
]


QUICK = ("sagan", "biggan", "botnet", "nonlocal gaussian", "multihead relative", "decoder")


@pytest.mark.parametrize(
    "case", [pytest.param(x, id=x.id, marks=[] if x.id in QUICK else pytest.mark.slow) for x in SERVED]
)
def test_blocks(case: Any):
    """Every form with softmax of dot products, with gradients, masks, and channels last."""
    off = {"dropout": 0.0} if "dropout" in case.options else {}
    fused, materialised = (case.opened(path=path, **off) for path in ("fused", "materialised"))
    x = torch.randn(2, 8, 5, 4)
    for options in ({}, case.masks(torch.rand(2, 5, 4) < 0.5)):
        ours, theirs = (gradients(block, x, options) for block in (fused, materialised))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def gradients(block: torch.nn.Module, x: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Output and all gradients."""
    x = x.clone(memory_format=torch.channels_last).requires_grad_()
    out = block(x, **options)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])]


@pytest.mark.parametrize("case", [WIDE[2], replace(WIDE[4], dtype=torch.float16)], ids=str)
def test_tiles_of_a_smaller_room(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_room", lambda device: 99 * 1024)
    check(case)


def test_nothing_of_size_n_times_m():
    from test_memory import peak

    n = 400
    q, k, v = (torch.randn(1, 1, n, d, requires_grad=True) for d in (4, 4, 8))
    run = lambda: functional.attend(q, k, v, path="fused").sum().backward()  # noqa: E731
    assert peak(run) < n * n  # bytes: a quarter of the scores
