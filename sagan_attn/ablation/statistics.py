"""Statistics of paired runs: what a difference between two ways of training is worth. Pure functions, no I/O.

Runs are paired by seed: for a seed, all variants share host weights, data order and augmentation, so the difference
within a seed is one observation. Every function takes what it needs as arrays and raises `ConfigError` for what it
cannot serve.

Sources: Westfall and Young, Resampling-Based Multiple Testing, 1993 (max-t); Phipson and Smyth, Permutation P-values
Should Never Be Zero, 2010 ((b + 1) / (m + 1)); Owen, The pigeonhole bootstrap, 2007 (two ways at once); Hesterberg,
What Teachers Should Know about the Bootstrap, 2015 (the narrowness of percentile intervals of few observations).
"""

import math
from dataclasses import dataclass

import numpy as np

from sagan_attn.errors import ConfigError

__all__ = [
    "Interval",
    "detectable_effect",
    "difference_sd",
    "paired_interval",
    "pairing_correlation",
    "run_sd",
    "sign_flip_max_t",
    "smallest_p",
    "two_way_bootstrap",
]

PERMUTATIONS = 2**16
TIE = 1e-10  # statistics closer than this are equal; rounding differs by the order of a sum
CHUNK = 2**22  # numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A mean with its interval [low, high]; `sd` is that of one observation, `n` the number of observations."""

    mean: float
    low: float
    high: float
    sd: float
    n: int

    @property
    def covers_zero(self) -> bool:
        return self.low <= 0 <= self.high


def run_sd(accuracies: np.ndarray) -> float:
    """Standard deviation of one run [seeds] (n - 1 below the line); NaN for fewer than two."""
    values = np.asarray(accuracies, dtype=np.float64)
    return float(values.std(ddof=1)) if values.size > 1 else math.nan


def pairing_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two variants over their seeds; NaN for fewer than three, or where one never varies."""
    one, other = (np.asarray(x, dtype=np.float64) for x in (a, b))
    if one.shape != other.shape or one.ndim != 1:
        raise ConfigError(f"a {one.shape} and b {other.shape} must be two lists of one length, paired by seed")
    if one.size < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def difference_sd(run_sd: float, correlation: float) -> float:
    """Standard deviation of a difference of two runs of that standard deviation and correlation."""
    if not -1 <= correlation <= 1:
        raise ConfigError(f"correlation ({correlation}) must lie between -1 and 1")
    return run_sd * math.sqrt(2 * (1 - correlation))


def paired_interval(differences: np.ndarray, confidence: float = 0.95) -> Interval:
    """The t interval of the mean of differences [seeds], each of one seed.

    Covers the mean over new seeds of the same training, on the same images. Raises `ConfigError` for fewer than two.
    """
    from scipy import stats

    values = _finite(differences, "differences", 1)
    if values.size < 2:
        raise ConfigError(f"differences ({values.size}) must be at least 2: one seed has no spread")
    _check_share(confidence, "confidence")
    mean, sd = float(values.mean()), run_sd(values)
    half = float(stats.t.ppf((1 + confidence) / 2, values.size - 1)) * sd / math.sqrt(values.size)
    return Interval(mean, mean - half, mean + half, sd, values.size)


def sign_flip_max_t(differences: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0) -> np.ndarray:
    """Two-sided p of each column's mean being 0, adjusted for the family of all columns.

    differences [seeds, comparisons] -> p [comparisons].

    Under the null a seed's differences are as likely as the same with all signs flipped (a whole row at once, which
    keeps the correlation between columns). p is the share of flips whose largest |t| over all columns reaches the
    column's own: single-step max-t of Westfall and Young (1993). Exact over all 2^n flips where these are at most
    `permutations`, else of that many random ones, with the observed one counted in.
    """
    values = _finite(differences, "differences", 2)
    seeds, comparisons = values.shape
    if seeds < 1 or comparisons < 1:
        raise ConfigError(f"differences {values.shape} must have at least one seed and one comparison")
    # |t| grows with r = |sum| / sqrt(n * sum of squares), which flips leave finite: t^2 = (n - 1) r^2 / (1 - r^2)
    norms = np.sqrt(seeds * (values**2).sum(axis=0))
    scaled = np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)
    observed = np.abs(scaled.sum(axis=0)) - TIE
    exact = 2**seeds <= permutations
    generator = np.random.default_rng(seed)
    reached = np.zeros(comparisons, dtype=np.int64)
    total = 2**seeds if exact else permutations
    step = max(1, CHUNK // max(seeds, comparisons))
    for start in range(0, total, step):
        count = min(step, total - start)
        if exact:
            codes = np.arange(start, start + count)[:, None]
            signs = 1.0 - 2.0 * ((codes >> np.arange(seeds)) & 1)  # [flips, seeds]
        else:
            signs = 1.0 - 2.0 * generator.integers(0, 2, size=(count, seeds))
        largest = np.abs(signs @ scaled).max(axis=1)  # [flips]
        reached += (largest[:, None] >= observed).sum(axis=0)
    return reached / total if exact else (reached + 1) / (total + 1)


def smallest_p(n_seeds: int, permutations: int = PERMUTATIONS) -> float:
    """The smallest p that `sign_flip_max_t` can give: a difference of one sign in every seed, none larger beside it."""
    if n_seeds < 1:
        raise ConfigError(f"n_seeds ({n_seeds}) must be at least 1")
    return 2.0 / 2**n_seeds if 2**n_seeds <= permutations else 1.0 / (permutations + 1)


def detectable_effect(
    n_seeds: int, sd_difference: float, comparisons: int = 1, power: float = 0.8, alpha: float = 0.05
) -> float:
    """The smallest mean difference that a two-sided paired t test finds, with its sign, with probability `power`.

    By the noncentral t distribution at alpha / comparisons (Bonferroni, which max-t is never worse than). In the unit
    of `sd_difference`.
    """
    from scipy import optimize, special, stats

    if n_seeds < 2:
        raise ConfigError(f"n_seeds ({n_seeds}) must be at least 2: one seed has no spread")
    if comparisons < 1 or not (math.isfinite(sd_difference) and sd_difference >= 0):
        raise ConfigError(f"comparisons ({comparisons}) must be at least 1 and sd_difference ({sd_difference}) not < 0")
    _check_share(power, "power")
    _check_share(alpha, "alpha")
    if power <= alpha / comparisons:
        raise ConfigError(f"power ({power}) must be above alpha / comparisons ({alpha / comparisons})")
    freedom = n_seeds - 1
    limit = float(stats.t.isf(alpha / comparisons / 2, freedom))

    def short(shift: float) -> float:  # special's function, as stats.nct gives NaN for large shifts
        return power - 1 + float(special.nctdtr(freedom, shift, limit))

    high = limit + 1
    while short(high) > 0:
        high *= 2
    shift = optimize.root_scalar(short, bracket=(0.0, high), xtol=1e-10).root
    return float(shift) * sd_difference / math.sqrt(n_seeds)


def two_way_bootstrap(
    correct_a: np.ndarray, correct_b: np.ndarray, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of accuracy a - b over new seeds AND new images. bool [seeds, images] each, paired in both ways.

    Seeds and images are each drawn with replacement, a whole row and a whole column at once (Owen, 2007: the variance
    is a little too large, never too small). The interval is the mean +- t (n - 1 degrees of freedom) times the
    bootstrap's standard error, widened by sqrt(n / (n - 1)), as percentiles of a dozen seeds are too narrow
    (Hesterberg, 2015). `sd` is that of the mean, from the bootstrap; `n` the number of seeds.
    """
    from scipy import stats

    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.shape != b.shape or a.ndim != 2 or a.dtype != bool or b.dtype != bool:
        raise ConfigError(
            f"correct_a {a.dtype} {a.shape} and correct_b {b.dtype} {b.shape} must be bool [seeds, images]"
        )
    seeds, images = a.shape
    if seeds < 2 or images < 2 or resamples < 2:
        raise ConfigError(f"seeds ({seeds}), images ({images}) and resamples ({resamples}) must be at least 2 each")
    _check_share(confidence, "confidence")
    difference = a.astype(np.float32) - b.astype(np.float32)  # [seeds, images]
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, CHUNK // images)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(0, images, size=(count, images)) + images * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)  # [resamples, images]
        by_seed = times.astype(np.float32) @ difference.T / images  # [resamples, seeds]
        rows = generator.integers(0, seeds, size=(count, seeds))
        means[start : start + count] = np.take_along_axis(by_seed, rows, axis=1).mean(axis=1, dtype=np.float64)
    mean, sd = float(difference.mean(dtype=np.float64)), float(means.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, seeds - 1)) * sd * math.sqrt(seeds / (seeds - 1))
    return Interval(mean, mean - half, mean + half, sd, seeds)


def _finite(values: np.ndarray, name: str, dimensions: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise ConfigError(f"{name} {array.shape} must have {dimensions} dimension{'s' if dimensions > 1 else ''}")
    if not np.isfinite(array).all():
        raise ConfigError(f"{name} must be finite; {int((~np.isfinite(array)).sum())} of {array.size} are not")
    return array


def _check_share(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{name} ({value}) must lie between 0 and 1")
