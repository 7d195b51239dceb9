"""Stopping a fit so that it can go on: signals, checkpoints in mid-epoch, processes whose parent has died."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint

from sagan_attn.files import remove_leftovers
from sagan_attn.training.run import RunPaths

__all__ = ["KeepGoing", "StoppedBySignalError"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAVE = 1_000  # what the processes agree on when a checkpoint is due; no signal has that number
ORPHAN_SECONDS = 5.0


class StoppedBySignalError(SystemExit):
    """A fit was stopped by a signal after it wrote a checkpoint.

    Args:
        signum: the signal; the exit code is 128 more.
        folder: of the run.
        advice: how to go on.
    """

    code: int

    def __init__(self, signum: int, folder: Path, advice: str | None = None) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.folder = folder
        self.advice = advice or f"the same command with --run_dir {folder} --resume auto goes on"

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}; {self.advice}"


class KeepGoing(Checkpoint):  # Lightning puts these last, after those that change what is saved
    """Writes `last.ckpt` in mid-epoch from time to time, and when SIGTERM or SIGINT stop the fit.

    A signal stops the fit after the optimizer step at hand, in all processes whichever of them received it; a second
    SIGINT stops at once, as Ctrl-C does elsewhere. No checkpoint is written between the steps of accumulated
    gradients, which it would not hold, nor after an epoch's last batch: the epoch's own follows.

    Args:
        paths: the run folder.
        minutes: time between two checkpoints.
    """

    def __init__(self, paths: RunPaths, minutes: float) -> None:
        self.paths = paths
        self.seconds = 60 * minutes
        self.received = 0
        self._saved = time.monotonic()
        self._handlers: dict[int, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            for folder in (self.paths.folder, self.paths.checkpoints):
                remove_leftovers(folder)
        if _has_launcher_as_parent(trainer):
            threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True, name="end-with-parent").start()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            # after Lightning's own, which talks to other processes from inside of the handler
            heard = [
                signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN
            ]  # as a shell's jobs
            self._handlers = {signum: signal.signal(signum, self._receive) for signum in heard}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for signum, handler in self._handlers.items():
            if signal.getsignal(signum) == self._receive:
                signal.signal(signum, handler)
        self._handlers = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._agreed(trainer, self.received):  # during the validation before; the epoch's checkpoint is there
            self._stop(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate() or loop._num_ready_batches_reached():
            return
        due = SAVE if time.monotonic() - self._saved >= self.seconds else 0
        agreed = self._agreed(trainer, self.received or due)
        if not agreed:
            return
        trainer.save_checkpoint(self.paths.checkpoint("last"), weights_only=False)  # None is logged each time
        self._saved = time.monotonic()
        if agreed != SAVE:
            self._stop(trainer)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum

    def _agreed(self, trainer: Any, wish: int) -> int:
        """What all processes do: a signal that one of them received comes before a checkpoint."""
        if trainer.world_size > 1:
            # two numbers, so that one process's wish for a checkpoint does not hide another's signal
            wishes = torch.tensor([wish % SAVE, wish // SAVE], device=trainer.strategy.root_device)
            dist.all_reduce(wishes, dist.ReduceOp.MAX)
            received, save = wishes.tolist()
            wish = received or save * SAVE
        if wish and wish != SAVE:
            self.received = wish
        return wish

    def _stop(self, trainer: L.Trainer) -> None:
        # Lightning's launcher kills everything as soon as a process that it started ends with another code than 0
        stopped = StoppedBySignalError(self.received, self.paths.folder)
        if _has_launcher_as_parent(trainer):
            stopped.code = 0
        raise stopped


def _has_launcher_as_parent(trainer: Any) -> bool:
    """Whether this process was started by the process of rank 0."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0


def _end_with(parent: int) -> None:
    """End this process when its parent has died: it may wait for that one's part of a collective for many minutes."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_SECONDS)
    os._exit(1)
