"""Checkpoints: which are kept, that they are written whole, and what a run may be continued with."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from sagan_attn import __version__
from sagan_attn.errors import CheckpointError, ConfigError, FormatError, one_line
from sagan_attn.files import whole_file
from sagan_attn.training.run import FORMAT, FORMAT_KEY, RunPaths, read_checkpoint, read_config

__all__ = ["WholeFileIO", "check_averaging", "check_resume", "checkpoint_callbacks", "newest_checkpoint"]

# What may differ between a run and its continuation: none of it decides what is computed.
FREE = ("model.compile", "model.compile_mode", "data.init_args.num_workers", "data.init_args.cache_bytes")
KEPT_TRAINER = (
    "max_epochs",
    "max_steps",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
)


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint as a whole file.

    Lightning's own way goes through the folder for temporary files, which may be on another disk, and is silent about a
    lack of permission.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written_to: set[Path] = set()  # folders

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError(f"storage_options ({storage_options!r}) must be None: checkpoints are local files")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            torch.save({**checkpoint, FORMAT_KEY: {"format": FORMAT, "library": __version__}}, file)
        self._written_to.add(Path(path).parent.resolve())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As `read_checkpoint`, whatever weights_only says: on the CPU, and no code of the file is run."""
        content = read_checkpoint(path)
        callbacks = content.get("callbacks")
        for state in callbacks.values() if isinstance(callbacks, dict) else ():
            if isinstance(state, dict) and isinstance(state.get("dirpath"), str):
                _follow(state, os.path.realpath(Path(path).parent))
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file beside those that were written, and nothing else.

        Lightning takes the path of the last best checkpoint from the checkpoint that a run goes on from, which may come
        from anybody, and would remove a folder with all that is in it.
        """
        try:
            real = Path(path).resolve()
        except (OSError, RuntimeError, ValueError):  # a circle of links, a name that no file can have
            return
        if real.is_file() and real.suffix == ".ckpt" and real.parent in self._written_to:
            real.unlink()
        elif real.exists():
            print(f"not removed: {one_line(path)}, which the checkpoint names as the one before, is none of this run's")


def checkpoint_callbacks(paths: RunPaths) -> list[ModelCheckpoint]:
    """best.ckpt, of the best validation accuracy, and last.ckpt, of every epoch."""
    best = ModelCheckpoint(paths.checkpoints, "best", monitor="val/accuracy", mode="max", enable_version_counter=False)
    last = ModelCheckpoint(paths.checkpoints, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    return [best, last]


def _follow(state: dict[str, Any], folder: str) -> None:
    """Change the state of a `ModelCheckpoint` to the folder where its checkpoints are now.

    Of a run that was moved, Lightning would forget the best score, and a worse epoch would replace `best.ckpt`.
    """
    before = Path(state["dirpath"])

    def now(path: Any) -> Any:
        return os.path.join(folder, Path(path).name) if isinstance(path, str) and Path(path).parent == before else path

    state["dirpath"] = folder
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if key in state:
            state[key] = now(state[key])
    if isinstance(state.get("best_k_models"), dict):
        state["best_k_models"] = {now(path): score for path, score in state["best_k_models"].items()}


def newest_checkpoint(paths: RunPaths) -> Path | None:
    """The checkpoint of a run that goes furthest; None if it has none. Those that cannot be read are named.

    One that was written between an epoch's last batch and its end is left out: that epoch would never be validated.

    Raises:
        FormatError: a later version of the library wrote one of them.
    """
    found = []
    for path in paths.checkpoints.glob("*.ckpt"):
        try:
            content = read_checkpoint(path)
            epochs, batches = _progress(content)
        except FormatError:  # to begin anew would write over what a later version did
            raise
        except (CheckpointError, KeyError, TypeError) as error:
            print(f"passed over: {error}")
            continue
        if not (batches["is_last_batch"] and epochs["current"]["processed"] < epochs["current"]["ready"]):
            found.append((epochs["current"]["completed"], content["global_step"], path.stat().st_mtime_ns, path))
    return max(found)[-1] if found else None


def _progress(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lightning's counts of epochs and of the batches of the one under way."""
    loop = content["loops"]["fit_loop"]
    return loop["epoch_progress"], loop["epoch_loop.batch_progress"]


def check_resume(config: dict[str, Any], paths: RunPaths) -> None:
    """Refuse to go on with a run under another config: most of it would be ignored in favour of the checkpoint's.

    Raises:
        ConfigError: the differences, by name; or a folder without a run.
        CheckpointError: the run's config cannot be read; `FormatError`: a later version of the library wrote it.
    """
    if not paths.config.is_file():
        raise ConfigError(f"{paths.folder} holds no run to go on with: {paths.config.name} is missing")
    before, now = _flat(read_config(paths)), _flat(config)
    decides = [
        key
        for key in sorted({*before, *now})
        if (key.startswith(("model.", "data.")) and not key.startswith(FREE))
        or key.removeprefix("trainer.") in KEPT_TRAINER
    ]
    changed = [f"{key} {before.get(key)} -> {now.get(key)}" for key in decides if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(
            f"the run in {paths.folder} was made with another config ({'; '.join(changed[:5])}): go on with the same, "
            "or start a new run"
        )


def check_averaging(config: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Raise `ConfigError` for averaged weights without the callback that made them, which would start from them."""
    averaged = "averaging_state" in checkpoint
    if averaged and not any("WeightAveraging" in str(value) for value in _flat(config).values()):
        raise ConfigError("the checkpoint holds averaged weights: go on with the same averaging callback")


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if isinstance(config, dict) and config:
        return {k: v for key, value in config.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): config}
