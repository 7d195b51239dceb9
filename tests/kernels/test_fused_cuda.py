"""The fused kernels on a GPU: `pytest -m cuda`."""

import os
import socket
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS refuses sums in one order

import pytest
import torch
import torch.nn.functional as F
from fused_cases import Case, errors, poisoned, random_case, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sagan_attn import functional, graft
from sagan_attn.blocks import create_block
from sagan_attn.functional import paths

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
    # Hints, which differ between versions of torch: of gradcheck about float32, of the compiler about TF32.
    pytest.mark.filterwarnings("ignore"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES, GROUP = 240, 5  # of random shapes, and of those to a test


@pytest.fixture(autouse=True)
def fused_for_small_maps(monkeypatch: pytest.MonkeyPatch):
    """Blocks have path="auto", which is for more scores than these tests need."""
    monkeypatch.setattr(paths, "FUSED_FROM", 1)


@pytest.fixture
def one_order():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("first", range(0, SHAPES // 2, GROUP))
def test_random_shapes_twice(first: int):
    twice(first)


@pytest.mark.parametrize("first", range(SHAPES // 2, SHAPES, GROUP))
def test_more_random_shapes_twice(first: int):
    """By another name, because each shape is compiled anew: `benchmarks/gpu.py` has them in a part of their own."""
    twice(first)


def twice(first: int) -> None:
    """Fresh data, poisoned outputs, twice for races: all but what atomic additions sum is the same to the bit."""
    for seed in range(first, first + GROUP):
        torch.manual_seed(seed)
        case = random_case(seed, 700, DTYPES)
        with poisoned():
            tensors, how, out, grads, towards = run(case, "cuda")
            again = case.attend(tensors, how)
            more = torch.autograd.grad(again, tensors, towards)
        errors(case, tensors, how, out, grads, towards)
        errors(case, tensors, how, again, more, towards)
        assert torch.equal(out, again)
        assert all(torch.equal(a, b) for a, b in zip(grads[1:3], more[1:3], strict=True))


@pytest.mark.parametrize("seed", range(1000, 1010))
def test_sums_in_one_order(seed: int, one_order: None):
    torch.manual_seed(seed)
    case = random_case(seed, 500, DTYPES)
    tensors, how, out, grads, towards = run(case, "cuda")
    errors(case, tensors, how, out, grads, towards)
    for _ in range(3):
        more = torch.autograd.grad(case.attend(tensors, how), tensors, towards)
        assert all(torch.equal(a, b) for a, b in zip(grads, more, strict=True))


LARGE = [
    Case(n, n // pooled, d, size, b=1, dtype=dtype, scale=d**-0.5, narrow=layout, wide=layout)
    for n in (1024, 4096)
    for pooled, d, size in ((1, 16, 128), (1, 32, 256), (1, 64, 512), (4, 64, 256), (1, 128, 1024))
    for layout in ("columns", "heads inside")
    for dtype in (torch.bfloat16, torch.float32)
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_maps(case: Case):
    with poisoned():
        found = run(case, "cuda")
    errors(case, *found)


def test_more_than_two_to_the_31_numbers():
    """Offsets beyond 32 bits, within a map: its positions lie 4 million numbers apart."""
    if torch.cuda.get_device_properties(0).total_memory < 24e9:
        pytest.skip("needs 24 GB")
    value = torch.randn(600, 2**22, device="cuda", dtype=torch.bfloat16)[None, None, :, :32]
    query, key = (torch.randn(1, 1, n, 8, device="cuda", dtype=torch.bfloat16) for n in (50, 600))
    out = functional.attend(query, key, value, path="fused")
    expected = functional.attend(query, key, value.contiguous(), path="materialised")
    assert (out - expected).float().norm() < 1e-2 * expected.float().norm()


def test_finite_differences():
    case = Case(9, 13, 5, 6, b=1, lens="rows")
    tensors, how = case.inputs("cuda")
    assert torch.autograd.gradcheck(
        lambda *x: case.attend(list(x), how), tensors, eps=1e-2, atol=2e-3, rtol=2e-2, nondet_tol=1e-4
    )


def test_float32_is_not_rounded_to_tf32_unless_allowed():
    case = Case(300, 300, 64, 64, b=1, scale=0.125)
    tensors, how = case.inputs("cuda")
    expected = case.expected_weights([x.double() for x in tensors], how) @ tensors[2].double()
    off = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            off.append(((case.attend(tensors, how) - expected).norm() / expected.norm()).item())
    finally:
        torch.set_float32_matmul_precision(before)
    assert off[0] < 1e-5 < off[1] < 1e-2


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropped_weights(dropout: float):
    n = 512
    q, k = torch.randn(2, 2, n, 16, device="cuda"), torch.randn(2, 2, n, 16, device="cuda")
    eye = torch.eye(n, device="cuda").expand(2, 2, n, n)
    torch.manual_seed(1)
    stays = functional.attend(q, k, eye, 0.25, dropout=dropout, path="fused") != 0
    assert stays.float().mean().item() == pytest.approx(1 - dropout, abs=0.003)
    v = torch.randn(2, 2, n, 128, device="cuda")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.manual_seed(1)
    out = functional.attend(*inputs, 0.25, dropout=dropout, path="fused")
    weights = (q.double() @ k.double().mT * 0.25).softmax(-1) * stays / (1 - dropout)
    expected = weights @ v.double()
    assert (out - expected).norm() < 1e-3 * expected.norm()
    towards = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, inputs, towards.double())
    for one, other in zip(torch.autograd.grad(out, inputs, towards), wanted, strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()


def test_auto_takes_it(monkeypatch: pytest.MonkeyPatch):
    taken: list[str] = []
    way = paths._WAYS["fused"]
    monkeypatch.setitem(paths._WAYS, "fused", lambda *x: taken.append("fused") or way(*x))
    for form in ("sagan", "biggan", "botnet"):
        create_block(form, 64).cuda()(torch.randn(2, 64, 16, 16, device="cuda"))
    assert taken == ["fused"] * 3


def test_nothing_of_size_n_times_m():
    x = torch.randn(1, 64, 128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for form in ("sagan", "biggan"):
        block = create_block(form, 64).to("cuda", torch.bfloat16)
        block(x).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block(x).sum().backward()
        held = torch.cuda.max_memory_allocated() - before
        assert held < 128**4 // 4  # bytes: a sixteenth of the scores in float32 would be as much


def training_step(model: nn.Module, optimizer: Any, dtype: torch.dtype, scaler: Any, x: Tensor) -> float:
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 10)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


def classifier(form: str) -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()
    model = nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    graft(model, "2", block=form)
    return model.cuda()


@pytest.mark.parametrize(("channels_last", "compiled"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["sagan", "biggan", "botnet"])
def test_training_steps(form: str, dtype: torch.dtype, channels_last: bool, compiled: bool):
    torch.compiler.reset()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = classifier(form).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    run_ = torch.compile(model, fullgraph=True) if compiled else model
    x = torch.randn(16, 3, 32, 32, device="cuda").contiguous(memory_format=layout)
    losses = [training_step(run_, optimizer, dtype, scaler, x) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_cuda_graphs_replay():
    block = create_block("sagan", 64, gamma_init=0.5).to("cuda", torch.bfloat16)
    x = torch.randn(4, 64, 16, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(block(x).float().square().sum(), x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(x)
        grad = torch.autograd.grad(out.float().square().sum(), x)[0]
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
        graph.replay()
        expected = block(x)
        assert torch.equal(out, expected)
        wanted = torch.autograd.grad(expected.float().square().sum(), x)[0]
        assert (grad - wanted).float().norm() < 1e-2 * wanted.float().norm()


def test_compiled_with_cuda_graphs():
    torch.compiler.reset()
    block = create_block("sagan", 64, gamma_init=0.5).to("cuda", torch.bfloat16)
    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(4, 64, 16, 16, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            assert (compiled(x) - block(x)).float().norm() < 1e-2 * block(x).float().norm()


def test_streams():
    case = Case(500, 500, 16, 128, dtype=torch.bfloat16)
    problems = [case.inputs("cuda") for _ in range(4)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    outs = []
    for stream, (tensors, how) in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            outs.append(case.attend(tensors, how))
    torch.cuda.synchronize()
    for out, (tensors, how) in zip(outs, problems, strict=True):
        assert torch.equal(out, case.attend(tensors, how))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    case = Case(70, 80, 8, 64)
    found = run(case, "cuda:1")
    assert found[2].device.index == 1
    errors(case, *found)


def test_gradient_checkpoints_and_export():
    block = create_block("multihead", 64, dropout=0.3, zero_init=False).cuda().train()
    x = torch.randn(2, 64, 12, 12, device="cuda", requires_grad=True)
    grads = []
    for run_ in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(run_(x).square().sum(), x)[0])
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[0].norm()
    plain = create_block("sagan", 64, path="fused", gamma_init=0.5).cuda().eval()
    program = torch.export.export(plain, (x.detach(),))
    torch.testing.assert_close(program.module()(x), plain(x))


def test_distributed():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("NCCL_P2P_DISABLE", "1")
    torch.distributed.init_process_group("nccl", f"tcp://127.0.0.1:{port}", world_size=1, rank=0)
    try:
        model = nn.parallel.DistributedDataParallel(classifier("sagan"), device_ids=[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        x = torch.randn(8, 3, 32, 32, device="cuda")
        losses = [training_step(model, optimizer, torch.bfloat16, scaler, x) for _ in range(5)]
        assert losses[-1] < losses[0]
    finally:
        torch.distributed.destroy_process_group()
