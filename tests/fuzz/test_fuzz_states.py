"""State dicts with keys missing, added or renamed, and values of other shapes, dtypes and kinds."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import answer, fuzzed, json_values, wild, words
from hosts import assert_unchanged, rng_states, snapshot
from hypothesis import assume
from hypothesis import strategies as st
from stored import HOST, IMAGE, grafted, read, write
from tensors import DTYPES, odd, tensors
from torch import Tensor

from sagan_attn import load_grafts, save_grafts, ungraft
from sagan_attn.blocks import block_names, create_block
from sagan_attn.blocks.converters import convert, convert_back, sources
from sagan_attn.blocks.sequence import MultiHeadAttention
from sagan_attn.blocks.sequence_layers import Decoder, DecoderLayer, Encoder, EncoderLayer
from sagan_attn.errors import BlockError, SaganAttnError

State = dict[str, Any]


def _ours() -> dict[str, State]:
    found = {name: create_block(name, 8).state_dict() for name in block_names()}
    layers = {"num_hiddens": 8, "num_heads": 2, "ffn_hiddens": 4}
    found |= {"sequence": MultiHeadAttention(4, 4, 4, 4, 2).state_dict()}
    found |= {
        "encoder layer": EncoderLayer(**layers).state_dict(),
        "decoder layer": DecoderLayer(**layers).state_dict(),
    }
    return found | {"stack": Encoder(2, **layers).state_dict(), "decoders": Decoder(1, **layers).state_dict()}


def _theirs() -> dict[tuple[str, str], State]:
    found = {}
    for name, state in OURS.items():
        for source in sources():
            try:
                found[name, source] = convert_back(state, source)
            except BlockError:
                continue
    return found


OURS = _ours()
THEIRS = _theirs()
KEYS = sorted({key for state in (*OURS.values(), *THEIRS.values()) for key in state})
keys = st.sampled_from(KEYS) | words


@st.composite
def mutated(draw: st.DrawFn, state: State) -> State:
    """The state with up to three changes."""
    state = dict(state)
    for _ in range(draw(st.integers(0, 3))):
        if not state:
            break
        key = draw(st.sampled_from(list(state)))
        kind = draw(st.sampled_from(["drop", "add", "rename", "replace", "reshape", "cast", "nan"]))
        value = state[key]
        if kind == "add":
            state[draw(keys)] = draw(tensors(odd()))
        elif kind == "replace":
            state[key] = draw(tensors(odd(), DTYPES) | wild)
        elif kind in ("drop", "rename"):
            del state[key]
            if kind == "rename":
                state[draw(keys)] = value
        elif isinstance(value, Tensor):
            state[key] = _changed(draw, kind, value)
    return state


def _changed(draw: st.DrawFn, kind: str, value: Tensor) -> Tensor:
    if kind == "cast":
        real = value.detach().abs() if value.is_complex() else value.detach()
        return real.to(draw(st.sampled_from(DTYPES)))
    if kind == "nan":
        return torch.full(value.shape, float("nan"))
    return value.flatten() if draw(st.booleans()) else value[None]


@fuzzed(
    1200,
    few=60,
    which=st.sampled_from(list(THEIRS)),
    data=st.data(),
    source=st.sampled_from(["auto", None, "right", "right", "right"]) | st.sampled_from([*sources()]) | wild,
)
def test_convert_gives_a_state_dict_or_says_what_does_not_fit(which: tuple[str, str], data: Any, source: Any):
    state = data.draw(mutated(THEIRS[which]))
    before = {key: id(value) for key, value in state.items()}
    named = which[1] if source == "right" else source
    given = answer(lambda: convert(state, named))
    assert {key: id(value) for key, value in state.items()} == before
    if not isinstance(given, SaganAttnError):
        assert given
        assert all(isinstance(value, Tensor) for value in given.values())
        assert not {value.data_ptr() for value in given.values() if value.numel()} & {
            value.data_ptr() for value in state.values() if isinstance(value, Tensor) and value.numel()
        }


@fuzzed(
    800,
    few=40,
    which=st.sampled_from(list(THEIRS)),
    data=st.data(),
    prefix=st.just("") | st.sampled_from(["", "", "x.", "query"]) | words,
)
def test_convert_back_gives_a_state_dict_or_says_what_does_not_fit(which: tuple[str, str], data: Any, prefix: str):
    name, source = which
    state = data.draw(mutated(OURS[name]))
    like = data.draw(st.none() | mutated(THEIRS[which]) | wild)
    given = answer(lambda: convert_back(state, source, like=like))
    assert isinstance(given, SaganAttnError) or all(isinstance(value, Tensor) for value in given.values())
    prefixed = {f"{data.draw(st.sampled_from(['', prefix]))}{key}": value for key, value in THEIRS[which].items()}
    answer(lambda: convert(prefixed, source, prefix=prefix))


@fuzzed(300, few=20, state=wild | st.dictionaries(words | st.integers() | st.none(), wild, max_size=3))
def test_what_is_no_state_dict(state: Any):
    for call in (lambda: convert(state), lambda: convert_back(state, "sagan"), lambda: convert(state, "fastai")):
        assert isinstance(answer(call), SaganAttnError)


@fuzzed(700, few=40, name=st.sampled_from(block_names()), data=st.data(), strict=st.booleans())
def test_a_block_takes_a_state_dict_or_torch_names_the_keys(name: str, data: Any, strict: bool):
    """`load_state_dict` is torch's; with what it refuses a block still runs."""
    block = create_block(name, 8)
    state = data.draw(mutated(OURS[name]))
    try:
        block.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        assert str(error).startswith("Error(s) in loading state_dict for ")  # noqa: PT017
        assert any(key in str(error) for key in {*state, *OURS[name]})  # noqa: PT017
    x = torch.zeros(1, 8, 3, 3)
    assert block(x).shape == x.shape


@pytest.fixture(scope="session")
def saved_grafts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two grafts."""
    path = tmp_path_factory.mktemp("saved") / "attn.safetensors"
    save_grafts(grafted({"stage": {"block": "sagan", "pool": 2}, "top": {"block": "nonlocal", "reduction": 4}}), path)
    return path


STORED = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@st.composite
def entries(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, Any]:
    """What a file says of its grafts, changed in up to two places."""
    content = copy.deepcopy(content)
    grafts = content["grafts"]
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from([content, *grafts, *grafts, *grafts]))
        kind = draw(st.sampled_from(["drop", "add", "replace", "replace", "swap"]))
        key = draw(st.sampled_from(list(place)))
        if kind == "drop":
            place.pop(key)
        elif kind == "add":
            place[draw(words)] = draw(json_values)
        elif kind == "swap":
            grafts.reverse()
        elif key != "grafts":
            place[key] = draw(json_values | st.sampled_from(OTHERS))
    return content


OTHERS = ["top", "stage", "down", "sagan", "nonlocal_", "nonlocal", "encoder", "NHWC", 8, 16, {"heads": 2}, {"pool": 3}]


@fuzzed(700, few=20, data=st.data())
def test_edited_grafts(saved_grafts: Path, tmp_path: Path, data: Any):
    """With a new signature, so that every change reaches the checks behind it."""
    content, stored = read(saved_grafts)
    content = data.draw(entries(content))
    state: State = dict(stored)
    for _ in range(data.draw(st.integers(0, 1))):
        key = data.draw(st.sampled_from(list(state)))
        del state[key]
        if data.draw(st.booleans()):
            shape = st.just(tuple(stored[key].shape)) | odd()
            state[data.draw(st.just(key) | words)] = (
                data.draw(tensors(shape, STORED, useless=False)).detach().clone(memory_format=torch.contiguous_format)
            )
    path = tmp_path / "edited.safetensors"
    try:
        write(path, content, state, sign="grafts" in content)
    except (UnicodeEncodeError, ValueError):  # what neither JSON nor safetensors has a form for
        assume(False)
    model = HOST.build()
    before, random = snapshot(model), rng_states()
    made = answer(lambda: load_grafts(model, path, example_input=IMAGE))
    assert rng_states() == random
    if not isinstance(made, SaganAttnError):
        assert model(HOST.images()).shape == (2, 5)
        ungraft(model)
    assert_unchanged(model, before)
