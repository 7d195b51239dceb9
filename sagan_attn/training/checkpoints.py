"""Checkpoints: which are kept, that they are written whole, and what a run may be continued with."""

from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from sagan_attn.errors import ConfigError
from sagan_attn.files import whole_file
from sagan_attn.training.run import RunPaths

__all__ = ["WholeFileIO", "check_resume", "checkpoint_callbacks"]

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
    """Writes a checkpoint beside its target, flushes it and renames it: the old file or the new one is there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with whole_file(path) as beside:
            super().save_checkpoint(checkpoint, beside, storage_options)


def checkpoint_callbacks(paths: RunPaths) -> list[ModelCheckpoint]:
    """best.ckpt, of the best validation accuracy, and last.ckpt, of every epoch."""
    best = ModelCheckpoint(paths.checkpoints, "best", monitor="val/accuracy", mode="max", enable_version_counter=False)
    last = ModelCheckpoint(paths.checkpoints, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    return [best, last]


def check_resume(config: dict[str, Any], paths: RunPaths, checkpoint: dict[str, Any]) -> None:
    """Refuse to go on with a run under another config: most of it would be ignored in favour of the checkpoint's.

    Raises:
        ConfigError: the differences, by name; or averaged weights without the callback that made them.
    """
    if not paths.config.is_file():
        raise ConfigError(f"{paths.folder} holds no run to go on with: {paths.config.name} is missing")
    before, now = _flat(yaml.safe_load(paths.config.read_text(encoding="utf-8"))), _flat(config)
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
    averaged = "averaging_state" in checkpoint
    if averaged and not any("WeightAveraging" in str(value) for value in now.values()):
        raise ConfigError("the checkpoint holds averaged weights: go on with the same averaging callback")


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if isinstance(config, dict) and config:
        return {k: v for key, value in config.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): config}
