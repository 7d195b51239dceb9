"""metrics.csv: one row an epoch; where other loggers write; and TensorBoard on a full disk."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from sagan_attn.errors import CheckpointError
from sagan_attn.files import read_text
from sagan_attn.training.run import RunPaths, write_text

__all__ = ["EpochCSV", "EpochRow", "full_disk_of", "place_loggers"]

MAX_BYTES = 100_000_000


class EpochCSV(Logger):
    """Logs to one CSV file, a row an epoch and a column a metric; rows of an earlier part of the run are kept.

    Lightning's CSVLogger writes a row for each call of `log` and deletes the file of a run that is continued. Raises
    `CheckpointError` for a file that is there and none of this class.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._rows: dict[int, dict[str, float]] = {}
        if path.is_file():
            try:
                for row in pd.read_csv(io.StringIO(read_text(path, MAX_BYTES))).to_dict("records"):
                    numbers = {str(k): float(v) for k, v in row.items() if not pd.isna(v)}
                    whole = {key: int(numbers[key]) for key in ("epoch", "step") if key in numbers}
                    self._rows[whole["epoch"]] = numbers | whole
            except (KeyError, ValueError, OverflowError) as error:
                raise CheckpointError(
                    f"{path} is not the log of a run, a row of numbers an epoch: {error}; take it away to go on without"
                ) from error

    @property
    def rows(self) -> list[dict[str, float]]:
        """What was logged, by epoch."""
        return [self._rows[epoch] for epoch in sorted(self._rows)]

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("test/") for key in metrics):
            return  # test_metrics.json has them
        epoch = int(metrics.get("epoch", len(self._rows)))
        row = self._rows.setdefault(epoch, {"epoch": epoch})
        row.update({key: float(value) for key, value in metrics.items() if key != "epoch"})
        row["step"] = step if step is not None else row.get("step", 0)

    @rank_zero_only
    def save(self) -> None:
        if self._rows:
            table = pd.DataFrame(self.rows)
            first = [c for c in ("epoch", "step") if c in table]
            table = table[first + sorted(c for c in table.columns if c not in first)]
            write_text(self.path, table.to_csv(index=False))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.path.parent.is_dir():  # else the fit failed at once, and its folder has been removed
            self.save()


class EpochRow(Checkpoint):  # which Lightning calls after all that logs; this one goes before those that save
    """Writes an epoch's row before the epoch's checkpoint, from which a run that is killed right then goes on."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}  # by all processes together
        for logger in trainer.loggers:
            if isinstance(logger, EpochCSV):
                logger.log_metrics(metrics | {"epoch": trainer.current_epoch}, trainer.global_step - 1)
                logger.save()


@contextmanager
def full_disk_of(folder: Path) -> Iterator[None]:
    """Names the run folder in an `OSError` of TensorBoard, which names no file.

    TensorBoard writes in a thread, whose error is raised again where it is next called: the thread's own traceback is
    left out.
    """
    before = threading.excepthook

    def report(of: threading.ExceptHookArgs) -> None:
        if not (issubclass(of.exc_type, OSError) and type(of.thread).__module__.startswith("tensorboard.")):
            before(of)

    threading.excepthook = report
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        threading.excepthook = before


def place_loggers(configs: Any, paths: RunPaths) -> None:
    """Send what W&B and MLflow write into the run folder, in the parsed configs of loggers, unless they say where.

    By themselves W&B would write into the working directory, and MLflow into a store of files there, which its newer
    versions refuse. MLflow gets a database in the run folder, for which it needs SQLAlchemy.

    configs: of `trainer.logger`: one, a list of them, or None or a bool, which is left alone.
    """
    for config in configs if isinstance(configs, list) else [configs]:
        name, arguments = getattr(config, "class_path", None), getattr(config, "init_args", {})
        if name == "lightning.pytorch.loggers.WandbLogger" and str(arguments["save_dir"]) == ".":
            arguments["save_dir"] = str(paths.folder)
        if name == "lightning.pytorch.loggers.MLFlowLogger" and not arguments["tracking_uri"]:
            arguments["tracking_uri"] = f"sqlite:///{paths.mlflow}"
            arguments["artifact_location"] = arguments["artifact_location"] or str(paths.mlflow_files)
