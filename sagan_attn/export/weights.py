"""The safetensors file of a trained model: its weights, and in the metadata what is needed to rebuild it.

    {"format": 1, "library": "<version>", "host": {...}, "grafts": [{...}], "classes": [...], "transform": {...}}

Reading one parses numbers and words; nothing in it is run, imported or unpickled.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sagan_attn.errors import CheckpointError, FormatError
from sagan_attn.training.data import Preprocess
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.module import check_fit
from sagan_attn.training.network import GraftConfig, build_network
from sagan_attn.training.run import Run

__all__ = ["ExportedModel", "load_exported", "pack", "unpack"]

FORMAT = 1
KEY = "sagan_attn.model"  # of the metadata
KINDS = {"library": str, "host": dict, "grafts": list, "classes": list, "transform": dict}


@dataclass(frozen=True)
class ExportedModel:
    """A trained model read back: `model(transform(image)[None])` gives logits over `classes`.

    Args:
        model: the network with its grafts, in eval mode on the CPU.
        classes: class names.
        transform: from a PIL image or a path to the model's input [3, S, S].
    """

    model: nn.Module
    classes: list[str]
    transform: Preprocess


def load_exported(path: str | Path) -> ExportedModel:
    """The model of a file of `export --to safetensors`. No code of the file is run.

    Raises:
        CheckpointError: the file is missing, damaged or foreign, or its weights do not fit what it describes.
        FormatError: a later version of the library wrote it.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}; `export --to safetensors` writes one")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return unpack(data, str(path))


def pack(run: Run) -> bytes:
    """The file of a run's model."""
    from safetensors.torch import save

    from sagan_attn import __version__

    config = run.config["model"]
    host = asdict(HostConfig(**config["host"])) | {"pretrained": False, "weights": None}  # the weights are here
    content = {
        "format": FORMAT,
        "library": __version__,
        "host": host,
        "grafts": [asdict(GraftConfig(**graft)) for graft in config["grafts"] or []],
        "classes": run.classes,
        "transform": run.transform.to_dict(),
    }
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in run.model.state_dict().items()}
    return save(tensors, {KEY: json.dumps(content)})


def unpack(data: bytes, where: str) -> ExportedModel:
    """The model of a file's bytes. where: its name, for messages. Raises as `load_exported`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = _content(data, where)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{where} is not a whole safetensors file: {error}") from error
    try:
        host = HostConfig(**content["host"])
        grafts = [GraftConfig(**graft) for graft in content["grafts"]]
    except TypeError as error:
        raise CheckpointError(f"{where} does not describe a model: {error}") from error
    if not isinstance(host.name, str) or not isinstance(host.options, dict) or host.pretrained or host.weights:
        raise CheckpointError(f"{where} does not describe a model: its host must have a name, options and no weights")
    transform = Preprocess.from_dict(content["transform"])
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced, so nobody else's should change
        model = build_network(host, grafts, len(content["classes"]), 3, transform.image_size)
    check_fit(model.state_dict(), tensors, where)
    model.load_state_dict(tensors)
    return ExportedModel(model.eval(), content["classes"], transform)


def _content(data: bytes, where: str) -> dict[str, Any]:
    """What the metadata say, checked for the version and for types."""
    length = int.from_bytes(data[:8], "little")
    try:
        content = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{where} is no file of `export --to safetensors`, or not a whole one") from error
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int:  # isinstance would take True for a number
        raise CheckpointError(f"{where} does not say its format version")
    if version > FORMAT:
        raise FormatError(
            f"{where} has format version {version}; this version of the library reads {FORMAT}: update it"
        )
    wrong = [key for key, kind in KINDS.items() if not isinstance(content.get(key), kind)]
    if wrong or not all(isinstance(name, str) for name in content["classes"]):
        raise CheckpointError(f"{where} does not describe a model: {', '.join(wrong) or 'classes'} is missing or wrong")
    return content
