"""Grafts in a file of their own: what comes back, and what the file holds."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hosts import HOSTS, assert_same, open_gates, rng_states
from stored import HOST, IMAGE, Shift, assert_same_state, digest, fresh_like, grafted, read
from timm.layers import SEModule
from torch import nn

from sagan_attn import SelfAttention2d, __version__, graft, grafts_of, is_grafted, ungraft
from sagan_attn.blocks import Gated, block_names
from sagan_attn.errors import GraftError
from sagan_attn.surgery import point as points_
from sagan_attn.surgery.store import load_grafts, save_grafts


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
    assert described[1]["made_by"].endswith("stored.Shift")
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


def test_channels_last(path: Path):
    host = HOSTS["tv-resnet18"]
    model = grafted({"layer2": "nonlocal", "layer3.0": "sagan"}, host).to(memory_format=torch.channels_last)
    save_grafts(model, path)
    fresh = fresh_like(model, host).to(memory_format=torch.channels_last)
    load_grafts(fresh, path, example_input=host.images(1))
    images = host.images().to(memory_format=torch.channels_last)
    assert_same(fresh(images), model(images))


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
