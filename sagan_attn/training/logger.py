"""metrics.csv: one row an epoch."""

from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from sagan_attn.training.run import write_text

__all__ = ["EpochCSV"]


class EpochCSV(Logger):
    """Logs to one CSV file, a row an epoch and a column a metric; rows of an earlier part of the run are kept.

    Lightning's CSVLogger writes a row for each call of `log` and deletes the file of a run that is continued.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._rows: dict[int, dict[str, float]] = {}
        if path.is_file():
            for row in pd.read_csv(path).to_dict("records"):
                self._rows[int(row["epoch"])] = {str(k): v for k, v in row.items() if not pd.isna(v)}

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
        self.save()
