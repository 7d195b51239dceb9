"""The file that `save_grafts` writes: safetensors, whose metadata hold one JSON text that says how to rebuild.

    {"format": 1, "library": "<version>", "sha256": "<of grafts and tensors>", "grafts": [{<Entry>}, ...]}

Tensors are named "<site>.grafts.<name>.<key in the block's state dict>". Reading one parses numbers and words; nothing
in it is run, imported or unpickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from sagan_attn.errors import GraftError
from sagan_attn.surgery.point import CHILD

__all__ = ["Entry", "pack", "read_grafts"]

FORMAT = 1
KEY = "sagan_attn.grafts"  # of the metadata; what tells this file from any other safetensors file
HEADER_LIMIT = 100_000_000  # bytes; that of safetensors
SAVE = "save_grafts writes such a file"


@dataclass(frozen=True)
class Entry:
    """One graft, as the file describes it: `Graft` and `Spec` in words."""

    site: str
    name: str
    block: str | None
    made_by: str
    options: dict[str, Any]
    gate: bool
    layout: str
    channels: int

    @property
    def prefix(self) -> str:
        return f"{self.site}.{CHILD}.{self.name}."

    def __str__(self) -> str:
        return f"graft {self.name!r} at {self.site!r}"


_KINDS: dict[str, tuple[type, ...]] = {
    "site": (str,),
    "name": (str,),
    "block": (str, type(None)),
    "made_by": (str,),
    "options": (dict,),
    "gate": (bool,),
    "layout": (str,),
    "channels": (int,),
}


def pack(entries: Sequence[Entry], tensors: Mapping[str, Tensor]) -> bytes:
    """The file of these grafts; tensors are on the CPU and contiguous, and share no memory.

    Raises `GraftError` for a dtype that safetensors does not have.
    """
    from safetensors.torch import save

    from sagan_attn import __version__

    grafts = [asdict(entry) for entry in entries]
    content = {"format": FORMAT, "library": __version__, "sha256": _digest(grafts, tensors), "grafts": grafts}
    try:
        return save(dict(tensors), {KEY: json.dumps(content)})
    except (KeyError, ValueError) as error:
        dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
        raise GraftError(f"a tensor of these grafts ({dtypes}) has no form in a safetensors file: {error}") from error


def read_grafts(path: Path) -> tuple[list[Entry], dict[str, Tensor]]:
    """The grafts that a file describes, and its tensors on the CPU by name.

    Raises `GraftError` for a file that is missing, damaged, foreign or of another format version.
    """
    if not path.is_file():
        raise GraftError(f"there is no file {str(path)!r}; {SAVE}")
    try:
        data, metadata = _read(path)
    except OSError as error:
        raise GraftError(f"{str(path)!r} cannot be read: {error}") from error
    content = _content(path, metadata)
    tensors = _tensors(path, data)
    found = _digest(content["grafts"], tensors)
    if found != content["sha256"]:
        raise GraftError(
            f"{str(path)!r} is damaged or was changed: its sha256 is {found}, {content['sha256']} is required; save it "
            "again or take another copy"
        )
    return [_entry(path, graft) for graft in content["grafts"]], tensors


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """All bytes of a file and the metadata of its header; a file that is not ours is not read to its end."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, HEADER_LIMIT):
            _refuse(path, "is no safetensors file, or not a whole one: its header does not fit into it")
        header = file.read(length)
        try:
            metadata = json.loads(header).get("__metadata__")
        except (ValueError, RecursionError, AttributeError) as error:
            _refuse(path, "is no safetensors file: its header is no JSON object", error)
        if not isinstance(metadata, dict) or KEY not in metadata:
            _refuse(path, f"is a safetensors file, but not one of grafts: its metadata have no {KEY!r}")
        return start + header + file.read(), metadata


def _content(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON text of the metadata, checked for the known version, keys and types."""
    try:
        content = json.loads(metadata[KEY], parse_constant=_no_number)
    except (ValueError, TypeError, RecursionError) as error:
        _refuse(path, f"has metadata {KEY!r} that are no JSON", error)
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        _refuse(path, "does not say its format version")
    if content["format"] != FORMAT:
        raise GraftError(
            f"{str(path)!r} has format version {content['format']}, written by sagan_attn {content.get('library')!r}; "
            f"this version of the library reads {FORMAT}. Update the library, or save the grafts again"
        )
    _check_keys(path, content, {"format": (int,), "library": (str,), "sha256": (str,), "grafts": (list,)}, "the file")
    if not content["grafts"]:
        _refuse(path, "holds no grafts")
    for index, graft in enumerate(content["grafts"]):
        if not isinstance(graft, dict):
            _refuse(path, f"describes graft {index} by a {type(graft).__name__}, not an object")
        _check_keys(path, graft, _KINDS, f"graft {index}")
    return content


def _check_keys(path: Path, found: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], what: str) -> None:
    if found.keys() != kinds.keys():
        missing = ", ".join(sorted(kinds.keys() - found.keys())) or "none"
        unknown = ", ".join(map(repr, sorted(found.keys() - kinds.keys()))) or "none"
        _refuse(path, f"does not describe {what} as this format does: missing keys {missing}, unknown keys {unknown}")
    for key, kind in kinds.items():
        if type(found[key]) not in kind:  # isinstance would take True for a whole number
            names = " or ".join(one.__name__ for one in kind)
            _refuse(path, f"describes {what} wrongly: {key} ({found[key]!r:.100}) must be of type {names}")


def _entry(path: Path, graft: Mapping[str, Any]) -> Entry:
    if graft["layout"] not in ("NCHW", "NHWC"):
        _refuse(path, f"has layout {graft['layout']!r:.100}, which must be 'NCHW' or 'NHWC'")
    if graft["channels"] < 1:
        _refuse(path, f"has channels ({graft['channels']}), which must be at least 1")
    return Entry(**{field.name: graft[field.name] for field in fields(Entry)})


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, AssertionError) as error:
        _refuse(path, "is not a whole safetensors file", error)


def _digest(grafts: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over what is said of the grafts and, by sorted name, name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256(json.dumps(grafts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _refuse(path: Path, why: str, error: BaseException | None = None) -> NoReturn:
    reason = f" ({str(error)[:200] or type(error).__name__})" if error else ""
    raise GraftError(f"{str(path)!r} {why}{reason}; {SAVE}") from error
