"""Tensors into every function of `sagan_attn.functional`: fitting ones against float64, wrong ones refused by name."""

from collections.abc import Callable
from typing import Any

import torch
from fuzzing import answer, fuzzed, wild
from hypothesis import strategies as st
from tensors import FLOATS, masks, odd, shaped, tensors
from torch import Tensor
from torch.utils import _pytree as pytree

from sagan_attn import functional
from sagan_attn.errors import SaganAttnError

SIDES = st.integers(0, 4)
SOME = st.integers(1, 4)
Draw = Callable[[st.SearchStrategy[Any]], Any]


class Calls:
    """Arguments that each function takes: one method a function, of its name."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.dtype = draw(st.sampled_from(FLOATS))

    def tensor(self, *shape: int) -> Tensor:
        return self.draw(tensors(st.just(shape), (self.dtype,), useless=False))

    def map(self) -> Tensor:
        return self.tensor(self.draw(st.integers(0, 3)), 4 * self.draw(SOME), self.draw(SIDES), self.draw(SIDES))

    def mask(self, *shape: int) -> Tensor | None:
        return self.draw(st.none() | st.builds(lambda seed: shaped(shape, torch.bool, seed), st.integers(0, 5)))

    def rows(self) -> tuple[int, int, int, int, int, int]:
        b, h, n, m, d, size = (self.draw(SOME) for _ in range(6))
        return (b, h, n, m, d, size) if self.draw(st.booleans()) else (b, h, n, self.draw(SIDES), d, size)

    def how(self, b: int, h: int, n: int, m: int, d: int) -> dict[str, Any]:
        """Of score, position and masks, in the ways they go together."""
        draw = self.draw
        how: dict[str, Any] = {"scale": draw(st.sampled_from([1.0, 0.5, 1, 0, -2.0]))}
        score = draw(st.sampled_from(["dot", "dot", "additive", "concatenation"]))
        if score != "dot":
            how |= {"score": score, "vector": self.tensor(h, d if score == "additive" else 2 * d)}
        if draw(st.booleans()):
            how["normalize"] = draw(st.sampled_from(["softmax", "mean"]))
        if draw(st.booleans()):
            lens = torch.randint(0, m + 2, draw(st.sampled_from([(b,), (b, n)])))
            how["valid_lens"] = lens.to(draw(st.sampled_from([torch.int64, torch.int32])))
        if draw(st.booleans()):
            how["mask"] = self.mask(*(draw(st.sampled_from([1, size])) for size in (b, h, n, m)))
        if m and draw(st.booleans()):
            how["position"] = (self.tensor(2 * m - 1, d), self.tensor(1, d))
            how["index"] = torch.randint(0, m, draw(st.sampled_from([(n,), (b, n)])))
        return how

    def attention_weights(self) -> dict[str, Any]:
        b, h, n, m, d, _ = self.rows()
        return {"query": self.tensor(b, h, n, d), "key": self.tensor(b, h, m, d), **self.how(b, h, n, m, d)}

    def attend(self) -> dict[str, Any]:
        b, h, n, m, d, size = self.rows()
        how = self.how(b, h, n, m, d)
        how["path"] = self.draw(st.sampled_from(["auto", "materialised", "chunked"]))
        return {
            "query": self.tensor(b, h, n, d),
            "key": self.tensor(b, h, m, d),
            "value": self.tensor(b, h, m, size),
            "dropout": 0.0,
            **how,
        }

    def attention_output(self) -> dict[str, Any]:
        b, h, n, m, _, size = self.rows()
        return {"weights": self.tensor(b, h, n, m), "value": self.tensor(b, h, m, size)}

    def add_sinusoids(self) -> dict[str, Any]:
        return {"x": self.map()}

    def branch_norm(self) -> dict[str, Any]:
        x = self.map()
        c = x.shape[1]
        stats = self.draw(st.booleans())
        return {
            "x": x,
            "running_mean": shaped((c,), self.dtype, 5) if stats else None,
            "running_var": shaped((c,), self.dtype, 6).abs() + 0.5 if stats else None,
            "batches": self.draw(st.sampled_from([None, torch.tensor(3)])),
            "weight": self.tensor(c),
            "bias": self.tensor(c),
            "training": True if not stats else self.draw(st.booleans()),
            "momentum": self.draw(st.sampled_from([None, 0.1])),
            "eps": 1e-3,
        }

    def causal_lens(self) -> dict[str, Any]:
        b, n = self.draw(SIDES), self.draw(SIDES)
        lens = self.draw(st.sampled_from([None, torch.full((b,), 2), torch.full((b, n), 1)]))
        return {"x": self.tensor(b, n, 3), "valid_lens": lens, "causal": self.draw(st.booleans())}

    def channel_norm(self) -> dict[str, Any]:
        x = self.map()
        bias = self.draw(st.booleans())
        return {"x": x, "weight": self.tensor(x.shape[1]), "bias": self.tensor(x.shape[1]) if bias else None, "eps": 1}

    def context_mask_of(self) -> dict[str, Any]:
        return {"context": None, "mask": self.mask(1, 2, 2), "context_mask": None}

    def context_of(self) -> dict[str, Any]:
        x, same = self.map(), self.draw(st.booleans())
        channels = x.shape[1]
        context = self.tensor(x.shape[0], channels, *x.shape[2:]) if self.draw(st.booleans()) else None
        return {"x": x, "context": context, "channels": channels, "context_channels": channels, "same_size": same}

    def difference(self) -> dict[str, Any]:
        x = self.map()
        return {"y": self.tensor(*x.shape), "x": x}

    def gated_residual(self) -> dict[str, Any]:
        x = self.map()
        return {"x": x, "branch": self.tensor(*x.shape), "gamma": self.tensor(1)}

    def key_mask(self) -> dict[str, Any]:
        return {**self.pool_map()}

    def merge_features(self) -> dict[str, Any]:
        return {"rows": self.tensor(*(self.draw(SIDES) for _ in range(4)))}

    def merge_heads(self) -> dict[str, Any]:
        like = self.map()
        b, _, height, width = like.shape
        return {"rows": self.tensor(b, self.draw(SOME), height * width, self.draw(SOME)), "like": like}

    def pointwise(self) -> dict[str, Any]:
        x, out = self.map(), self.draw(SOME)
        bias = self.tensor(out) if self.draw(st.booleans()) else None
        return {"x": x, "weight": self.tensor(out, x.shape[1], 1, 1), "bias": bias}

    def pointwise_each(self) -> dict[str, Any]:
        x, outs = self.map(), self.draw(st.lists(SOME, min_size=1, max_size=3))
        weights = [self.tensor(out, x.shape[1], 1, 1) for out in outs]
        biases = [self.tensor(out) if self.draw(st.booleans()) else None for out in outs]
        return {"x": x, "weights": weights, "biases": biases}

    def pool_map(self) -> dict[str, Any]:
        x = self.map()
        mask = self.mask(x.shape[0], *x.shape[2:])
        return {"x": x, "size": self.draw(st.integers(1, 6)), "mask": mask, "ceil": self.draw(st.booleans())}

    def relative_tables(self) -> dict[str, Any]:
        d = self.draw(SOME)
        rows = 2 * self.draw(SOME) - 1, 2 * self.draw(SOME) - 1
        return {"height_rel": self.tensor(rows[0], d), "width_rel": self.tensor(rows[1], d), "x": self.map()}

    def residual(self) -> dict[str, Any]:
        shape = self.draw(odd(4))
        return {"x": self.tensor(*shape), "branch": self.tensor(*shape)}

    def sequence_mask(self) -> dict[str, Any]:
        return {"mask": self.mask(2, 1, 3)}

    def sequence_of(self) -> dict[str, Any]:
        return {"x": self.tensor(self.draw(SIDES), self.draw(SIDES), 3), "name": "queries", "size": 3}

    def spectrally_normalized(self) -> dict[str, Any]:
        out, inside = self.draw(SOME), self.draw(SOME)
        u, v = (torch.ones(size, dtype=self.dtype) for size in (out, inside))
        weight = shaped((out, inside, 1, 1), self.dtype).abs() + 0.1
        return {"weight": weight, "u": u, "v": v, "update": self.draw(st.booleans())}

    def split_features(self) -> dict[str, Any]:
        return {"x": self.tensor(self.draw(SIDES), self.draw(SIDES), 4), "heads": self.draw(st.sampled_from([1, 2, 4]))}

    def split_heads(self) -> dict[str, Any]:
        return {"x": self.map(), "heads": self.draw(st.sampled_from([1, 2, 4]))}

    def summarize(self) -> dict[str, Any]:
        return {"x": self.map(), "reduce": self.draw(st.sampled_from(["max", "mean"]))}

    def weighted_mean(self) -> dict[str, Any]:
        x = self.map()
        return {"x": x, "scores": self.tensor(x.shape[0], 1, *x.shape[2:])}


NAMES = list(functional.__all__)
UNCHECKED = ("context_mask_of",)  # chooses one of its arguments, whatever they are
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}


@fuzzed(1500, few=60, name=st.sampled_from(NAMES), data=st.data())
def test_fitting_arguments_give_what_float64_gives(name: str, data: Any):
    torch.manual_seed(0)
    calls = Calls(data.draw)
    arguments = getattr(calls, name)()
    exact = pytree.tree_map(_double, arguments)
    given = pytree.tree_leaves(getattr(functional, name)(**arguments))
    expected = pytree.tree_leaves(getattr(functional, name)(**exact))
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        if isinstance(one, Tensor):
            assert one.isfinite().all()
            tolerance = TOLERANCE[calls.dtype]
            torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().double() if value.is_floating_point() else value.clone()


@fuzzed(3000, few=60, name=st.sampled_from([n for n in NAMES if n not in UNCHECKED]), data=st.data())
def test_wrong_arguments_are_refused_by_name(name: str, data: Any):
    torch.manual_seed(0)
    arguments = getattr(Calls(data.draw), name)()
    changed = data.draw(st.lists(st.sampled_from(list(arguments)), min_size=1, max_size=2, unique=True))
    for key in changed:
        arguments[key] = data.draw(_wrong(arguments[key]))
    culprits = ["input", *arguments, *(word for key in changed for word in _described(arguments[key]))]
    given = answer(lambda: getattr(functional, name)(**arguments), *culprits)
    if not isinstance(given, SaganAttnError):
        for one in pytree.tree_leaves(given):
            assert not isinstance(one, Tensor) or one.layout == torch.strided


def _wrong(value: Any) -> st.SearchStrategy[Any]:
    other = tensors(odd() | st.just(tuple(value.shape) if isinstance(value, Tensor) else (1,)))
    return other | wild | masks((1, 1, 1, 1)) | st.lists(other, max_size=3) | st.tuples(other, other)


def _described(value: Any) -> list[str]:
    """How messages speak of a value."""
    if isinstance(value, Tensor):
        return [str(tuple(value.shape)), str(value.dtype), str(value.device)]
    if isinstance(value, (list, tuple)):
        return [word for one in value for word in _described(one)] + [type(value).__name__]
    return [repr(value)[:30], type(value).__name__]
