"""Peers of the same form are the same function; what cannot serve a shape is left out with the reason."""

import pytest
import torch
from torch import nn

from sagan_attn.bench import block as block_
from sagan_attn.bench.block import Options, create_modules, measure, one_call
from sagan_attn.bench.floor import Case, Ceilings
from sagan_attn.bench.memory import largest_batch, peak_bytes
from sagan_attn.bench.peers import DEFAULT_PEERS, OURS, PEERS, Peer
from sagan_attn.bench.timing import Budget, interleaved, ratios
from sagan_attn.functional.door import INTERPRETED

CPU = torch.device("cpu")
ONCE = Options(CPU, Budget(1, 0.0), 1e9, 60.0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", [n for n in DEFAULT_PEERS if n != OURS and PEERS[n].kind != "other form"])
def test_same_form_is_the_same_function(name: str, channels_last: bool):
    case = Case(2, 16, 5, 7, "fp32", True)
    modules, skipped = create_modules(case, [OURS, name], Options(CPU, Budget(), 1e9, 60.0, channels_last))
    assert not skipped
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 16, 5, 7).contiguous(memory_format=layout).requires_grad_()
    towards = torch.randn(2, 16, 5, 7)
    ours, theirs = (one_call(modules[n], x, towards)() for n in (OURS, name))
    assert (ours[0] - x).abs().max() > 0.01  # the gate is open
    for a, b in zip(ours[:2], theirs[:2], strict=True):  # output, and gradient of the input
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    grads = [
        dict(zip([n for n, _ in modules[way].named_parameters()], found[2:], strict=True))
        for way, found in ((OURS, ours), (name, theirs))
    ]
    for key in grads[0]:
        torch.testing.assert_close(grads[1][key], grads[0][key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backward", [False, True])
def test_every_default_peer_is_measured(backward: bool):
    result = measure(Case(2, 64, 4, 4, "bf16", backward), DEFAULT_PEERS, ONCE)
    assert (set(result.seconds), result.skipped) == (set(DEFAULT_PEERS), {})
    assert PEERS[result.best_peer() or ""].kind == "same form"
    found = result.to_dict(Ceilings({"bf16": 1e9}, 1e9))["peers"]
    assert found["plain"]["speed_over_plain"] == 1
    assert found[result.best_peer()]["speed_over_best_peer"] == 1
    assert found[OURS]["times_floor"] == pytest.approx(found[OURS]["ms"]["median"] / found_floor(result))


def found_floor(result: block_.Measured) -> float:
    return 1000 * Ceilings({"bf16": 1e9}, 1e9).floor(result.case)


def test_what_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    class Wrong(PEERS["plain"].create(16, 2, 2).__class__):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0.1

    monkeypatch.setitem(PEERS, "plain", Peer("same form", lambda channels, *size: Wrong(channels)))
    result = measure(Case(2, 16, 4, 4, "fp32", False), [OURS, "plain"], ONCE)
    assert list(result.seconds) == [OURS]
    assert "differs from ours by" in result.skipped["plain"]


def test_what_fails_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setitem(PEERS, "multihead", Peer("other form", lambda *size: Fails()))
    names = [OURS, "multihead", "plain", "timm-bottleneck", "flex"]
    options = Options(CPU, Budget(1, 0.0), max_bytes=5000, max_call_seconds=60)
    skipped = measure(Case(2, 18, 5, 5, "fp32", True), names, options).skipped
    assert skipped["multihead"] == "RuntimeError: no kernel for this"
    assert skipped["timm-bottleneck"].startswith("its weights would take 20,000 bytes, more than max_bytes (5,000)")
    assert "backward" in skipped["flex"]
    assert "plain" not in skipped
    slow = Options(CPU, Budget(1, 0.0), 1e9, max_call_seconds=0)
    skipped = measure(Case(2, 18, 5, 5, "fp32", False), [OURS, "plain", "timm-bottleneck"], slow).skipped
    assert "max_call_seconds (0)" in skipped["plain"]
    assert skipped["timm-bottleneck"].startswith("AssertionError")  # 4 heads do not divide 18


@pytest.mark.skipif(INTERPRETED, reason="Triton interprets the kernels")
def test_the_kernels_are_left_out_on_a_cpu():
    assert "sagan/fused" not in DEFAULT_PEERS
    result = measure(Case(2, 16, 4, 4, "fp32", True), [OURS, "sagan/fused"], ONCE)
    assert list(result.seconds) == [OURS]
    assert "path 'fused' cannot serve" in result.skipped["sagan/fused"]


def test_readings_are_interleaved_and_data_fresh():
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    found = interleaved(calls, Budget(3, 0.0), CPU, lambda: seen.append("new"))
    assert [len(values) for values in found.values()] == [3, 3]
    rounds = "".join(seen).split("new")[1:]
    assert len(rounds) == 4  # the first warms up
    orders = ["".join(dict.fromkeys(one)) for one in rounds]
    assert set(orders[1:]) == {"ab", "ba"}
    assert ratios({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}, "a", "b") == 2


def test_peak_and_largest_batch():
    assert peak_bytes(lambda: torch.ones(1000, 1000) + 1, CPU) == pytest.approx(8e6, rel=1e-3)
    for limit in (0, 1, 2, 3, 100, 1023):
        found = largest_batch(lambda batch, limit=limit: batch <= limit)
        assert limit * 15 / 16 <= found <= limit
    assert largest_batch(lambda batch: True, most=64) == 64
