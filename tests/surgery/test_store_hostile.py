"""Files that are edited, damaged or foreign: refused with the reason, the host untouched and nothing of them run."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hosts import assert_unchanged, snapshot
from stored import HOST, IMAGE, KEY, read, refused, write
from torch import Tensor

from sagan_attn import __version__, ungraft
from sagan_attn.errors import GraftError
from sagan_attn.surgery.store import load_grafts

NL = "top.grafts.nonlocal_."


def edited(index: int = 1, **changes: Any) -> Callable[[Any, Any], None]:
    return lambda content, tensors: content["grafts"][index].update(changes)


def without(name: str) -> Callable[[Any, Any], None]:
    return lambda content, tensors: tensors.pop(name)


def put(name: str, value: Tensor) -> Callable[[Any, Any], None]:
    return lambda content, tensors: tensors.update({name: value})


def move(content: Any, tensors: dict[str, Tensor], site: str) -> None:
    content["grafts"] = [{**content["grafts"][1], "site": site}]
    for name in list(tensors):
        value = tensors.pop(name)
        if name.startswith(NL):
            tensors[name.replace("top.", f"{site}.", 1)] = value


def double(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors.update({name.replace(old, new, 1): v.clone() for name, v in tensors.items() if name.startswith(old)})


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
    "no block": (edited(block=""), "'nonlocal_' at 'top' cannot be rebuilt: unknown block ''"),
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
