"""Scores against scikit-learn, against numbers worked out by hand, and as figures."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn import metrics

from sagan_attn.evaluation.figures import confusion_figure, reliability_figure
from sagan_attn.evaluation.image_sheets import Picture, answer, image_sheet
from sagan_attn.evaluation.pairs import Pairing, pair
from sagan_attn.evaluation.scores import BINS, scores_of, worst


@pytest.fixture
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 500 images of classes 0 to 3 of 5, right in about two of three."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (500,), generator=generator)
    logits = torch.randn(500, 5, generator=generator)
    logits[range(500), labels] += 1.5
    return logits, labels


def test_scores_are_those_of_scikit_learn(answers):
    logits, labels = answers
    scores, predicted = scores_of(logits, labels), logits.argmax(dim=1)
    probabilities = logits.double().softmax(dim=1)
    assert (scores.confusion == metrics.confusion_matrix(labels, predicted, labels=range(5))).all()
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(labels, predicted))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = metrics.balanced_accuracy_score(labels, predicted)
    assert scores.balanced_accuracy == pytest.approx(balanced)
    assert scores.nll == pytest.approx(metrics.log_loss(labels, probabilities, labels=range(5)), rel=1e-6)
    precision = metrics.precision_score(labels, predicted, average=None, labels=range(5), zero_division=np.nan)
    np.testing.assert_allclose(scores.precision, precision)
    recall = metrics.recall_score(labels, predicted, average=None, labels=range(5), zero_division=np.nan)
    np.testing.assert_allclose(scores.recall, recall)
    assert math.isnan(scores.recall[4])


def test_calibration_is_the_sum_over_bins(answers):
    scores = scores_of(*answers)
    assert len(scores.bins) == BINS
    assert sum(one.images for one in scores.bins) == 500
    parts = [one.images * abs(one.confidence - one.accuracy) for one in scores.bins if one.images]
    assert scores.calibration_error == pytest.approx(sum(parts) / 500, abs=1e-6)


def test_calibration_by_hand():
    """Two images at confidence 0.9, one of them right; two at 0.6, both right: (2 * 0.4 + 2 * 0.4) / 4."""
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]]).log()
    scores = scores_of(logits, torch.tensor([0, 1, 0, 1]))
    assert scores.calibration_error == pytest.approx(0.4, abs=1e-6)
    filled = [(round(one.confidence, 4), one.accuracy, one.images) for one in scores.bins if one.images]
    assert filled == [(0.6, 1.0, 2), (0.9, 0.5, 2)]


def test_the_worst_are_wrong_and_in_order():
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0], [1.0, 0.0], [0.0, 9.0], [0.1, 0.0]])
    assert worst(logits, torch.tensor([0, 0, 1, 0, 0]), 9) == [3, 1, 2]
    assert worst(logits, torch.tensor([0, 0, 1, 0, 0]), 2) == [3, 1]
    assert worst(logits, torch.tensor([0, 1, 0, 1, 0]), 2) == []


def test_pairs_are_counted():
    a, b = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 0, 1, 1])
    found = pair(a, b, torch.tensor([0, 1, 1, 0, 1]))
    assert found == Pairing(both=1, only_a=1, only_b=2, neither=1)
    assert found.difference == pytest.approx(0.2)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 5), (3, 9), (10, 10), (1, 0), (7, 2)])
def test_mcnemar_is_a_fair_coin(only_a, only_b):
    """The exact test: tosses as unlikely as these or more, of a coin tossed once for each image that changed."""
    tosses = only_a + only_b
    weight = [Fraction(math.comb(tosses, heads), 2**tosses) for heads in range(tosses + 1)]
    expected = sum(one for one in weight if one <= weight[only_b])
    assert Pairing(50, only_a, only_b, 20).p_value == pytest.approx(float(expected))


def test_mcnemar_without_changes():
    assert Pairing(5, 0, 0, 5).p_value == 1.0


def test_the_interval_by_hand_and_in_repeated_samples():
    """For 20 and 40 of 198: shares 0.105 and 0.205 of 200."""
    low, high = Pairing(100, 20, 40, 38).interval()
    half = 1.959964 * math.sqrt((0.105 + 0.205 - 0.01) / 200)
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)
    draws = np.random.default_rng(0).multinomial(300, [0.7, 0.05, 0.09, 0.16], size=2000)
    inside = [low <= 0.04 <= high for low, high in (Pairing(*map(int, row)).interval() for row in draws)]
    assert 0.935 < np.mean(inside) < 0.975


def test_figures_are_drawn(answers):
    scores = scores_of(*answers)
    figure = confusion_figure(scores, ["a", "b$x$", "c" * 50, "d\n", "e"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["a", "b$x$"]
    numbers = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert numbers[1, 0] == str(scores.confusion[0, 1])  # column, row
    assert not reliability_figure(scores).axes[0].texts
    assert "500 images, 0 to " in axes.get_title()
    many = confusion_figure(scores_of(torch.randn(50, 30), torch.arange(50) % 25), [f"c{i}" for i in range(30)])
    labels = [label.get_text() for label in many.axes[0].get_yticklabels()]
    assert (labels[3], labels[29]) == ("c3 (2)", "c29 (0)")
    assert many.axes[0].get_xticklabels()[3].get_text() == "c3"
    assert "50 images, 0 to 2 a class" in many.axes[0].get_title()
    wide = scores_of(torch.randn(50, 100), torch.arange(50))
    assert not confusion_figure(wide, [str(i) for i in range(100)]).axes[0].texts


def test_bins_of_few_images_look_like_it():
    """Nine images at confidence 0.9 and ten at 0.6, all right: the markers are at 1."""
    logits = torch.tensor([[0.9, 0.1]] * 9 + [[0.6, 0.4]] * 10).log()
    above = reliability_figure(scores_of(logits, torch.zeros(19, dtype=torch.long))).axes[0]
    assert [bool(bar.get_hatch()) for bar in above.patches] == [False, True]
    assert "fewer than 10 images" in [text.get_text() for text in above.get_legend().get_texts()]
    assert [line.get_clip_on() for line in above.lines if line.get_marker() == "o"] == [False]


def test_answers_say_their_probability():
    shares = (0.0, 0.004, 0.012, 0.994, 0.996, 1.0)
    words = ["a (0 %)", "a (<1 %)", "a (1 %)", "a (99 %)", "a (>99 %)", "a (100 %)"]
    assert [answer("a", share) for share in shares] == words


def test_a_sheet_has_a_panel_for_each_picture():
    pictures = [Picture(torch.zeros(3, 8, 9, dtype=torch.uint8), [f"image {i}", "cat 0.3"], "red") for i in range(8)]
    figure = image_sheet(pictures, "Eight")
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_xlabel() for axes in drawn] == [f"image {i}\ncat 0.3" for i in range(8)]
    long = image_sheet(pictures[:1], "a long title " * 10)
    assert max(map(len, long.get_suptitle().splitlines())) < 70
    image_sheet([], "None")
