"""Statistics against hand-computed numbers, scipy, naive loops and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from sagan_attn.ablation.statistics import (
    detectable_effect,
    difference_sd,
    paired_interval,
    pairing_correlation,
    run_sd,
    sign_flip_max_t,
    smallest_p,
    two_way_bootstrap,
)
from sagan_attn.errors import ConfigError


def within(count: int, total: int, share: float) -> bool:
    """Whether a simulated count fits a share, to 4 standard errors."""
    return abs(count / total - share) <= 4 * math.sqrt(share * (1 - share) / total)


def naive_max_t(differences: np.ndarray) -> np.ndarray:
    """All sign vectors, one t at a time."""

    def t(column: np.ndarray) -> float:
        with np.errstate(divide="ignore"):
            return abs(np.divide(column.mean(), column.std(ddof=1) / math.sqrt(len(column))))

    observed = [t(column) for column in differences.T]
    flips = list(itertools.product((1, -1), repeat=len(differences)))
    largest = [max(t(column) for column in (differences * np.array(f)[:, None]).T) for f in flips]
    return np.array([sum(each >= one - 1e-9 for each in largest) / len(flips) for one in observed])


def test_spread_by_hand():
    assert run_sd(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(math.sqrt(5 / 3))
    assert math.isnan(run_sd(np.array([1.0])))
    assert pairing_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(0.5)
    assert math.isnan(pairing_correlation(np.array([1.0, 1.0, 1.0]), np.array([1.0, 3.0, 2.0])))
    assert math.isnan(pairing_correlation(np.array([1.0, 2.0]), np.array([1.0, 2.0])))
    assert difference_sd(0.002, 0.5) == pytest.approx(0.002)
    assert difference_sd(0.002, 0) == pytest.approx(0.002 * math.sqrt(2))
    generator = np.random.default_rng(0)
    shared, a, b = generator.normal(size=(3, 20_000))
    correlation = pairing_correlation(shared + a, shared + b)
    assert run_sd(a - b) == pytest.approx(difference_sd(run_sd(shared + a), correlation), rel=0.03)


def test_paired_interval_is_that_of_scipy():
    values = np.random.default_rng(0).normal(0.3, 1, 12)
    for confidence in (0.5, 0.95, 0.99):
        found = paired_interval(values, confidence)
        expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 12)
    # by hand: mean 2, sd 1, t(2; 0.975) = 4.302653
    by_hand = paired_interval(np.array([1.0, 2.0, 3.0]))
    assert (by_hand.low, by_hand.high, by_hand.sd) == pytest.approx((2 - 2.484138, 2 + 2.484138, 1), abs=1e-6)
    same = paired_interval(np.full(5, 0.25))
    assert (same.low, same.high, same.covers_zero) == (0.25, 0.25, False)


def test_paired_interval_covers():
    generator = np.random.default_rng(1)
    intervals = [paired_interval(sample) for sample in generator.normal(0.5, 2, size=(2000, 6))]
    assert within(sum(one.low <= 0.5 <= one.high for one in intervals), 2000, 0.95)


def test_max_t_by_hand():
    # |1 + 2 + 0.5| and |1 + 2 - 0.5| in either sign reach 2.5: 4 of 8 flips
    assert sign_flip_max_t(np.array([[1.0], [2.0], [-0.5]])) == pytest.approx([0.5])
    assert sign_flip_max_t(np.array([[1.0], [2.0], [3.0]])) == pytest.approx([2 / 8])
    # a column of equal signs has its |t| at 2 flips, the other its largest at 2 more; the other's own is reached by all
    assert sign_flip_max_t(np.array([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])) == pytest.approx([4 / 8, 1])
    assert sign_flip_max_t(np.zeros((4, 2))) == pytest.approx([1, 1])
    assert sign_flip_max_t(np.array([[1.0, 0.0]] * 6)) == pytest.approx([2 / 64, 1])  # a column without any difference


@pytest.mark.parametrize(("seeds", "comparisons"), [(3, 1), (6, 4), (8, 3)])
def test_max_t_is_that_of_a_naive_loop(seeds: int, comparisons: int):
    generator = np.random.default_rng(seeds)
    for shift in (0, 1.0):
        table = generator.normal(shift, 1, (seeds, comparisons)) + generator.normal(size=(seeds, 1))
        assert sign_flip_max_t(table) == pytest.approx(naive_max_t(table))
        assert sign_flip_max_t(1e-4 * table * np.arange(1, comparisons + 1)) == pytest.approx(naive_max_t(table))


def test_one_comparison_is_the_permutation_test_of_scipy():
    values = np.random.default_rng(3).normal(0.4, 1, 10)
    expected = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_max_t(values[:, None]) == pytest.approx([expected.pvalue])


def test_random_flips_are_near_exact_ones():
    table = np.random.default_rng(4).normal(0.4, 1, (12, 5))
    exact = sign_flip_max_t(table)
    drawn = sign_flip_max_t(table, permutations=4000)
    assert all(within(round(p * 4001), 4001, share) for p, share in zip(drawn, exact, strict=True))
    assert (drawn == sign_flip_max_t(table, permutations=4000)).all()
    assert (drawn != sign_flip_max_t(table, permutations=4000, seed=1)).any()
    many = np.ones((40, 1))
    assert sign_flip_max_t(many, permutations=999) == pytest.approx([1 / 1000])  # never 0


def test_max_t_holds_its_level_over_a_family():
    generator = np.random.default_rng(5)
    trials = 1500
    hits = 0
    for _ in range(trials):
        table = generator.normal(size=(7, 6)) + generator.normal(size=(7, 1))  # correlated through the baseline
        hits += sign_flip_max_t(table).min() <= 0.05
    assert hits / trials <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / trials)
    assert hits / trials >= 0.02  # not by never rejecting


def test_smallest_p():
    assert [smallest_p(n) for n in (1, 5, 6, 12)] == [1, 0.0625, 0.03125, 2 / 4096]
    assert smallest_p(16) == 2 / 2**16
    assert smallest_p(17) == 1 / (2**16 + 1)
    for seeds in (5, 9):
        assert sign_flip_max_t(np.full((seeds, 3), 0.1))[0] == smallest_p(seeds)


@pytest.mark.parametrize(("sd", "seeds", "comparisons"), [(0.15, 11, 1), (0.2, 18, 1), (0.15, 19, 8), (0.2, 30, 8)])
def test_detectable_effect_at_the_known_scale(sd: float, seeds: int, comparisons: int):
    """CIFAR-10 runs differ by 0.15 to 0.2 %; so many unpaired seeds show 0.2 %, and two fewer do not."""
    assert detectable_effect(seeds, difference_sd(sd, 0), comparisons) <= 0.2 * 1.03
    assert detectable_effect(seeds - 2, difference_sd(sd, 0), comparisons) > 0.2


def test_detectable_effect_is_found_so_often():
    effect = detectable_effect(8, 1.5, power=0.8)
    samples = np.random.default_rng(6).normal(effect, 1.5, size=(4000, 8))
    found = stats.ttest_1samp(samples, 0, axis=1)
    assert within(int(((found.pvalue < 0.05) & (found.statistic > 0)).sum()), 4000, 0.8)
    assert detectable_effect(8, 0.0) == 0
    for seeds, comparisons in itertools.product((2, 3, 12, 60), (1, 8, 100)):
        assert detectable_effect(seeds, 1, comparisons) > detectable_effect(seeds + 1, 1, comparisons) > 0


def test_two_way_bootstrap_by_hand():
    ours, none = np.ones((4, 50), dtype=bool), np.zeros((4, 50), dtype=bool)
    sure = two_way_bootstrap(ours, none, 100)
    assert (sure.mean, sure.low, sure.high, sure.n) == (1, 1, 1, 4)
    # seeds alone differ: the interval is the t interval of the seeds' differences
    some = np.repeat([[True], [False], [True], [False], [True], [True]], 40, axis=1)
    found = two_way_bootstrap(some, np.zeros_like(some), 20_000)
    expected = paired_interval(some.mean(axis=1))
    assert found.mean == pytest.approx(expected.mean)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03)
    # images alone differ: the bootstrap's variance is p (1 - p) / N
    images = np.repeat(np.arange(400)[None] < 100, 5, axis=0)
    found = two_way_bootstrap(images, np.zeros_like(images), 4000)
    assert found.sd == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.06)


def test_two_way_bootstrap_covers_new_seeds_and_images():
    """Runs and images are both drawn anew; an interval by seed alone misses the images' part."""
    generator = np.random.default_rng(7)
    trials, seeds, images, effect = 250, 8, 150, 0.05
    covered = by_seed = 0
    for trial in range(trials):
        image = 0.25 * generator.choice((-1, 1), size=images)  # where a helps and where it hurts
        run = 0.03 * generator.normal(size=(seeds, 1))
        share = 0.5 + effect + image + run
        a, b = (generator.random((seeds, images)) < p for p in (share, 0.5))
        found = two_way_bootstrap(a, b, 200, seed=trial)
        covered += found.low <= effect <= found.high
        narrow = paired_interval(a.mean(axis=1) - b.mean(axis=1))
        by_seed += narrow.low <= effect <= narrow.high
    assert covered / trials >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / trials)
    assert by_seed < covered


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_interval(np.array([1.0])), r"differences \(1\) must be at least 2"),
        (lambda: paired_interval(np.array([1.0, np.nan])), "differences must be finite; 1 of 2 are not"),
        (lambda: paired_interval(np.array([1.0, 2.0]), 95), r"confidence \(95\) must lie between 0 and 1"),
        (lambda: sign_flip_max_t(np.ones(3)), r"differences \(3,\) must have 2 dimensions"),
        (lambda: sign_flip_max_t(np.ones((3, 0))), "at least one seed and one comparison"),
        (lambda: smallest_p(0), r"n_seeds \(0\) must be at least 1"),
        (lambda: detectable_effect(1, 0.1), r"n_seeds \(1\) must be at least 2"),
        (lambda: detectable_effect(5, math.nan), "sd_difference"),
        (lambda: detectable_effect(5, 0.1, power=0.01), "must be above alpha / comparisons"),
        (lambda: difference_sd(0.1, 1.5), r"correlation \(1.5\) must lie between -1 and 1"),
        (lambda: pairing_correlation(np.ones(3), np.ones(4)), "two lists of one length"),
        (lambda: two_way_bootstrap(np.ones((3, 4)), np.ones((3, 4))), "must be bool"),
        (lambda: two_way_bootstrap(np.ones((1, 4), bool), np.ones((1, 4), bool)), r"seeds \(1\)"),
    ],
)
def test_bad_input_is_refused(call, message: str):
    with pytest.raises(ConfigError, match=message):
        call()
