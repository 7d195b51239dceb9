"""What `test` leaves in a run folder: logits and scores, and in `test/` tables and pictures of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sagan_attn.errors import CheckpointError
from sagan_attn.evaluation.figures import confusion_figure, reliability_figure
from sagan_attn.evaluation.image_sheets import Picture, answer, image_sheet
from sagan_attn.evaluation.scores import Scores, scores_of, worst
from sagan_attn.files import no_formula, write_whole
from sagan_attn.training.data import ImageData
from sagan_attn.training.run import RunPaths, write_json, write_text
from sagan_attn.viz.draw import save_figure

__all__ = ["ReportTest", "StoredLogits", "covers_all", "read_test_results", "write_test_results"]

FORMAT = "1"
WORST = 24  # images on the sheet


class ReportTest(L.Callback):
    """Writes logits, scores, tables and pictures when a test ends. `paths`: the run folder."""

    def __init__(self, paths: RunPaths) -> None:
        self.paths = paths

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        outputs, pl_module.test_outputs = pl_module.test_outputs, []
        if not covers_all(trainer, sum(len(labels) for _, labels in outputs)):
            return
        logits, labels = torch.cat([logits for logits, _ in outputs]), torch.cat([labels for _, labels in outputs])
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("test/")}
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        scores = scores_of(logits, labels)
        metrics |= {f"test/{key}": value for key, value in scores.numbers().items() if key != "images"}
        write_test_results(self.paths, StoredLogits(logits, labels, data.test_digest()), metrics)
        self._tables(scores, data.classes)
        save_figure(confusion_figure(scores, data.classes), self.paths.test / "confusion.png")
        save_figure(reliability_figure(scores), self.paths.test / "reliability.png")
        self._worst(logits, labels, data)
        print(_summary(scores, data.classes))
        print(f"test metrics and logits: {self.paths.test_metrics}, {self.paths.test_logits}")
        print(f"tables and pictures: {self.paths.test}")

    def _tables(self, scores: Scores, classes: Sequence[str]) -> None:
        names = [no_formula(name) for name in classes]
        confusion = pd.DataFrame(scores.confusion, columns=names)
        confusion.insert(0, "true \\ predicted", names, allow_duplicates=True)
        write_text(self.paths.test / "confusion.csv", confusion.to_csv(index=False))
        by_class = {"class": names, "images": scores.confusion.sum(axis=1), "accuracy": scores.recall}
        table = pd.DataFrame(by_class | {"precision": scores.precision})
        write_text(self.paths.test / "classes.csv", table.to_csv(index=False))
        write_text(self.paths.test / "calibration.csv", pd.DataFrame(scores.bins).to_csv(index=False))

    def _worst(self, logits: Tensor, labels: Tensor, data: ImageData) -> None:
        """The wrongly classified images with the largest loss: a table, and a sheet of the first."""
        order = worst(logits, labels, len(labels))
        probabilities, pictures = logits.float().softmax(dim=1), data.given_pictures("test")
        predicted = probabilities.argmax(dim=1)
        rows = [
            {
                "index": index,
                "image": no_formula(pictures.name(index)),
                "class": no_formula(data.classes[labels[index]]),
                "prediction": no_formula(data.classes[predicted[index]]),
                "probability_class": float(probabilities[index, labels[index]]),
                "probability_prediction": float(probabilities[index, predicted[index]]),
            }
            for index in order
        ]
        columns = ["index", "image", "class", "prediction", "probability_class", "probability_prediction"]
        write_text(self.paths.test / "worst.csv", pd.DataFrame(rows, columns=columns).to_csv(index=False))
        shown = [
            Picture(
                data.preprocess.to_uint8(pictures.open(row["index"])),
                (
                    f"#{row['image']}" if str(row["image"]).isdecimal() else str(row["image"]),
                    f"class {answer(row['class'], row['probability_class'])}",
                    f"taken for {answer(row['prediction'], row['probability_prediction'])}",
                ),
            )
            for row in rows[:WORST]
        ]
        title = (
            f"The {len(shown)} of {len(rows):,} wrongly classified test images with the largest loss: the true class "
            "and the predicted one, each with the model's probability of it"
        )
        save_figure(image_sheet(shown, title), self.paths.test / "worst.png")


@dataclass(frozen=True)
class StoredLogits:
    """Logits of a test.

    Args:
        logits: [N, C] float32, in the order of the test split.
        labels: [N] int64.
        test_data: digest of the test images, their labels and class names; None in files written before there was one.
    """

    logits: Tensor
    labels: Tensor
    test_data: str | None


def write_test_results(paths: RunPaths, results: StoredLogits, metrics: dict[str, float]) -> None:
    """Write logits and metrics into a run folder."""
    paths.test.mkdir(parents=True, exist_ok=True)
    tensors = {"logits": results.logits.contiguous(), "labels": results.labels}
    about = {"format": FORMAT} | ({} if results.test_data is None else {"test_data": results.test_data})
    write_whole(paths.test_logits, save(tensors, about))
    write_json(paths.test_metrics, metrics | {"images": len(results.labels)})


def read_test_results(paths: RunPaths) -> StoredLogits:
    """What `test` stored. Raises `CheckpointError` when it is missing, damaged or of another kind."""
    path = paths.test_logits
    if not path.is_file():
        raise CheckpointError(
            f"{paths.folder} has no {path.name}: run `python train.py test --config {paths.config}` first"
        )
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            logits, labels = file.get_tensor("logits"), file.get_tensor("labels")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if about.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{path} is of format {about['format']!r:.20}; this version reads format {FORMAT}")
    fits = logits.ndim == 2 and labels.shape == logits.shape[:1] and len(labels) and logits.shape[1] > 1
    if not fits or logits.dtype != torch.float32 or labels.dtype != torch.int64:
        raise CheckpointError(f"{path} holds no logits: {tuple(logits.shape)} for {tuple(labels.shape)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise CheckpointError(f"{path} has labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes")
    return StoredLogits(logits, labels, about.get("test_data"))


def covers_all(trainer: Any, seen: int) -> bool:
    """Whether a pass saw the whole test split; if not, say that its results are not kept."""
    images = trainer.datamodule.describe()["sizes"]["test"]
    if seen != images:
        print(f"only {seen} of {images} test images were seen: nothing is written")
    return seen == images


def _summary(scores: Scores, classes: Sequence[str]) -> str:
    order = [index for index in np.argsort(scores.recall, kind="stable") if not np.isnan(scores.recall[index])]
    weakest = ", ".join(f"{classes[index]} {scores.recall[index]:.3f}" for index in order[:3])
    return (
        f"accuracy {scores.accuracy:.4f}, balanced {scores.balanced_accuracy:.4f}, NLL {scores.nll:.4f}, calibration "
        f"error {scores.calibration_error:.4f}; weakest classes: {weakest}"
    )
