"""Grafts in a file of their own: what comes back, what is refused, and that faults leave model and file alone."""

import copy
import functools
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hosts import HOSTS, Host, Tiny, assert_same, assert_unchanged, count_calls, open_gates, rng_states, snapshot
from timm.layers import SEModule
from torch import Tensor, nn

from sagan_attn import SelfAttention2d, __version__, graft, grafts_of, is_grafted, ungraft
from sagan_attn.blocks import Gated, block_names, create_block
from sagan_attn.errors import GraftError
from sagan_attn.surgery import build, graft_file, plan, probe, store
from sagan_attn.surgery import point as points_
from sagan_attn.surgery.heads import prune_heads
from sagan_attn.surgery.store import load_grafts, save_grafts

HOST: Host = HOSTS["tiny"]
IMAGE = torch.zeros(1, 3, 32, 32)
KEY = "sagan_attn.grafts"


class Shift(nn.Module):
    """A block of one's own, with a buffer and an option."""

    def __init__(self, channels: int, by: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("by", torch.full((channels, 1, 1), by))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def grafted(at: Any = "top", host: Host = HOST, **options: Any) -> nn.Module:
    """A host with blocks that do something and have statistics of their own."""
    model = host.build()
    grafts = graft(model, at, example_input=host.images(1), **options)
    open_gates(grafts)
    model.train()
    with torch.no_grad():
        model(host.images())
    return model.eval()


def fresh_like(model: nn.Module, host: Host = HOST) -> nn.Module:
    """A host without grafts and with the host weights of `model`."""
    fresh = host.build()
    weights = {key: value for key, value in model.state_dict().items() if ".grafts." not in key}
    fresh.load_state_dict(weights, strict=True)
    return fresh


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert list(one) == list(two)
    for key in one:
        assert one[key].dtype == two[key].dtype
        assert torch.equal(one[key], two[key]), key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "attn.safetensors"


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "attn.safetensors"
    save_grafts(grafted({"stage": {"block": "sagan", "pool": 2}, "top": {"block": "nonlocal", "reduction": 4}}), path)
    return path.read_bytes()


@pytest.fixture
def saved(saved_once: bytes, path: Path) -> Path:
    path.write_bytes(saved_once)
    return path


# what comes back


@pytest.mark.parametrize("key", ["tiny", "timm-resnet18", "convnext"])
def test_round_trip(key: str, path: Path):
    host = HOSTS[key]
    first, second = host.sites
    at = {first: "biggan", second: {"block": "nonlocal", "reduction": 4, "name": "nl"}}
    model, images = grafted(at, host), host.images()
    open_gates(graft(model, second, SEModule, name="se", gate=True, options={"rd_ratio": 0.25}, example_input=images))
    open_gates(graft(model, second, "encoder", options={"heads": 2}, example_input=images))
    fresh = fresh_like(model, host)
    save_grafts(model, path)
    random = rng_states()
    grafts = load_grafts(fresh, path, example_input=images[:1], blocks={"se": SEModule})
    assert rng_states() == random
    assert [(g.site, g.name, g.path) for g in grafts] == [(g.site, g.name, g.path) for g in grafts_of(model)]
    assert [g.name for g in grafts] == ["biggan", "nl", "se", "encoder"]
    assert isinstance(grafts[2].block, Gated)
    assert grafts[1].block.norm.num_batches_tracked == 1
    assert_same_state(fresh, model)
    assert_same(fresh(images), model(images))
    assert not any(module.training for module in fresh.modules())
    assert_same_state(fresh.train(), model.train())
    assert_same(fresh(images), model(images))  # spectral norms and batch statistics move alike
    assert_same_state(fresh, model)


@pytest.mark.parametrize("name", block_names())
def test_every_registered_block(name: str, path: Path):
    model = HOST.build()
    block = graft(model, "top", name, example_input=IMAGE)[0].block
    generator = torch.Generator().manual_seed(block_names().index(name))
    for value in block.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
        else:
            value.fill_(7)
    save_grafts(model, path)
    fresh = HOST.build()
    load_grafts(fresh, path, example_input=IMAGE)
    assert_same_state(fresh, model)
    assert_same(fresh(HOST.images()), model(HOST.images()))
    again = path.with_name("again")
    save_grafts(fresh, again)
    assert again.read_bytes() == path.read_bytes()


def test_blocks_that_do_not_start_as_the_identity(path: Path):
    at = {
        "stage": {"block": "sagan", "gamma_init": 0.5, "gate": False},
        "stage.0": {"block": "encoder", "norm_first": False, "gate": True},
        "top": {"block": "multihead", "zero_init": False, "gate": False},
        "down": {"block": "botnet", "position_size": (8, 8), "heads": 2},
    }
    model = grafted(at)
    save_grafts(model, path)
    fresh = fresh_like(model)
    load_grafts(fresh, path, example_input=IMAGE)
    assert_same(fresh(HOST.images()), model(HOST.images()))
    specs = {g.site: g.point.specs[g.name] for g in grafts_of(fresh)}
    assert [specs[site].gate for site in at] == [False, True, False, False]


def test_classes_and_factories(path: Path):
    model = grafted({"top": {"block": Shift, "gate": False, "by": 2.0}, "stage": SelfAttention2d})
    graft(model, "top", lambda channels: Shift(channels, 0.5), name="lower", gate=False, example_input=IMAGE)
    save_grafts(model, path)
    described = read(path)[0]["grafts"]
    assert [entry["block"] for entry in described] == [None, None, None]
    assert described[0]["made_by"] == "sagan_attn.blocks.sagan.SelfAttention2d"
    assert described[1]["made_by"].endswith("test_store.Shift")
    assert described[2]["made_by"].endswith("<lambda>")
    blocks = {"shift": Shift, "lower": Shift, "selfattention2d": "sagan"}  # a registered name will do
    fresh = fresh_like(model)
    load_grafts(fresh, path, example_input=IMAGE, blocks=blocks)
    assert_same(fresh(HOST.images()), model(HOST.images()))
    save_grafts(fresh, path)
    assert read(path)[0]["grafts"][0]["block"] == "sagan"


def test_spec_survives_copies_and_pickles(path: Path):
    model = grafted({"top": {"block": Shift, "gate": False, "by": 2.0}, "stage": "sagan"})
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        specs = {g.name: g.point.specs[g.name] for g in grafts_of(other)}
        assert specs == {g.name: g.point.specs[g.name] for g in grafts_of(model)}
        save_grafts(other, path)
        ungraft(other)
    assert specs["shift"].options == '{"by": 2.0}'
    handles = grafts_of(model)
    point = handles[0].point
    handles.remove()
    assert not point.specs


def test_an_option_that_does_not_pickle_stays_out_of_the_model():
    """The options are kept in words, so a grafted model pickles whatever they were."""

    def factory(channels: int, function: Callable[[float], float]) -> nn.Module:
        return Shift(channels, function(1.0))

    model = grafted({"top": {"block": factory, "gate": False, "function": lambda x: x}})
    assert is_grafted(pickle.loads(pickle.dumps(model)))


def test_pickle_of_a_point_without_specs(path: Path):
    model = grafted("top")
    state = model.top.grafts.__getstate__()
    del state["specs"]
    old = points_.GraftPoint.__new__(points_.GraftPoint)
    old.__setstate__(state)
    assert old.specs == {}
    model.top.grafts = old
    assert_same(model(HOST.images()), grafted("top")(HOST.images()))
    with pytest.raises(GraftError, match="'sagan' at 'top' was made by a version that did not record how"):
        save_grafts(model, path)
    ungraft(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_host(dtype: torch.dtype, path: Path):
    model = grafted({"top": "nonlocal"})
    save_grafts(model.to(dtype), path)
    same, other = fresh_like(model).to(dtype), fresh_like(model).float().train()
    load_grafts(same, path, example_input=IMAGE)
    assert_same(same(HOST.images().to(dtype)), model(HOST.images().to(dtype)))
    block = load_grafts(other, path, example_input=IMAGE)[0].block
    assert {value.dtype for value in block.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(block.norm.running_var.to(dtype), model.top.grafts.nonlocal_.norm.running_var)
    assert all(module.training for module in block.modules())


def test_mode_is_kept_per_place(path: Path):
    save_grafts(grafted(["stage", "top"]), path)
    fresh = HOST.build()
    fresh.top.train()
    load_grafts(fresh, path, example_input=IMAGE)
    assert fresh.top.grafts.sagan.training
    assert not fresh.stage[1].grafts.sagan.training
    assert not fresh.training


def test_beside_grafts_that_are_there_already(saved: Path):
    model = HOST.build()
    graft(model, "top", "context-max", example_input=IMAGE)
    load_grafts(model, saved, example_input=IMAGE)
    assert [g.name for g in grafts_of(model)] == ["sagan", "context_max", "nonlocal_"]


class Twice(nn.Module):
    """One stage under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
        self.alias = self.stage

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x)


def test_modules_with_two_names_and_wrapped_models(path: Path):
    model = Twice()
    open_gates(graft(model, "alias", example_input=IMAGE))
    save_grafts(nn.DataParallel(model), path)  # sites are those of the model that was grafted
    description, tensors = read(path)
    assert [entry["site"] for entry in description["grafts"]] == ["alias"]
    assert len(tensors) == len(model.alias[1].grafts.sagan.state_dict())
    fresh = Twice()
    fresh.stage.load_state_dict({k: v for k, v in model.stage.state_dict().items() if "grafts" not in k})
    calls = count_calls(load_grafts(fresh, path, example_input=IMAGE)[0].block)
    assert_same(fresh(IMAGE + 1), model(IMAGE + 1))
    assert len(calls) == 1


def test_file_holds_the_blocks_alone(path: Path):
    host = HOSTS["timm-resnet18"]
    model = grafted({"layer2": "sagan", "layer3.0": "nonlocal"}, host)
    save_grafts(model, str(path))
    description, tensors = read(path)
    assert path.stat().st_size < 0.02 * sum(v.nbytes for v in model.state_dict().values())
    blocks = sum(v.nbytes for g in grafts_of(model) for v in g.block.state_dict().values())
    assert blocks < path.stat().st_size < blocks + 4096
    assert {name.split(".grafts.")[0] for name in tensors} == {"layer2", "layer3.0"}
    assert description.pop("sha256") == digest(description["grafts"], tensors)
    assert description == {
        "format": 1,
        "library": __version__,
        "grafts": [
            {
                "site": site,
                "name": name,
                "block": block,
                "made_by": "",
                "options": {},
                "gate": False,
                "layout": "NCHW",
                "channels": channels,
            }
            for site, name, block, channels in [
                ("layer2", "sagan", "sagan", 128),
                ("layer3.0", "nonlocal_", "nonlocal", 256),
            ]
        ],
    }


# what is refused when saving


def test_nothing_to_save(path: Path):
    with pytest.raises(GraftError, match="Tiny has no grafts to save; graft first"):
        save_grafts(HOST.build(), path)
    assert not path.exists()


@pytest.mark.parametrize("value", [nn.ReLU, {1: 2}, float("nan"), {1, 2}, torch.zeros(2)])
def test_options_that_are_no_json(value: Any, path: Path):
    def factory(channels: int, what: Any) -> nn.Module:
        return Shift(channels)

    model = grafted({"top": {"block": factory, "what": value, "gate": False}})
    with pytest.raises(
        GraftError, match=r"'factory' at 'top' cannot .* its option 'what' cannot be written: JSON .* factory"
    ):
        save_grafts(model, path)
    assert not path.exists()


def test_a_block_changed_since_it_was_grafted(path: Path):
    model = grafted("top")
    model.top.grafts.sagan.query = nn.Conv2d(16, 4, 1)
    with pytest.raises(GraftError, match=r"'sagan' at 'top' was changed since it was made .*query.weight is \(4, 16,"):
        save_grafts(model, path)
    model = grafted("top")
    model.top.grafts.sagan.__class__ = type("Other", (SelfAttention2d,), {})
    with pytest.raises(GraftError, match=r"was changed since .* it is a Other, SelfAttention2d would be made"):
        save_grafts(model, path)
    model = grafted("top")
    model.top.grafts.sagan.register_buffer("extra", torch.zeros(1))
    with pytest.raises(GraftError, match=r"was changed since .*unexpected 'extra'"):
        save_grafts(model, path)


def test_pruned_heads(path: Path):
    model = grafted("top", block="multihead")
    prune_heads(model, {"top": [0]})
    with pytest.raises(GraftError, match=r"'multihead' at 'top' (cannot be saved|was changed)"):
        save_grafts(model, path)


def test_channels_last(path: Path):
    host = HOSTS["tv-resnet18"]
    model = grafted({"layer2": "nonlocal", "layer3.0": "sagan"}, host).to(memory_format=torch.channels_last)
    save_grafts(model, path)
    fresh = fresh_like(model, host).to(memory_format=torch.channels_last)
    load_grafts(fresh, path, example_input=host.images(1))
    images = host.images().to(memory_format=torch.channels_last)
    assert_same(fresh(images), model(images))


def test_tensors_that_cannot_be_saved(path: Path):
    with pytest.raises(GraftError, match=r"'gamma' of .*'top'.* is no plain tensor with values \(.* on meta\)"):
        save_grafts(grafted("top").to("meta"), path)

    class Words(Shift):
        def get_extra_state(self) -> Any:
            return "word"

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(GraftError, match=r"'_extra_state' of .* is no plain tensor with values \(str\)"):
        save_grafts(grafted("top", block=Words, gate=False), path)
    model = grafted("top", block=Shift, gate=False)
    model.top.grafts.shift.by = model.top.grafts.shift.by.to(torch.complex128)
    with pytest.raises(GraftError, match=r"\(torch.complex128\) has no form in a safetensors file"):
        save_grafts(model, path)


def test_two_models_grafted_apart(path: Path):
    pair = nn.Sequential(grafted("top"), grafted("top"))
    with pytest.raises(GraftError, match=r"two of graft 'sagan' at 'top'; Sequential contains models .*grafted apart"):
        save_grafts(pair, path)


def test_paths_that_cannot_be_written(path: Path):
    for wrong in (path / "missing" / "file", path.parent, path.with_name("x" * 300)):
        with pytest.raises(GraftError, match="the grafts cannot be written to"):
            save_grafts(grafted("top"), wrong)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(what: str, saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = saved.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(graft_file.os, what, fail)
    with pytest.raises(GraftError, match=r"cannot be written to .*attn.safetensors': disk full"):
        save_grafts(grafted("top"), saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupted_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = saved.read_bytes()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(graft_file.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_grafts(grafted("top"), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


# what is refused when loading


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def digest(grafts: Any, tensors: dict[str, Tensor]) -> str:
    """The file's sha256, written down a second time."""
    told = json.dumps(grafts, sort_keys=True).encode()
    for name in sorted(tensors):
        value = tensors[name]
        told += json.dumps([name, str(value.dtype), list(value.shape)]).encode()
        told += value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(told).hexdigest()


def write(path: Path, content: Any, tensors: dict[str, Tensor], sign: bool = True) -> None:
    if sign:
        content = {**content, "sha256": digest(content["grafts"], tensors)}
    path.write_bytes(safetensors.torch.save(tensors, {KEY: json.dumps(content)}))


def edited(index: int = 1, **changes: Any) -> Callable[[Any, Any], None]:
    return lambda content, tensors: content["grafts"][index].update(changes)


def refused(path: Path, message: str, model: nn.Module | None = None, **options: Any) -> None:
    model = HOST.build().train() if model is None else model
    before, random = snapshot(model), rng_states()
    with pytest.raises(GraftError, match=message):
        load_grafts(model, path, **{"example_input": IMAGE, **options})
    assert_unchanged(model, before)
    assert rng_states() == random


def without(name: str) -> Callable[[Any, Any], None]:
    return lambda content, tensors: tensors.pop(name)


def put(name: str, value: Tensor) -> Callable[[Any, Any], None]:
    return lambda content, tensors: tensors.update({name: value})


NL = "top.grafts.nonlocal_."
EDITS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "version": (
        lambda c, t: c.update(format=2, library="9.9"),
        "format version 2, written by .*'9.9'; this .* reads 1",
    ),
    "no version": (lambda c, t: c.pop("format"), "does not say its format version"),
    "version True": (lambda c, t: c.update(format=True), "does not say its format version"),
    "no library": (lambda c, t: c.pop("library"), "missing keys library"),
    "unknown key": (lambda c, t: c.update(code="import os"), "missing keys none, unknown keys 'code'"),
    "no grafts": (lambda c, t: c.update(grafts=[]), "holds no grafts"),
    "grafts no list": (lambda c, t: c.update(grafts={}), r"grafts \({}\) must be of type list"),
    "graft no object": (lambda c, t: c.update(grafts=["x"]), "describes graft 0 by a str"),
    "unknown key of a graft": (edited(module="os"), "graft 1 as this format does: .* unknown keys 'module'"),
    "missing key of a graft": (lambda c, t: c["grafts"][0].pop("gate"), "graft 0 .*missing keys gate"),
    "options no object": (edited(options=[]), r"graft 1 wrongly: options \(\[\]\) must be of type dict"),
    "gate a word": (edited(gate="yes"), r"gate \('yes'\) must be of type bool"),
    "channels True": (edited(channels=True), r"channels \(True\) must be of type int"),
    "channels a fraction": (edited(channels=16.0), r"channels \(16.0\) must be of type int"),
    "channels 0": (edited(channels=0), r"channels \(0\), which must be at least 1"),
    "channels beyond all": (edited(channels=10**30), "'nonlocal_' at 'top' cannot be rebuilt"),
    "layout": (edited(layout="CHWN"), "layout 'CHWN', which must be 'NCHW' or 'NHWC'"),
    "other layout": (
        edited(layout="NHWC"),
        "site 'top' puts out 16 channels in NCHW, 16 channels in NHWC are required",
    ),
    "unknown block": (edited(block="nonlocl"), "'nonlocal_' at 'top' cannot be rebuilt: unknown block 'nonlocl'; did"),
    "a dotted block": (edited(block="os.system"), "unknown block 'os.system'"),
    "unknown option": (edited(options={"gama": 1}), "block 'nonlocal' has no option 'gama'"),
    "option of create_block": (edited(options={"name": "sagan"}), "block 'nonlocal' has no option 'name'"),
    "option refused": (edited(options={"reduction": 32}), r"cannot be rebuilt: reduction \(32\) leaves 0"),
    "option of another type": (edited(options={"reduction": {"a": [1]}}), "'nonlocal_' at 'top' cannot be rebuilt"),
    "other options": (
        edited(options={"reduction": 2}),
        r"query.weight is \(4, 16, 1, 1\), \(8, 16, 1, 1\) is required",
    ),
    "a huge block": (
        edited(0, block="botnet", options={"position_size": 10**9}),
        "the tensors of graft 'sagan' at 'stage' are not those of its block: .*missing",
    ),
    "gated": (edited(gate=True), "missing 'gamma', 'block.*unexpected"),
    "unknown site": (edited(site="tip"), "no module 'tip', which is required; near names: .*top"),
    "a path": (edited(site="../../etc/passwd"), "it has no module '../../etc/passwd'"),
    "a glob": (edited(site="t?p"), "it has no module 't[?]p'"),
    "the model itself": (edited(site=""), "it has no module ''"),
    "another kind of module": (lambda c, t: move(c, t, "pair"), "'pair' puts out a tuple"),
    "a module that never fires": (lambda c, t: move(c, t, "unused"), "'unused' never fires"),
    "a path as name": (edited(name="../x"), r"name \('../x'\) must be an identifier"),
    "a name of Module": (edited(name="forward"), r"name \('forward'\) must be an identifier that torch"),
    "a name of the point": (edited(name="sites"), r"name \('sites'\) must be an identifier"),
    "twice": (lambda c, t: c["grafts"].append(c["grafts"][1]), "there are two of graft 'nonlocal_' at 'top'"),
    "one place under two names": (
        lambda c, t: (c["grafts"].append({**c["grafts"][0], "site": "stage.1"}), double(t, "stage.", "stage.1.")),
        "'stage' and 'stage.1' are the same place",
    ),
    "tensor missing": (without(NL + "norm.num_batches_tracked"), "missing 'norm.num_batches_tracked'"),
    "tensor unexpected": (put(NL + "more", torch.zeros(1)), "'nonlocal_' at 'top' are not .* unexpected 'more'"),
    "tensor of no graft": (put("../evil", torch.zeros(1)), "unexpected tensors, of none of its grafts: '../evil'"),
    "tensor misshapen": (put(NL + "norm.bias", torch.zeros(3)), r"norm.bias is \(3,\), \(16,\) is required"),
    "tensor of another kind": (
        put(NL + "norm.bias", torch.zeros(16, dtype=torch.int32)),
        "norm.bias is torch.int32, torch.float32 is required",
    ),
}


def move(content: Any, tensors: dict[str, Tensor], site: str) -> None:
    content["grafts"] = [{**content["grafts"][1], "site": site}]
    for name in list(tensors):
        value = tensors.pop(name)
        if name.startswith(NL):
            tensors[name.replace("top.", f"{site}.", 1)] = value


def double(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors.update({name.replace(old, new, 1): v.clone() for name, v in tensors.items() if name.startswith(old)})


@pytest.mark.parametrize("case", EDITS)
def test_edited_files(case: str, saved: Path):
    edit, message = EDITS[case]
    content, tensors = read(saved)
    edit(content, tensors)
    write(saved, content, tensors)
    refused(saved, message)


def test_damage_is_seen(saved: Path):
    data = saved.read_bytes()
    saved.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(saved, "is damaged or was changed: its sha256 is [0-9a-f]{64}, [0-9a-f]{64} is required; save it again")
    content, tensors = read(saved)
    content["grafts"][0]["options"] = {"scale": "sqrt"}  # same tensors, other numbers
    write(saved, content, tensors, sign=False)
    refused(saved, "is damaged or was changed")
    write(saved, {**content, "sha256": "0" * 64}, tensors, sign=False)
    refused(saved, "0{64} is required")
    write(saved, {**content, "sha256": 0}, tensors, sign=False)
    refused(saved, r"sha256 \(0\) must be of type str")


def test_hostile_bytes(saved: Path):
    data = saved.read_bytes()
    header = int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(0)
    noise = bytes(torch.randint(0, 256, (500,), generator=generator).tolist())
    deep = b'{"__metadata__":' + b"[" * 100_000 + b"}"
    for wrong in (
        b"",
        data[:7],
        data[:8],
        data[:50],
        data[: 8 + header],
        data[:-1],
        data + b"\0",
        noise,
        b"\xff" * 8 + data[8:],
        (2**62).to_bytes(8, "little") + data[8:],
        (len(data)).to_bytes(8, "little") + data[8:],
        (0).to_bytes(8, "little") + data[8:],
        (header - 1).to_bytes(8, "little") + data[8:],
        len(deep).to_bytes(8, "little") + deep,
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
        pickle.dumps({"a": 1}),
        data.replace(b'"F32"', b'"F99"'),
        data.replace(b"data_offsets", b"data_offsetz"),
    ):
        saved.write_bytes(wrong)
        refused(saved, r"attn.safetensors' (is no|is not a whole|is a) ")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "NaN", '{"format": NaN}', "[" * 100_000, '{"format": 1}', '{"format": "1"}']
)
def test_hostile_metadata(text: str, saved: Path):
    saved.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {KEY: text}))
    refused(saved, "are no JSON|does not say its format|does not describe")


def test_cut_at_any_byte_or_with_any_byte_changed(saved: Path):
    data, model = saved.read_bytes(), HOST.build()
    generator = torch.Generator().manual_seed(1)
    before = snapshot(model)
    for place in torch.randint(0, len(data), (150,), generator=generator).tolist():
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        for wrong in (data[:place], bytes(changed)):
            saved.write_bytes(wrong)
            try:
                load_grafts(model, saved, example_input=IMAGE)
            except GraftError:
                continue
            assert place < 8 + int.from_bytes(data[:8], "little")  # what the library's version was says nothing
            assert read(saved)[0]["library"] != __version__
            ungraft(model)
    assert_unchanged(model, before)


def test_files_that_are_not_there_or_foreign(tmp_path: Path):
    refused(tmp_path / "none", r"there is no file '.*none'; save_grafts writes such a file")
    refused(tmp_path, "there is no file")
    refused(Path("nul\0byte"), "there is no file")
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, other)
    refused(other, "is a safetensors file, but not one of grafts: its metadata have no 'sagan_attn.grafts'")
    torch.save({"a": torch.zeros(1)}, other)
    refused(other, "is no safetensors file")


def test_nothing_of_the_file_is_executed(saved: Path, monkeypatch: pytest.MonkeyPatch):
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (os, "system")):
        monkeypatch.setattr(module, name, None)
    load_grafts(HOST.build(), saved, example_input=IMAGE)
    content, tensors = read(saved)
    content["grafts"][1].update(block=None, made_by="os.system")
    write(saved, content, tensors)
    refused(saved, r"graft 'nonlocal_' at 'top' \(made by 'os.system'\): a class or factory has no registered name")


def test_hosts_that_do_not_fit(saved: Path):
    refused(saved, "site 'top' puts out 32 channels in NCHW, 16 channels in NCHW are required", Tiny(32))
    refused(saved, "'sagan' at 'stage' does not fit ResNet: .*no module 'stage'", HOSTS["tv-resnet18"].build())
    with pytest.raises(GraftError, match=r"'sagan' at 'stage' .* on the meta device, where it would lose its weights"):
        load_grafts(HOST.build().to("meta"), saved, example_input=IMAGE)
    model = HOST.build()
    model.compile(backend="eager")
    refused(saved, "'the model' is compiled", model)
    model = HOST.build()
    model.top.grafts = nn.Identity()
    refused(saved, "'top' has an attribute 'grafts' of its own", model)


def test_a_graft_of_that_name_is_there(saved: Path):
    model = HOST.build()
    graft(model, "stage.1", "context-max", name="sagan", example_input=IMAGE)
    refused(saved, r"site 'stage' already has a graft named 'sagan' \(at module 'stage.1'\); take it out", model)
    refused(saved, "already has a graft named", grafted({"stage": "sagan", "top": "nonlocal"}))


def test_blocks_to_be_passed(path: Path):
    model = grafted({"top": {"block": SEModule, "gate": True, "rd_ratio": 0.25, "name": "se"}, "stage": "sagan"})
    save_grafts(model, path)
    refused(path, r"'se' at 'top' \(made by 'timm.layers.*SEModule'\): .*; pass blocks={'se': ...} with it")
    refused(path, "pass blocks={'se': ...}", blocks={})
    refused(path, "blocks has 'sagan', but the file asks for 'se'", blocks={"se": SEModule, "sagan": SelfAttention2d})
    refused(path, "'se' at 'top' cannot be rebuilt: block 'selfattention2d' has no option 'rd_ratio'",
            blocks={"se": SelfAttention2d})  # fmt: skip
    refused(path, "must be a registered name, a class or a factory", blocks={"se": nn.Identity()})
    refused(path, "cannot be rebuilt: .*made a int", blocks={"se": lambda channels, rd_ratio: channels})
    refused(
        path, "'se' at 'top' are not those .* unexpected 'block.fc", blocks={"se": lambda c, rd_ratio: nn.Identity()}
    )
    refused(path, "cannot be rebuilt: 1", blocks={"se": lambda c, rd_ratio: {}[1]})
    fitting = functools.partial(create_block, "sagan")
    refused(path, "'se' at 'top' cannot be rebuilt: block 'sagan' has no option 'rd_ratio'", blocks={"se": fitting})
    load_grafts(fresh_like(model), path, example_input=IMAGE, blocks={"se": SEModule})


def test_an_input_the_model_does_not_take(saved: Path):
    model = HOST.build().train()
    before = snapshot(model)
    with pytest.raises(RuntimeError) as raised:
        load_grafts(model, saved, example_input=torch.zeros(1, 4, 32, 32))
    assert any("raised by the model itself" in note for note in raised.value.__notes__)
    assert_unchanged(model, before)


# faults


class FaultError(Exception):
    """Raised by no code but these tests."""


STEPS: list[tuple[Any, str]] = [
    (store, "read_grafts"),
    (graft_file, "_read"),
    (graft_file, "_content"),
    (graft_file, "_tensors"),
    (graft_file, "_digest"),
    (graft_file, "_entry"),
    (store, "_check_distinct"),
    (store, "_makers"),
    (store, "check_block"),
    (store, "check_name"),
    (store, "build_block"),
    (store, "_check_tensors"),
    (store, "_check_names"),
    (store, "_check_sites"),
    (store, "locate"),
    (plan, "check_anchor"),
    (plan, "probe"),
    (probe, "quiet"),
    (probe, "_like_parameters"),
    (Tiny, "forward"),
    (plan, "maps_of"),
    (plan, "check_calls"),
    (store, "_check_maps"),
    (store, "insertion"),
    (plan, "build_block"),
    (build, "create_block"),
    (plan, "check_identity"),
    (plan, "spec_of"),
    (nn.Module, "load_state_dict"),
    (store, "carry_out"),
    (points_, "insert"),
    (points_.GraftPoint, "__init__"),
    (nn.Module, "add_module"),
]


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=lambda part: getattr(part, "__name__", part))
def test_a_fault_at_any_step(owner: Any, name: str, call: int, saved: Path, monkeypatch: pytest.MonkeyPatch):
    """At the first or the second time that the step is taken."""
    model = HOST.build().train()
    before, random = snapshot(model), rng_states()
    real, calls = getattr(owner, name), []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) >= call:
            raise FaultError
        return real(*args, **options)

    monkeypatch.setattr(owner, name, fail)
    try:
        load_grafts(model, saved, example_input=IMAGE)
    except FaultError:
        assert_unchanged(model, before)
    else:
        assert call == 2
        assert len(calls) == 1
        assert [g.name for g in grafts_of(model)] == ["sagan", "nonlocal_"]
    monkeypatch.undo()
    assert calls
    assert rng_states() == random


@pytest.mark.parametrize("call", [1, 2])
def test_a_fault_while_the_hook_is_registered(call: int, saved: Path, monkeypatch: pytest.MonkeyPatch):
    model = HOST.build()
    before, real, calls = snapshot(model), nn.Module.register_forward_hook, []

    def fail(module: nn.Module, hook: Any, **options: Any) -> Any:
        if hook is points_.run_grafts:
            calls.append(1)
            if len(calls) == call:
                raise FaultError
        return real(module, hook, **options)

    monkeypatch.setattr(nn.Module, "register_forward_hook", fail)
    with pytest.raises(FaultError):
        load_grafts(model, saved, example_input=IMAGE)
    assert_unchanged(model, before)
