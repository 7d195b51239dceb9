"""The random states of a run, kept in its checkpoints: dropout goes on where it was."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist

from sagan_attn.errors import CheckpointError

__all__ = ["RandomState"]

NUMBERS = 624  # of the Mersenne Twister
KEY = "random_states"  # in the checkpoint: of each process, in the order of their ranks


class RandomState(L.Callback):
    """Saves the generators of Python, NumPy and torch of every process, and sets them before the first batch after.

    The data need none of them: their order and augmentation are functions of seed, epoch and batch.
    """

    def __init__(self) -> None:
        self._before: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [random_state(trainer.strategy.root_device)]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, random_state(trainer.strategy.root_device))
        checkpoint[KEY] = states

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get(KEY) or []
        if len(states) == trainer.world_size:  # of another number of processes nothing could be the same
            self._before = states[trainer.global_rank]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._before is not None:
            set_random_state(self._before, trainer.strategy.root_device)
            self._before = None


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all global generators, as `torch.load` reads them with `weights_only`."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set what `random_state` gave. Raises `CheckpointError` for what no generator can be in."""
    name, keys, place, *rest = state["numpy"]
    if keys.shape != (NUMBERS,) or not 0 <= place <= NUMBERS:  # NumPy would read on from there, outside of them
        raise CheckpointError(f"the checkpoint's state of NumPy's generator is none: place {place} of {len(keys)}")
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), place, *rest))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
