"""The door to attention: every way gives the same numbers, refuses what it cannot serve, and is chosen by the rule."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sagan_attn import functional
from sagan_attn.blocks import create_block
from sagan_attn.errors import BlockError
from sagan_attn.functional import door, paths

TRAINING = ("materialised", "chunked", "sdpa", "sdpa_padded")


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that were gone."""
    names: list[str] = []
    for name, way in list(paths._WAYS.items()):
        monkeypatch.setitem(paths._WAYS, name, lambda *x, name=name, way=way: names.append(name) or way(*x))
    return names


@pytest.mark.parametrize("sizes", [(4, 12), (12, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("path", TRAINING)
def test_same_numbers_and_gradients(path: Any, sizes: tuple[int, int]):
    narrow, wide = sizes
    inputs = [rows(2, 3, n, d, dtype=torch.float64) for n, d in ((7, narrow), (9, narrow), (9, wide))]
    scores = inputs[0] @ inputs[1].mT * 0.6
    expected = scores.softmax(-1) @ inputs[2]
    output = functional.attend(*inputs, 0.6, path=path)
    torch.testing.assert_close(output, expected)
    towards = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(y, inputs, towards) for y in (output, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", TRAINING)
def test_half_precision(path: Any, dtype: torch.dtype):
    inputs = [torch.randn(2, 1, n, d).to(dtype) for n, d in ((30, 8), (40, 8), (40, 32))]
    query, key, value = (x.double() for x in inputs)
    expected = (query @ key.mT).softmax(-1) @ value
    output = functional.attend(*inputs, path=path)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.02)


def test_the_rule(taken: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paths, "CHUNKED_FROM", {"dot": 100, "any": 400})
    monkeypatch.setattr(paths, "PADDED_FROM", 150)
    query, key, value, wide = rows(1, 1, 20, 4), rows(1, 1, 10, 4), rows(1, 1, 10, 8), rows(1, 1, 10, 65)
    position = torch.randn(3, 4), torch.randn(9, 4)
    functional.attend(query[:, :, :9], key, value)
    functional.attend(query, key, value)
    functional.attend(query, key, value, dropout=0.1)
    functional.attend(query[:, :, :10], key, value, position=position)
    functional.attend(query, key, value, normalize="mean")
    with torch.no_grad():
        functional.attend(query[:, :, :12], key, value)
        functional.attend(query, key, value)
        functional.attend(query, key, wide)
    expected = ["materialised", "chunked", "materialised", "materialised", "factored"]
    assert taken == [*expected, "chunked", "sdpa_padded", "chunked"]


def test_exports_get_no_chunks(taken: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paths, "CHUNKED_FROM", {"dot": 1, "any": 1})
    block = create_block("sagan", 8).eval()
    torch.export.export(block, (torch.randn(1, 8, 4, 4),))
    assert set(taken) == {"materialised"}


@pytest.mark.parametrize(
    ("path", "options", "reason"),
    [
        ("sdpa", {"normalize": "mean"}, "score 'dot' with normalize 'mean'"),
        ("sdpa_padded", {"score": "additive", "vector": torch.ones(1, 4)}, "score 'additive' with normalize 'softmax'"),
        ("sdpa", {"position": (torch.ones(3, 4), torch.ones(5, 4))}, "a position in the scores"),
        ("factored", {"normalize": "mean", "dropout": 0.5}, "dropout of weights"),
        ("flex", {"dropout": 0.5}, "dropout of weights"),
        ("flex", {"mask": torch.ones(1, 1, 1, 6, dtype=torch.bool)}, "masks"),
        ("flex", {}, "tensors on the CPU"),
        ("fused", {"normalize": "mean"}, "score 'dot' with normalize 'mean'"),
        ("fused", {}, "tensors on cpu: an NVIDIA GPU is required"),
    ],
)
def test_what_a_way_cannot_serve_is_refused_by_name(path: Any, options: dict[str, Any], reason: str):
    x = rows(1, 1, 6, 4)
    with pytest.raises(BlockError, match=f"path '{path}' cannot serve {reason}"):
        functional.attend(x, x, x, path=path, **options)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors on the CPU pass for such on a GPU with the kernels; the list takes what they were asked for."""
    asked: list[str] = []

    def fused(query: Tensor, key: Tensor, value: Tensor, *how: Any) -> Tensor:
        asked.append("fused")
        return paths._materialised(query, key, value, *how)

    monkeypatch.setattr(door, "INTERPRETED", True)
    monkeypatch.setitem(paths._WAYS, "fused", fused)
    return asked


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((129, 4), torch.float32, "a query 129 wide: at most 128"),
        ((4, 1025), torch.bfloat16, "a value 1025 wide: at most 1024"),
        ((4, 4), torch.float64, "tensors of torch.float64"),
    ],
)
def test_what_the_kernels_cannot_hold(sizes: tuple[int, int], dtype: torch.dtype, reason: str, gpu: list[str]):
    query, value = rows(1, 1, 6, sizes[0], dtype=dtype), rows(1, 1, 6, sizes[1], dtype=dtype)
    with pytest.raises(BlockError, match=f"path 'fused' cannot serve {reason}"):
        functional.attend(query, query, value, path="fused")
    assert not door.kernels_serve(query, query, value, {})
    functional.attend(query[..., :4], query[..., :4], value.float()[..., :4], path="auto")
    assert gpu == []  # on the CPU, whatever serves


def test_a_position_on_a_map_too_large_for_the_kernels(gpu: list[str]):
    x = rows(1, 1, 300, 4)
    with pytest.raises(BlockError, match="path 'fused' cannot serve a position on maps of 300 x 1: at most 256 a side"):
        functional.attend(x, x, x, path="fused", position=(torch.ones(599, 4), torch.ones(1, 4)))


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


def test_the_rule_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    found = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(door, "_warned", set())
    plain = rows(1, 1, 6, 4), rows(1, 1, 6, 4).double(), rows(1, 1, 6, 200)
    x, double, wide = (y.as_subclass(Elsewhere) for y in plain)

    def chosen(x: Tensor, dropout: float = 0.0, **how: Any) -> str:
        return paths.chosen_path(x, x, x, dropout, how)

    assert chosen(x) == "materialised"
    monkeypatch.setattr(paths, "FUSED_FROM", 36)
    assert chosen(x[:, :, :5]) == "materialised"
    assert chosen(x) == chosen(x, 0.5) == chosen(x, position=(torch.ones(3, 4), torch.ones(5, 4))) == "fused"
    assert chosen(x, mask=torch.ones(1, 1, 1, 6, dtype=torch.bool), valid_lens=torch.ones(1, 6).long()) == "fused"
    assert chosen(double) == chosen(wide) == chosen(x, score="additive") == "materialised"
    assert chosen(x, normalize="mean") == "factored"
    monkeypatch.setattr(paths, "CHUNKED_FROM_ON_GPU", 30)
    assert chosen(wide) == "chunked"
    monkeypatch.setattr(paths, "CHUNKED_FROM_ON_GPU", 1000)
    found.major, found.minor = 7, 5
    with pytest.warns(UserWarning, match=r"cannot serve a GPU of compute capability 7.5: at least 8.0 is required"):
        assert chosen(x) == "materialised"
    assert chosen(x) == "materialised"  # and not a word more
    monkeypatch.setattr(door, "TRITON", False)
    with pytest.warns(UserWarning, match="cannot serve a machine without Triton"):
        assert chosen(x) == "materialised"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    monkeypatch.setattr(door, "TRITON", True)
    with pytest.warns(UserWarning, match="tensors on an AMD GPU"):
        assert chosen(x) == "materialised"


def test_an_unknown_path():
    x = rows(1, 1, 6, 4)
    with pytest.raises(BlockError, match=r"path \('fast'\) must be one of auto, materialised, chunked"):
        functional.attend(x, x, x, path="fast")  # type: ignore[arg-type]


def test_a_block_refuses_a_path_that_can_never_serve_it():
    with pytest.raises(BlockError, match="path 'sdpa' cannot serve a position in the scores"):
        create_block("multihead", 8, position="relative", path="sdpa")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not served on the CPU")
def test_flex_attention():
    inputs = [torch.randn(2, 1, n, d, device="cuda") for n, d in ((40, 16), (40, 16), (40, 32))]
    expected = functional.attend(*inputs, 0.5, path="materialised")
    torch.testing.assert_close(functional.attend(*inputs, 0.5, path="flex"), expected, rtol=1e-4, atol=1e-5)
