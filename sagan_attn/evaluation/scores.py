"""Scores of a classifier from its logits: accuracy over images and over classes, confusion, calibration."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

__all__ = ["BINS", "Bin", "Scores", "scores_of", "worst"]

BINS = 15  # of confidence, as in Guo et al. (2017)


@dataclass(frozen=True)
class Bin:
    """Images whose confidence, the largest probability, lies in (low, high].

    Args:
        images: how many.
        confidence, accuracy: their means; NaN without images.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Scores:
    """What a test says of a classifier.

    Args:
        confusion: [C, C] counts of images, a row a true class, a column a predicted one.
        nll: mean negative log-likelihood of the true classes, in nats.
        calibration_error: mean distance of confidence and accuracy over `BINS` bins, weighted by images (Naeini et al.,
            2015).
        bins: of the reliability diagram.
    """

    confusion: np.ndarray
    nll: float
    calibration_error: float
    bins: list[Bin]

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of all images whose largest logit is that of their class."""
        return float(np.trace(self.confusion) / self.images)

    @property
    def recall(self) -> np.ndarray:
        """[C] accuracy within each true class; NaN for a class without images."""
        return _shares(np.diag(self.confusion), self.confusion.sum(axis=1))

    @property
    def precision(self) -> np.ndarray:
        """[C] share of right ones among the images predicted as a class; NaN where none is."""
        return _shares(np.diag(self.confusion), self.confusion.sum(axis=0))

    @property
    def balanced_accuracy(self) -> float:
        """Mean of `recall` over the classes that have images."""
        return float(np.nanmean(self.recall))

    def numbers(self) -> dict[str, Any]:
        """The figures that are one number, for JSON."""
        return {
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "nll": self.nll,
            "calibration_error": self.calibration_error,
            "calibration_bins": BINS,
            "images": self.images,
        }


def scores_of(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of logits [N, C] for images of classes `labels` [N]; N is at least 1."""
    logits, labels, classes = logits.float(), labels.long(), logits.shape[1]
    error = multiclass_calibration_error(logits.softmax(dim=1), labels, classes, n_bins=BINS, norm="l1")
    confusion = multiclass_confusion_matrix(logits, labels, classes)
    return Scores(
        confusion=confusion.numpy(),
        nll=float(F.cross_entropy(logits, labels)),
        calibration_error=float(error),
        bins=_bins(logits, labels),
    )


def worst(logits: Tensor, labels: Tensor, limit: int) -> list[int]:
    """Numbers of the images with the largest loss, worst first, of those that are classified wrongly."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    wrong = logits.argmax(dim=1) != labels
    order = losses.argsort(descending=True, stable=True)
    return order[wrong[order]][:limit].tolist()


def _bins(logits: Tensor, labels: Tensor) -> list[Bin]:
    confidence, prediction = logits.softmax(dim=1).max(dim=1)
    right = (prediction == labels).float()
    edges = torch.linspace(0, 1, BINS + 1)
    place = (torch.bucketize(confidence, edges, right=False) - 1).clamp(min=0)
    found = []
    for number, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        inside = place == number
        mean_confidence, accuracy = (float(values[inside].mean()) for values in (confidence, right))
        found.append(Bin(low, high, int(inside.sum()), mean_confidence, accuracy))
    return found


def _shares(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    return np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes > 0)
