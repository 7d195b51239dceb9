"""Two classifiers on the same images: who is right where."""

import math
from dataclasses import dataclass

from scipy.stats import binomtest, norm
from torch import Tensor

__all__ = ["Pairing", "pair"]


@dataclass(frozen=True)
class Pairing:
    """How often two classifiers are right, image by image.

    Args:
        both, only_a, only_b, neither: numbers of images that these get right.
    """

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def images(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of b minus that of a."""
        return (self.only_b - self.only_a) / self.images

    @property
    def p_value(self) -> float:
        """McNemar's test in its exact form: of the images that one alone gets right, each is as often right as the
        other; two-sided (McNemar 1947). 1 where there are no such images."""
        changed = self.only_a + self.only_b
        return float(binomtest(self.only_b, changed, 0.5).pvalue) if changed else 1.0

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Of the difference, over images: the adjusted Wald interval for paired shares (Bonett and Price 2012)."""
        a, b = (self.only_a + 1) / (self.images + 2), (self.only_b + 1) / (self.images + 2)
        half = float(norm.ppf((1 + level) / 2)) * math.sqrt((a + b - (b - a) ** 2) / (self.images + 2))
        return max(-1.0, b - a - half), min(1.0, b - a + half)


def pair(a: Tensor, b: Tensor, labels: Tensor) -> Pairing:
    """Count for predicted classes a and b [N] and true ones [N]; N is at least 1."""
    right_a, right_b = a == labels, b == labels
    counts = (right_a & right_b, right_a & ~right_b, ~right_a & right_b, ~right_a & ~right_b)
    return Pairing(*(int(one.sum()) for one in counts))
