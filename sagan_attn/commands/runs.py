"""The trained run that a command is about."""

from pathlib import Path
from typing import TYPE_CHECKING

from sagan_attn.errors import CheckpointError

if TYPE_CHECKING:
    from sagan_attn.training.run import Run

__all__ = ["RUN", "open_run", "run_folder", "which_checkpoint"]

RUN = "run folder of `fit`, or a checkpoint in one"  # help of an argument


def open_run(path: Path, checkpoint: str | None = None) -> "Run":
    """The model of a run folder or of a checkpoint in one; without `checkpoint` the best one, or else the last.

    Raises:
        CheckpointError: no run folder, or one that is not whole.
    """
    from sagan_attn.training.run import load_run

    which = which_checkpoint(path, checkpoint)
    return load_run(run_folder(path), which)


def which_checkpoint(path: Path, checkpoint: str | None = None) -> str:
    """The name of the checkpoint that `open_run` takes. Raises `CheckpointError` for a file of no run folder, and for
    a checkpoint besides which another one is asked for.
    """
    if path.is_file() and path.parent.name == "checkpoints":
        if checkpoint not in (None, path.stem):
            raise CheckpointError(f"{path} is a checkpoint, and not the one that was asked for, {checkpoint!r}")
        return path.stem
    if path.is_file():
        raise CheckpointError(
            f"{path} lies in no run folder: name the folder, which holds config.yaml and checkpoints/"
        )
    if checkpoint is None:
        return "best" if (path / "checkpoints" / "best.ckpt").is_file() else "last"
    return checkpoint


def run_folder(path: Path) -> Path:
    """The run folder of a checkpoint, or the folder itself."""
    return path.parent.parent if path.is_file() and path.parent.name == "checkpoints" else path
