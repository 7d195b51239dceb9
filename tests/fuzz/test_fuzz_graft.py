"""graft, sites, ungraft and what takes grafts: wild places, blocks and inputs, and the model as it was when refused."""

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fuzzing import LETTERS, answer, fuzzed, huge, json_values, wild, words
from hosts import Tiny, assert_unchanged, rng_states, snapshot
from hypothesis import strategies as st
from tensors import odd, tensors
from torch import Tensor, nn

from sagan_attn import graft, grafts_of, sites, ungraft
from sagan_attn.blocks import block_names
from sagan_attn.errors import SaganAttnError
from sagan_attn.surgery import prune_heads
from sagan_attn.surgery.select import host_names


class Wide(nn.Module):
    """Maps with the channels last, a module used twice, a dictionary of modules, and two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.parts = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "b": nn.BatchNorm2d(4)})
        self.last = nn.LayerNorm(4)
        self.twice = nn.GELU()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.parts["b"](self.parts["a"](self.twice(self.conv(x if y is None else x + y))))
        return self.head(self.twice(self.last(x.permute(0, 2, 3, 1))).mean((1, 2)))


def _plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "tiny": (Tiny, torch.zeros(1, 3, 16, 16)),
    "wide": (Wide, torch.zeros(2, 2, 6, 5)),
    "plain": (_plain, torch.zeros(1, 3, 9, 9)),
}
FITTING = {"tiny": ["top", "stage", "stem", "down"], "wide": ["conv", "parts.a", "last"], "plain": ["2", "0", "1"]}


def model_of(kind: str, training: bool) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]().train(training)


def _fails(channels: int) -> nn.Module:
    raise ZeroDivisionError("of the factory")


class FailsForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("of the block")


FACTORIES = [
    nn.Identity,
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.Linear,
    _fails,
    FailsForward,
    lambda channels: channels,
    lambda channels: nn.Conv2d(channels, channels, 1),
    lambda channels: nn.Conv2d(channels + 1, channels, 1),
    lambda: nn.Identity(),
    partial(nn.Conv2d, 8, kernel_size=1),
    nn.Identity(),
]
NAMES = sorted({name for make, _ in MODELS.values() for name in host_names(make())})
_number = st.integers(-4, 9) | st.sampled_from(["", "x", "+1", "7x7", "4x", "x4", "1e3", "-0", "9" * 30, "٣"])
meanings = st.builds(lambda kind, n: f"{kind}:{n}", st.sampled_from(["stage", "stride", "resolution"]), _number)
globs = st.lists(st.sampled_from(["*", "**", "st*", "[0-9]", "?", "0", "[", "[!a]*", "top", ""]), max_size=6).map(
    ".".join
)
names = st.sampled_from(NAMES) | globs | meanings | words


def _compiled(text: str) -> Any:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return re.compile(re.escape(text))


regexes = (
    st.text(st.sampled_from(LETTERS + "topsage"), max_size=6) | st.sampled_from(["(a*)*b", ".*", "st.*", ""])
).map(_compiled)
blocks = st.sampled_from([*block_names(), "sagann", ""]) | st.sampled_from(FACTORIES) | wild
details = st.dictionaries(
    st.sampled_from(["block", "name", "gate", "heads", "reduction", "pool", "x"]) | words,
    st.sampled_from(["sagan", "encoder", 1, 2, None, True]) | wild,
    max_size=3,
)
one = names | regexes
places = st.one_of(
    names,
    regexes,
    st.lists(one, max_size=3),
    st.lists(one | wild, max_size=3).map(tuple),
    st.dictionaries(names | regexes | st.tuples(names, names), blocks | details, max_size=2),
    wild,
)
examples = st.one_of(
    st.none(), wild, tensors(odd() | st.tuples(st.integers(0, 2), st.just(3), st.integers(0, 9), st.integers(0, 9)))
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A kind of model and arguments of `graft`, most of which fit."""
    kind = draw(st.sampled_from(list(MODELS)))
    arguments: dict[str, Any] = {"at": draw(st.sampled_from(FITTING[kind])), "example_input": MODELS[kind][1]}
    wrong = {
        "at": places,
        "block": blocks,
        "name": words | wild,
        "gate": st.booleans() | wild,
        "example_input": examples,
        "seed": st.integers() | wild,
        "options": details | wild,
        "max_flops_share": st.sampled_from([0.01, 10]) | wild,
        "max_map_bytes": st.sampled_from([10, 10**9]) | wild,
    }
    if draw(st.booleans()):
        arguments |= {"block": draw(st.sampled_from(block_names())), "gate": draw(st.sampled_from([None, True, False]))}
    for key in draw(st.lists(st.sampled_from(list(wrong)), max_size=3)):
        arguments[key] = draw(wrong[key])
    return kind, arguments


@fuzzed(1500, few=40, call=calls(), training=st.booleans())
def test_graft_leaves_what_it_refuses_and_undoes_what_it_does(call: tuple[str, dict[str, Any]], training: bool):
    kind, arguments = call
    model = model_of(kind, training)
    plain = copy.deepcopy(model)
    before, random = snapshot(model), rng_states()
    made = answer(lambda: graft(model, **arguments))
    assert rng_states() == random
    if isinstance(made, SaganAttnError):
        assert_unchanged(model, before)
        return
    assert len(made)
    if arguments.get("gate") is not False and not _ungated(arguments["at"]):
        x = torch.randn(MODELS[kind][1].shape) * 0.5
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
        model.load_state_dict(plain.state_dict() | {k: v for k, v in model.state_dict().items() if ".grafts." in k})
    ungraft(model)
    assert not grafts_of(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    now = snapshot(model)
    assert {k: v for k, v in now.items() if k != "values"} == {k: v for k, v in before.items() if k != "values"}


def _ungated(at: Any) -> bool:
    return isinstance(at, dict) and any(isinstance(of, dict) and of.get("gate") is False for of in at.values())


@st.composite
def surveys(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A kind of model and arguments of `sites`, of which at most two are wild."""
    kind = draw(st.sampled_from(list(MODELS)))
    arguments: dict[str, Any] = {"example_input": MODELS[kind][1], "block": draw(st.sampled_from(block_names()))}
    wrong = {
        "example_input": examples,
        "block": blocks,
        "options": details | wild,
        "sort_by": st.sampled_from(["flops", "name"]) | wild,
        "max_flops_share": wild,
        "max_map_bytes": wild,
    }
    for key in draw(st.lists(st.sampled_from(list(wrong)), max_size=2)):
        arguments[key] = draw(wrong[key])
    return kind, arguments


@fuzzed(500, few=15, call=surveys())
def test_sites_of_wild_things(call: tuple[str, dict[str, Any]]):
    kind, arguments = call
    model = model_of(kind, training=True)
    before, random = snapshot(model), rng_states()
    found = answer(lambda: sites(model, **arguments))
    assert_unchanged(model, before)
    assert rng_states() == random
    assert isinstance(found, (list, SaganAttnError))


@fuzzed(300, few=15, name=st.sampled_from(["sagan", "top", "top.grafts.sagan"]) | wild, several=st.booleans())
def test_ungraft_of_wild_names(name: Any, several: bool):
    model = model_of("tiny", training=False)
    graft(model, {"top": "sagan", "stage": "nonlocal"}, example_input=MODELS["tiny"][1])
    before = snapshot(model)
    answer(lambda: ungraft(model, [name] if several else name))
    if len(grafts_of(model)) == 2:
        assert_unchanged(model, before)


_heads = st.lists(st.integers(-1, 4), max_size=3) | wild
_prunings = st.dictionaries(
    st.sampled_from(["top", "multihead", "decoder", "stage", "top.grafts.multihead"]) | words,
    _heads | st.dictionaries(st.sampled_from(["attention", "cross"]) | words, _heads, max_size=2),
    max_size=2,
)


@fuzzed(400, few=15, heads=_prunings | wild)
def test_prune_wild_heads(heads: Any):
    model = model_of("tiny", training=False)
    graft(model, {"top": "multihead", "stage": "decoder"}, example_input=MODELS["tiny"][1])
    before = snapshot(model)
    refused = answer(lambda: prune_heads(model, heads))
    if isinstance(refused, SaganAttnError):
        assert_unchanged(model, before)
    else:
        assert model(torch.randn(1, 3, 16, 16)).isfinite().all()


@fuzzed(200, few=15, rates=st.dictionaries(st.sampled_from(["lr", "weight_decay", "gamma_lr_scale"]), wild | huge))
def test_wild_rates(rates: dict[str, Any]):
    model = model_of("tiny", training=False)
    grafts = graft(model, "top", example_input=MODELS["tiny"][1])
    groups = answer(lambda: grafts.param_groups(**{"lr": 0.1, **rates}), *rates)
    if not isinstance(groups, SaganAttnError):
        torch.optim.SGD(groups)


@fuzzed(100, few=10, thing=wild | st.just(torch.zeros(1)))
def test_what_is_no_model(thing: Any):
    for call in (graft, sites, ungraft):
        answer(lambda call=call: call(thing, "top"), "model")


@fuzzed(100, few=10, options=st.dictionaries(words, json_values, max_size=3))
def test_options_of_a_class_are_its_own(options: dict[str, Any]):
    """A class takes what its signature has."""
    model = model_of("tiny", training=False)
    before = snapshot(model)
    made = answer(
        lambda: graft(
            model, "top", nn.BatchNorm2d, gate=False, options=options, example_input=torch.zeros(1, 3, 16, 16)
        )
    )
    if isinstance(made, SaganAttnError):
        assert_unchanged(model, before)
