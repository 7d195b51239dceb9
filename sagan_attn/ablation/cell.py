"""One cell: train, ask, write the result as a whole. Runs in a process of its own."""

import contextlib
import errno
import math
import os
import platform
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from sagan_attn.ablation.evidence import Batches, accuracy, knockouts, logits_of, shares
from sagan_attn.ablation.plan import cell_config
from sagan_attn.ablation.provenance import code_digest
from sagan_attn.ablation.store import BUSY, DONE, FAILED, FORMAT, Store, pack_logits, read_plan
from sagan_attn.errors import ConfigError, NonFiniteError, SaganAttnError
from sagan_attn.files import write_whole
from sagan_attn.surgery import grafts_of
from sagan_attn.training.callbacks import environment
from sagan_attn.training.cli import SaganCLI
from sagan_attn.training.memory import is_out_of_memory, out_of_memory_words
from sagan_attn.training.quiet import quieten

__all__ = ["main", "run_cell"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
code_digest()  # now, of the code that is imported: files may change while processes are forked from this one


class Clock(L.Callback):
    """Seconds of training without validation, and images seen."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def on_train_start(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._since

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.on_train_end()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._since = time.perf_counter()

    def on_exception(self, trainer: Any, *_: Any) -> None:
        if trainer.training:
            self.on_train_end()


class CellCLI(SaganCLI):
    """A `fit` whose training is timed, and may end early with numbers that are not finite."""

    clock: Clock
    divergence: NonFiniteError | None = None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        self.clock = Clock()
        trainer.callbacks.append(self.clock)  # type: ignore[attr-defined]
        return trainer

    def fit(self, **arguments: Any) -> None:
        try:
            super().fit(**arguments)
        except NonFiniteError as error:
            print(f"diverged: {error}")
            self.divergence = error


def run_cell(folder: Path, key: str, threads: int | None = None) -> int:
    """Compute a cell of the plan in a folder, unless it is done or another process is at it. Returns an exit code.

    What goes wrong is written to failure.json; the traceback goes to stderr.
    """
    store = Store(folder)
    with store.lock(key) as free:
        if not free:
            return BUSY
        if store.has_result(key):
            return DONE
        store.sweep(key)
        if threads:
            torch.set_num_threads(threads)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        store.count_attempt(key, f"{started} {os.getpid()}")
        try:
            plan = read_plan(folder)
            cell = next((cell for cell in plan["cells"] if cell["key"] == key), None)
            if cell is None:
                raise ConfigError(f"the plan has no cell {key}: it was changed by another runner")
            with _scratch(store.file(key, "run")) as scratch:
                result = _compute(store, plan, cell, scratch)
            result["provenance"] |= {
                "started": started,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "attempt": store.attempts(key),
            }
            store.write(store.file(key, "result.json"), result)
        except Exception as error:  # whatever it is, it belongs to this cell
            traceback.print_exc()
            if not (isinstance(error, OSError) and error.errno in NO_ROOM):  # the cell then just stays missing
                words = out_of_memory_words(error) if is_out_of_memory(error) else error
                store.write_failure(key, _kind(error), f"{type(error).__name__}: {words}")
            return FAILED
        store.file(key, "failure.json").unlink(missing_ok=True)
        return DONE


def _compute(store: Store, plan: dict[str, Any], cell: dict[str, Any], scratch: Path) -> dict[str, Any]:
    key, variant, stage = cell["key"], plan["variants"][cell["variant"]], plan["stages"][cell["stage"]]
    config = cell_config(variant, stage["set"], cell["budget"], cell["seed"])
    path = store.write_config(key, config)
    # as a text: a file in the folder of an ablation may name fewer classes, and texts in it may be files beside it
    cli = CellCLI(["fit", "--config", path.read_text(encoding="utf-8"), "--run_dir", str(scratch)])
    module: Any = cli.model
    data: Any = cli.datamodule
    trainer: Any = cli.trainer
    _check_data(data, "fit", variant["data"])
    device = trainer.strategy.root_device
    peak = _peak_bytes(device)  # of training: what is asked afterwards differs between variants
    module.to(device)
    rows = _rows(trainer)
    for name in ("metrics.csv", "logits.safetensors"):
        store.file(key, name).unlink(missing_ok=True)  # of another attempt
    if (scratch / "metrics.csv").is_file():  # there is none before the first epoch is complete
        write_whole(store.file(key, "metrics.csv"), (scratch / "metrics.csv").read_bytes())
    validation = Batches(data, data.val_dataloader(), device)
    metrics: dict[str, float | None] = {"train/loss": None, "val/accuracy": None, "val/loss": None}
    if cli.divergence is None:
        metrics["train/loss"] = _finite(rows[-1].get("train/loss"))
        parts = {"val": logits_of(module, validation)}
        if cell["stage"] == "confirm":
            _check_data(data, "test", variant["data"])
            parts["test"] = logits_of(module, Batches(data, data.test_dataloader(), device))
        _write_logits(store.file(key, "logits.safetensors"), parts)
        for split, (logits, labels) in parts.items():
            metrics[f"{split}/accuracy"] = accuracy(logits, labels)
            metrics[f"{split}/loss"] = _finite(F.cross_entropy(logits, labels).item())
    diverged = cli.divergence is not None or _diverged(module.network, rows, metrics)
    images = trainer.global_step * data.batch_size * trainer.accumulate_grad_batches
    known = environment(trainer)
    return {
        "format": FORMAT,
        **cell,
        "kind": variant["kind"],
        "outcome": "diverged" if diverged else "finished",
        "divergence": str(cli.divergence) if cli.divergence else None,
        "metrics": metrics,
        "curves": rows,
        "gammas": {name: _finite(gamma.item()) for name, gamma in grafts_of(module.network).gammas().items()},
        "evidence": {} if diverged else shares(module, validation),
        "knockouts": {} if diverged else knockouts(module, validation),
        "cost": {
            "parameters": variant["parameters"],
            "flops": variant["flops"],
            "train_seconds": cli.clock.seconds,
            "images_per_second": images / cli.clock.seconds if cli.clock.seconds else None,
            "peak_bytes": peak,
        },
        "provenance": {
            "code": code_digest(),
            "git": known["git"],
            "versions": {"python": platform.python_version(), "sagan_attn": known["sagan_attn"], **known["packages"]},
            "machine": f"{known['cpu']}, {known['platform']}",
            "device": known["device"],
            "threads": torch.get_num_threads(),
            "precision": known["precision"],
            "data": "/".join(variant["data"].values()),
        },
    }


def _check_data(data: Any, part: Literal["fit", "test"], planned: Mapping[str, str]) -> None:
    """Raise `ConfigError` for data that are not those the plan was made with."""
    if data.fingerprint(part) != planned[part]:
        raise ConfigError(f"the {part} images have changed since the plan was made: results would not be comparable")


def _rows(trainer: Any) -> list[dict[str, float | None]]:
    """What was logged each epoch: losses, validation and gammas."""
    (csv,) = [logger for logger in trainer.loggers if hasattr(logger, "rows")]
    kept = ("epoch", "train/", "val/", "gamma/")
    return [{name: _finite(value) for name, value in row.items() if name.startswith(kept)} for row in csv.rows]


def _diverged(network: torch.nn.Module, rows: list[dict[str, Any]], metrics: dict[str, float | None]) -> bool:
    losses = [row["train/loss"] for row in rows if "train/loss" in row] + [metrics["val/loss"]]
    return any(loss is None for loss in losses) or any(not p.isfinite().all() for p in network.parameters())


def _finite(value: float | None) -> float | None:
    """The number, or None, because JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _write_logits(path: Path, parts: dict[str, tuple[Tensor, Tensor]]) -> None:
    tensors = {}
    for split, (logits, labels) in parts.items():
        tensors[f"{split}/logits"] = logits.half().contiguous().numpy()
        tensors[f"{split}/labels"] = labels.contiguous().numpy()
    write_whole(path, pack_logits(tensors))


def _peak_bytes(device: torch.device) -> int:
    """Most memory in use: of the GPU's tensors, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _kind(error: Exception) -> str:
    refused = isinstance(error, SaganAttnError)
    return "out of memory" if is_out_of_memory(error) else "refused" if refused else "crash"


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """The run folder of the fit, of which what is needed is copied; what a killed attempt left there is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(folder: str, key: str, threads: int | None, environ: dict[str, str], log: str) -> None:
    """The process of a cell: its output goes to the log, its exit code says how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the runner says when
    Store(folder).prepare(key)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ |= environ
    sys.argv = sys.argv[:1]
    quieten()
    sys.exit(run_cell(Path(folder), key, threads))


if __name__ == "__main__":  # by Ray: one thread a core that the task was given
    main(sys.argv[1], sys.argv[2], 1, {}, str(Store(sys.argv[1]).file(sys.argv[2], "log.txt")))
