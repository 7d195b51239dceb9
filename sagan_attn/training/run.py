"""The run folder: what one training run leaves behind, and how to get the model back.

config.yaml                what was run, every default filled in
environment.json           format of the folder, versions, machine, git revision, command, data fingerprint
classes.json               class names; a label is an index into them
transform.json             how an image becomes the model's input
metrics.csv                one row an epoch
tensorboard/               the same for TensorBoard; wandb/, mlflow.db and mlruns/ where asked for
checkpoints/best.ckpt      of the epoch with the best validation accuracy
checkpoints/last.ckpt      of the last epoch, or where a signal stopped the run
finished.json              when the fit was complete
test_metrics.json          accuracy, loss and calibration error on the test split, after `test`
test_logits.safetensors    logits [N, classes] float32 and labels [N] of the test split, in its order
test/                      confusion matrix, accuracy of classes, reliability diagram, worst images
predictions.csv            after `predict`

Checkpoints say their format themselves, under `FORMAT_KEY`: a later version may go on with an older run. Files that say
none are of format 1.
"""

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from sagan_attn.errors import CheckpointError, FormatError
from sagan_attn.files import PART, read_text, write_whole
from sagan_attn.surgery.summary import summary
from sagan_attn.surgery.text import text_table
from sagan_attn.training.data import Preprocess
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.module import check_fit
from sagan_attn.training.network import GraftConfig, build_network
from sagan_attn.training.tensor_files import load_tensors

__all__ = [
    "FORMAT",
    "FORMAT_KEY",
    "Run",
    "RunPaths",
    "load_run",
    "read_checkpoint",
    "read_config",
    "write_json",
    "write_text",
]

FORMAT = 1  # of run folders and checkpoints
FORMAT_KEY = "sagan_attn"  # of a checkpoint: {"format": 1, "library": "<version>"}
MAX_BYTES = 10_000_000  # of a config, or the names of many classes
MAX_VALUES = 200_000  # of which aliases in YAML can make more than there are bytes


class RunPaths:
    """The files of a run folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = self.folder / "config.yaml"
        self.environment = self.folder / "environment.json"
        self.classes = self.folder / "classes.json"
        self.transform = self.folder / "transform.json"
        self.metrics = self.folder / "metrics.csv"
        self.tensorboard = self.folder / "tensorboard"
        self.wandb = self.folder / "wandb"
        self.mlflow = self.folder / "mlflow.db"
        self.mlflow_files = self.folder / "mlruns"
        self.checkpoints = self.folder / "checkpoints"
        self.finished = self.folder / "finished.json"
        self.test_metrics = self.folder / "test_metrics.json"
        self.test_logits = self.folder / "test_logits.safetensors"
        self.test = self.folder / "test"
        self.predictions = self.folder / "predictions.csv"

    def foreign(self) -> list[str]:
        """Names of what is in the folder and not of a run."""
        own = {path.name for path in self._own()}
        found = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(name for name in found if name not in own and not name.endswith(PART))

    def remove(self) -> None:
        """Remove the run; its folder too unless something else is in it. What cannot be removed stays."""
        for path in [*self._own(), *self.folder.glob(f".*{PART}")]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _own(self) -> list[Path]:
        return [path for name, path in vars(self).items() if name != "folder"]

    def checkpoint(self, which: str) -> Path:
        """Path of the checkpoint "best" or "last"."""
        return self.checkpoints / f"{which}.ckpt"


@dataclass(frozen=True)
class Run:
    """A trained model read back: `model(transform(image)[None])` gives logits over `classes`.

    Args:
        folder: where it was read from.
        model: the network with its grafts, in eval mode on the CPU.
        classes: class names.
        transform: from a PIL image or a path to the model's input [3, S, S].
        config: the run's resolved config.
    """

    folder: Path
    model: nn.Module
    classes: list[str]
    transform: Preprocess
    config: dict[str, Any]

    def __repr__(self) -> str:
        """What it is, as a table, and the model's parameters; the model is not run."""
        size = self.transform.image_size
        rows = [
            ["host", str(_named(self.config, "model", "host", "name"))],
            ["data", str(_named(self.config, "data", "class_path")).rpartition(".")[2]],
            ["epochs", str(_named(self.config, "trainer", "max_epochs"))],
            ["input", f"3 x {size} x {size}"],
            ["classes", f"{len(self.classes):,}: {shorten(', '.join(self.classes), 50, placeholder=' ...')}"],
        ]
        return f"{text_table({'run': '<', str(self.folder): '<'}, rows)}\n{summary(self.model)}"


def load_run(path: str | Path, checkpoint: str = "best") -> Run:
    """The model of a run folder, with its classes and transform. checkpoint: "best" or "last".

    Runs no code from the files: hosts and blocks are looked up by name, weights are read as tensors alone.

    Raises:
        CheckpointError: a file is missing, unreadable or foreign, or the weights do not fit the config.
        FormatError: a later version of the library wrote the run or its checkpoint.
    """
    paths = RunPaths(path)
    if not paths.folder.is_dir():
        raise CheckpointError(f"there is no run folder {path}")
    config = read_config(paths)
    classes = _read(paths.classes, json.loads)
    sizes = _read(paths.transform, json.loads)
    if not isinstance(sizes, dict):
        raise CheckpointError(f"{paths.transform} is not the transform of a run: it must be a mapping")
    transform = Preprocess.from_dict(sizes)
    try:
        model_config = config["model"]
        host = HostConfig(**{**model_config["host"], "pretrained": False, "weights": None})
        grafts = [GraftConfig(**graft) for graft in model_config["grafts"] or []]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{paths.config} is not the config of a run: {error!r}") from error
    if not isinstance(host.name, str) or not isinstance(host.options, dict):
        raise CheckpointError(f"{paths.config} is not the config of a run: its host has no name or no options")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{paths.classes} is not a list of class names")
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced, so nobody else's should change
        model = build_network(host, grafts, len(classes), 3, transform.image_size)
    path = paths.checkpoint(checkpoint)
    state = read_checkpoint(path)["state_dict"]
    weights = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
    check_fit(model.state_dict(), weights, str(path))
    model.load_state_dict(weights)
    return Run(paths.folder, model.eval(), classes, transform, config)


def read_config(paths: RunPaths) -> dict[str, Any]:
    """The config of a run, as it is in its folder.

    Raises `CheckpointError`, and `FormatError` for a run of a later version of the library.
    """
    if paths.environment.is_file():
        environment = _read(paths.environment, json.loads)
        if not isinstance(environment, dict):
            raise CheckpointError(f"{paths.environment} is not the environment of a run: it must be a mapping")
        if "format" in environment:
            said = {"format": environment["format"], "library": environment.get("sagan_attn")}
            _check_format(said, paths.environment)
    config = _read(paths.config, yaml.safe_load)
    if not isinstance(config, dict):
        raise CheckpointError(f"{paths.config} is not the config of a run: it must be a mapping")
    return config


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, its tensors on the CPU. No code of the file is run.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint of a training run.
        FormatError: a later version of the library wrote it.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        content = load_tensors(path)
    except Exception as error:  # damaged and foreign files fail in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is not a whole checkpoint of this library: {reason}") from error
    if isinstance(content, dict) and FORMAT_KEY in content:
        _check_format(content[FORMAT_KEY], path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not any(isinstance(key, str) and key.startswith("network.") for key in state):
        raise CheckpointError(f"{path} is not a whole checkpoint of this library: it holds no network")
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise CheckpointError(f"{path} is not a whole checkpoint of this library: {key!r:.100} is no plain tensor")
    return content


def _check_format(said: Any, path: str | Path) -> None:
    """Check what a file says of its format, {"format": 1, "library": "0.1.0"}.

    Raises `FormatError` for a format of a later version, `CheckpointError` for what is none.
    """
    version = said.get("format") if isinstance(said, dict) else None
    if type(version) is not int or not 1 <= version < 1_000_000:  # isinstance would take True for a number
        raise CheckpointError(f"{path} does not say its format version, which is a number from 1")
    if version > FORMAT:
        library = said["library"] if isinstance(said.get("library"), str) else "?"
        raise FormatError(
            f"{path} has format version {version}, written by sagan_attn {library:.40}; this version of the library "
            f"reads {FORMAT}: update it"
        )


def _named(config: Any, *keys: str) -> Any:
    """What stands in a config under nested keys; None where there is nothing."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _read(path: Path, parse: Any) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not a whole run folder: {path.name} is missing")
    try:
        content = parse(read_text(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
    values, found = 0, [content]
    while found and values < MAX_VALUES:
        values, one = values + 1, found.pop()
        found += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []
    if found:
        raise CheckpointError(f"{path} has more than {MAX_VALUES:,} values: it is of no run")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole: the old one or the new one is there, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON as a whole file."""
    write_text(path, json.dumps(content, indent=2) + "\n")
