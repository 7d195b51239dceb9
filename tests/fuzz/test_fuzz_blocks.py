"""Every registered block: wild options, and wild tensors into blocks with good ones."""

import copy
import inspect
from typing import Any

import torch
from block_forms import CASES, CONTROLS, Case, contributing
from fuzzing import answer, fuzzed, huge, wild
from hypothesis import strategies as st
from tensors import DTYPES, FLOATS, masks, odd, shaped, tensors
from torch import Tensor, nn

from sagan_attn.blocks import block_names, create_block
from sagan_attn.blocks.registry import get_form
from sagan_attn.errors import SaganAttnError

CHANNELS = 8
DECODERS = ("cross", "decoder")  # of the names that take a second map


def options_of(name: str) -> list[str]:
    """All keywords of a form but device and dtype."""
    return [p for p in list(inspect.signature(get_form(name).factory).parameters)[1:] if p not in ("device", "dtype")]


GOOD: dict[str, list[Any]] = {
    "heads": [1, 2, 4, 8],
    "reduction": [None, 1, 2, 4],
    "value_reduction": [None, 1, 2],
    "scale": [None, "sqrt", 0.5, "input"],
    "pool": [1, 2, 3, 9],
    "position": [None, "relative", "relative_scaled", "sinusoidal"],
    "position_size": [None, 3, (2, 4), [4, 1]],
    "init": ["torch", "normal", "kaiming", "trunc_normal"],
    "gamma_init": [0.0, 0.5, -1, 1e30],
    "path": ["auto", "materialised", "chunked", "sdpa", "sdpa_padded", "factored", "fused", "flex"],
    "mode": ["embedded_gaussian", "gaussian", "dot_product", "concatenation"],
    "divisor": [1, 2, 8],
    "score": ["dot", "additive"],
    "dropout": [0.0, 0.3, 0],
    "expansion": [1, 2],
    "activation": ["relu", "gelu"],
    "reduce": ["max", "mean"],
    "parameters": [None, 17, 100],
    "context_channels": [None, 8, 5],
}


@st.composite
def blocks(draw: st.DrawFn) -> tuple[str, dict[str, Any], str]:
    """A name, options of which most are good, and a device: "meta" where one may ask for more memory than there is."""
    name = draw(st.sampled_from(block_names()))
    asked = draw(st.lists(st.sampled_from(options_of(name)), max_size=4, unique=True))
    good = {option: st.sampled_from(GOOD.get(option, [True, False])) for option in asked}
    bad = draw(st.lists(st.sampled_from(asked), max_size=2, unique=True)) if asked else []
    options = {option: draw(wild if option in bad else good[option]) for option in asked}
    return name, options, "meta" if _large(options) else "cpu"


def _large(options: Any) -> bool:
    values = options.values() if isinstance(options, dict) else options
    return any(
        _large(value) if isinstance(value, (list, tuple, dict)) else type(value) is int and value > 1000
        for value in values
    )


@fuzzed(2500, few=60, block=blocks(), channels=st.sampled_from([8, 8, 8, 4, 1, 3]))
def test_wild_options(block: tuple[str, dict[str, Any], str], channels: int):
    """A block is made and runs, or is refused with the name of an option."""
    name, options, device = block
    made = answer(lambda: create_block(name, channels, **options, device=device), *options, "channels", "heads")
    if isinstance(made, SaganAttnError):
        return
    assert isinstance(made, nn.Module)
    x = torch.zeros(2, channels, 3, 4, device=device)
    y = answer(lambda: made(x), *options, "context", "heads")
    if not isinstance(y, SaganAttnError):
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)


@fuzzed(
    400, few=20, name=st.sampled_from(block_names()), channels=wild | huge, more=st.dictionaries(st.text("ab_ "), wild)
)
def test_wild_channels_and_keywords(name: str, channels: Any, more: dict[str, Any]):
    device = "meta" if isinstance(channels, int) else "cpu"
    made = answer(
        lambda: create_block(name, channels, **more, device=device), "channels", "no option", "heads", repr(channels)
    )
    assert isinstance(made, SaganAttnError) or made.in_channels == channels


class Asked:
    """What a block of a case is called with."""

    def __init__(self, data: Any, case: Case) -> None:
        self.draw = data.draw
        self.case = case
        self.dtype = self.draw(st.sampled_from(FLOATS))
        self.block = contributing(copy.deepcopy(_made(case))).to(self.dtype).train(self.draw(st.booleans()))

    def map(self, batch: int | None = None) -> Tensor:
        draw = self.draw
        shape = (draw(st.integers(0, 3)) if batch is None else batch, CHANNELS, *draw(_sides))
        return draw(tensors(st.just(shape), (self.dtype,), useless=False))

    def arguments(self, x: Tensor) -> dict[str, Any]:
        draw, more = self.draw, {}
        position = self.case.options.get("position", "relative" if self.case.name == "botnet" else None)
        own = x
        if self.case.name in DECODERS and position is None and draw(st.booleans()):
            own = more["context"] = self.map(len(x))
        if self.case.attends and draw(st.booleans()):
            both = self.case.name == "decoder" and own is not x
            more["mask"] = _mask(draw, x if both else own)
            if both:
                more["context_mask"] = _mask(draw, own)
        return more


_sides = st.tuples(st.integers(0, 5), st.integers(0, 5)) | st.sampled_from([(1, 1), (1, 9), (16, 1)])
_cache: dict[str, nn.Module] = {}


def _made(case: Case) -> nn.Module:
    if case.id not in _cache:
        _cache[case.id] = case.fresh(CHANNELS)
    return _cache[case.id]


def _mask(draw: Any, x: Tensor) -> Tensor:
    return shaped((x.shape[0], *x.shape[2:]), torch.bool, draw(st.integers(0, 9)))


@fuzzed(1500, few=60, case=st.sampled_from(CASES), data=st.data())
def test_any_map_goes_through(case: Case, data: Any):
    """Shape, dtype and device are the input's, finite is what was finite, and the numbers are those of float64."""
    asked = Asked(data, case)
    x = asked.map()
    more = asked.arguments(x)
    exact = copy.deepcopy(asked.block).double()
    torch.manual_seed(0)
    y = asked.block(x, **more)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    assert y.isfinite().all()
    if "dropout" in case.options and asked.block.training:
        return
    torch.manual_seed(0)
    doubles = {key: value.double() if value.is_floating_point() else value for key, value in more.items()}
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}[asked.dtype]
    torch.testing.assert_close(y.double(), exact(x.double(), **doubles), rtol=tolerance, atol=tolerance)


@fuzzed(2000, few=60, case=st.sampled_from(CASES), data=st.data())
def test_wrong_tensors_are_refused_by_name(case: Case, data: Any):
    asked = Asked(data, case)
    x = asked.map()
    arguments: dict[str, Any] = {"x": x, **asked.arguments(x)}
    attends = case.name not in CONTROLS
    more = (["mask"] if attends else []) + (["context"] if case.name in DECODERS else [])
    more += ["context_mask"] if case.name == "decoder" else []
    changed = data.draw(st.lists(st.sampled_from(["x", "x", *more]), min_size=1, max_size=2, unique=True))
    for key in changed:
        if "mask" in key:
            arguments[key] = data.draw(masks((x.shape[0], *x.shape[2:]), (1, 4, 4)))
        else:
            fitting = st.tuples(st.integers(0, 3), st.just(CHANNELS), st.integers(0, 4), st.integers(0, 4))
            arguments[key] = data.draw(tensors(odd() | fitting, DTYPES) | wild)
    x = arguments.pop("x")
    before = {key: value.clone() for key, value in asked.block.state_dict().items()}
    y = answer(lambda: asked.block(x, **arguments), "input", "mask", "context", "key")
    if isinstance(y, SaganAttnError):
        for key, value in asked.block.state_dict().items():
            assert torch.equal(value, before[key]) or "weight_u" in key or "weight_v" in key, key
    else:
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
