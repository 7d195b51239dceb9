"""What is compared, marked and said."""

from dataclasses import replace

import numpy as np
import pytest
from fake_results import Fake, hostile, make
from scipy import stats

from sagan_attn.ablation.analysis import Analysis, Group, analyse
from sagan_attn.ablation.comparisons import Row
from sagan_attn.ablation.statistics import (
    detectable_effect,
    paired_interval,
    pairing_correlation,
    sign_flip_max_t,
    two_way_bootstrap,
)
from sagan_attn.ablation.verdict import agreement
from sagan_attn.errors import ConfigError

SAGAN = "sagan at layer3"
BOTH = {"confirm": (6, 12)}


def of(fake: Fake) -> Analysis:
    return analyse(fake.plan, fake.results, fake.failures, fake.logits)


def only(fake: Fake) -> Group:
    (group,) = of(fake).groups
    return group


def row_of(group: Group, name: str) -> Row:
    row = group.row(name)
    assert row is not None
    return row


def accuracies(fake: Fake, name: str, metric: str = "test/accuracy") -> np.ndarray:
    return np.array([result["metrics"][metric] for result in fake.results if result["variant"] == name])


def test_the_figures_are_those_of_the_statistics():
    fake = make()
    group = only(fake)
    assert [row.variant.name for row in group.rows] == ["none", "conv", "context-max", SAGAN, "biggan at layer3"]
    assert (group.metric, group.strongest, group.marks, group.complete) == ("test/accuracy", "context-max", (), True)
    base = accuracies(fake, "none")
    family = np.stack([accuracies(fake, row.variant.name) - base for row in group.rows[1:]], axis=1)
    assert [row.p for row in group.rows[1:]] == pytest.approx(sign_flip_max_t(family))
    row = row_of(group, SAGAN)
    found = accuracies(fake, SAGAN)
    interval = stats.ttest_rel(found, base).confidence_interval(0.95)
    assert row.difference is not None
    assert (row.difference.low, row.difference.high, row.difference.n) == pytest.approx((*interval, 8))
    assert (row.mean, row.sd) == pytest.approx((found.mean(), found.std(ddof=1)))
    assert row.correlation == pytest.approx(pairing_correlation(found, base))
    assert row.detectable == pytest.approx(detectable_effect(8, (found - base).std(ddof=1), 4))
    control = accuracies(fake, "context-max")
    assert row.against == paired_interval(found - control)
    others = np.stack([found - control, accuracies(fake, "biggan at layer3") - control], axis=1)
    assert row.against_p == pytest.approx(sign_flip_max_t(others)[0])
    assert row_of(group, "conv").against is None
    first = group.rows[0]
    assert (first.difference, first.p, first.why_none, first.used) == (None, None, "", None)
    right = [[fake.logits(c.key, "test") for c in row_of(group, name).cells] for name in (SAGAN, "none")]
    correct = [np.stack([of.argmax(1) == labels for of, labels in cells]) for cells in right]
    assert row.images == two_way_bootstrap(*correct)
    assert row.cost["parameters"] == fake.plan["variants"][SAGAN]["parameters"]


def test_a_screen_is_judged_on_validation_and_may_not_be_quoted():
    fake = make(stages={"screen": (3,)})
    analysis = of(fake)
    (group,) = analysis.groups
    row = row_of(group, SAGAN)
    assert row.mean == pytest.approx(accuracies(fake, SAGAN, "val/accuracy").mean())
    assert row.images is not None
    assert group.verdict.startswith(f"Screen, not to be quoted: {SAGAN} gains over none at 3 epochs: +")
    assert "points of validation accuracy" in group.verdict
    assert analysis.why_not == ("nothing is confirmed: a screen chooses, it does not show",)
    assert not analysis.quotable


def test_a_gain():
    analysis = of(make(stages=BOTH))
    assert analysis.quotable
    assert [group.budget for group in analysis.groups] == [6, 12]
    row = row_of(analysis.groups[0], SAGAN)
    assert row.outcome == "gain"
    text = analysis.groups[0].verdict
    assert text.startswith(f"{SAGAN} gains over none at 6 epochs: +3.")
    assert "(95 % t interval over 8 seeds, adjusted p = 0.00" in text
    assert "It gains against the strongest control, context-max (+1." in text
    assert "Disabling its branch costs +" in text
    assert ", keys of another image +" in text
    assert "Worse than none: biggan at layer3 (-1." in text
    assert analysis.agreement == f"The budgets (6 and 12 epochs) agree on {SAGAN}, biggan at layer3."


def test_no_difference_is_said_in_words():
    group = only(make({"none": 0.0, "conv": 0.02, "sagan": 0.0}, seeds=12, used=0.0))
    row = row_of(group, "sagan")
    assert (row.outcome, row.used) == ("not distinguishable", False)
    assert "sagan, the best variant, is not distinguishable from none at 6 epochs: " in group.verdict
    assert f"this design sees {100 * (row.detectable or 0):.2f} points or more with 80 % power" in group.verdict
    assert "It is below the strongest control, conv (+" in group.verdict
    assert "the branch is unused" in group.verdict
    equal = only(make({"none": 0.0, "conv": 0.02, "sagan": 0.02}, seeds=12))
    assert "It is not distinguishable from the strongest control, conv" in equal.verdict


def test_an_interval_without_0_is_not_enough():
    """p is of the family, the interval of one comparison."""
    row = row_of(only(make()), SAGAN)
    assert row.outcome == "gain"
    assert replace(row, p=0.05).outcome == "not distinguishable"


def test_harm():
    group = only(make({"none": 0.0, "sagan": -0.02, "biggan": -0.03}, controls=()))
    assert group.verdict.startswith("No variant helps: the best, sagan, loses against none at 6 epochs: -")
    assert "Worse than none: biggan (-" in group.verdict
    assert "No control can be compared" in group.verdict
    assert group.strongest is None


def test_divergence_is_an_outcome():
    fake = make()
    for index in (0, 3):
        fake.result(SAGAN, index).update(
            outcome="diverged", metrics={"test/accuracy": None, "train/loss": float("nan")}
        )
    group = only(fake)
    row = row_of(group, SAGAN)
    assert (row.count("diverged"), len(row.finished), row.difference, row.p) == (2, 6, None, None)
    assert row.why_none == "2 of 8 runs diverged"
    assert row.mean == pytest.approx(accuracies(make(), SAGAN)[[1, 2, 4, 5, 6, 7]].mean())
    assert f"Left out: {SAGAN} (2 of 8 runs diverged)." in group.verdict
    assert "the family has 4 comparisons, of which 3 can be made" in group.marks[0]
    assert group.complete
    fake.result("none")["outcome"] = "diverged"
    group = only(fake)
    assert row_of(group, "conv").why_none == "1 of 8 runs of none diverged"
    assert group.verdict.startswith("No verdict at 6 epochs: no variant has a whole set of pairs (")


def test_missing_pairs_and_failures():
    fake = make(stages=BOTH)
    fake.lose(fake.result(SAGAN))
    fake.lose(fake.result("context-max"), kind="out of memory", message="needs more", attempts=3)
    analysis = of(fake)
    group = analysis.groups[0]
    row = row_of(group, SAGAN)
    assert (row.count("missing"), row.why_none, row.difference) == (1, "1 of 8 pairs are missing", None)
    (failed,) = [cell for cell in group.cells if cell.error]
    assert (failed.state, failed.error) == ("failed", "out of memory: needs more (3 attempts)")
    assert group.strongest == "conv"
    assert "Controls without a comparison: context-max (1 of 8 pairs are missing)." in group.verdict
    assert "1 of 40 cells failed; --retry-failed runs them again" in group.marks
    assert analysis.why_not == ("2 of 40 cells of confirm, 6 epochs have no result",)
    fake.lose(fake.result("none", 5))
    assert row_of(of(fake).groups[0], "conv").why_none == "1 of 8 pairs are missing"


def test_too_few_seeds():
    group = only(make(seeds=4))
    assert "is not distinguishable from none" in group.verdict
    assert "4 seeds can never reach p < 0.05 (the smallest is 0.12)" in group.verdict
    group = only(make(seeds=1))
    assert row_of(group, SAGAN).why_none == "one seed has no spread"
    assert "one seed has no spread" in group.verdict


def test_one_budget_may_not_be_quoted():
    analysis = of(make())
    assert analysis.why_not == ("only one training budget was confirmed; two are needed",)
    assert analysis.agreement == ""


def test_budgets_that_disagree_are_named():
    fake = make(stages=BOTH)
    for result in fake.results:
        if (result["variant"], result["budget"]) == (SAGAN, 12):
            result["metrics"]["test/accuracy"] -= 0.06
    found = of(fake)
    assert found.agreement == (
        f"The budgets disagree: {SAGAN} gains at 6 epochs, loses at 12 epochs; "
        f"the best variant is {SAGAN} at 6 epochs, biggan at layer3 at 12 epochs."
    )
    row = row_of(found.groups[1], SAGAN)
    assert row.images is None  # these logits are not of that accuracy
    assert row.why_no_images == "8 of 8 pairs have no usable logits"
    assert any("its logits give 0.8" in mark for mark in found.groups[1].marks)
    assert agreement([(6, [])]) == ""
    assert "cannot be compared" in agreement([(6, []), (12, [])])


def test_no_logits_and_other_labels():
    fake = make()
    fake.stored.pop((fake.result(SAGAN)["key"], "test"))
    key = fake.result("conv")["key"], "test"
    logits, labels = fake.stored[key]
    fake.stored[key] = logits[::-1].copy(), labels[::-1].copy()
    group = only(fake)
    assert row_of(group, SAGAN).why_no_images == "1 of 8 pairs have no usable logits"
    assert row_of(group, "conv").why_no_images == "labels differ between cells"
    assert row_of(group, SAGAN).difference is not None


def test_marks():
    fake = make(stages={"screen": (3,), "confirm": (6,)})
    for cell in fake.plan["cells"]:
        if cell["stage"] == "screen" and cell["variant"] == "conv":
            cell["added"] = True
    fake.result("none")["provenance"].update(code="other", threads=4, device="cuda", machine="b", data="c")
    fake.result(SAGAN)["provenance"]["versions"]["torch"] = "2.9.0"
    confirm, screen = of(fake).groups
    assert screen.marks == (
        f"seeds added after looking: {', '.join(map(str, range(8)))}; p and intervals do not account for that",
    )
    for name in ("code", "threads", "device", "machine", "data", "versions of torch"):
        assert any(mark.startswith(f"mixed provenance: different {name}: ") for mark in confirm.marks), name
    assert "mixed provenance: different versions of torch: 2.8.0 (39 cells), 2.9.0 (1 cell)" in confirm.marks
    for cell, result in zip(fake.plan["cells"], fake.results, strict=True):
        cell["seed"] = result["seed"] = cell["seed"] % 1000
    assert any(mark.startswith("seeds of the screen used again: 0, 1") for mark in of(fake).groups[0].marks)


def test_seeds_that_not_all_have():
    fake = make({"none": 0.0, "conv": 0.01, "sagan": 0.03})
    gone = fake.result("conv")
    fake.results.remove(gone)
    fake.plan["cells"] = [cell for cell in fake.plan["cells"] if cell["key"] != gone["key"]]
    group = only(fake)
    assert "variants have different seeds: p is over the 7 they share" in group.marks
    assert row_of(group, "conv").difference is not None
    assert row_of(group, "sagan").against is None  # the control lacks one of its seeds
    assert "It cannot be compared with the strongest control, conv" in group.verdict


def test_each_variant_is_compared_with_its_own_baseline():
    fake = make({"none": 0.0, "sagan": 0.03, "none, host b": 0.05, "sagan, host b": 0.05}, controls=(), stages=BOTH)
    for name in ("none, host b", "sagan, host b"):
        fake.plan["variants"][name]["baseline"] = "none, host b"
    fake.plan["variants"]["none, host b"]["kind"] = "baseline"
    fake.plan["baseline"] = "none"
    analysis = of(fake)
    assert [group.title for group in analysis.groups] == [
        f"confirm, {budget} epochs, against {name}" for budget in (6, 12) for name in ("none", "none, host b")
    ]
    assert "sagan gains over none at" in analysis.groups[0].verdict
    assert "sagan, host b, the best variant, is not distinguishable from none, host b" in analysis.groups[1].verdict
    assert "Against none: The budgets (6 and 12 epochs) agree on sagan." in analysis.agreement


def test_knockouts_and_evidence():
    fake = make(used=0.04)
    row = row_of(only(fake), SAGAN)
    costs = [r["knockouts"]["as_trained"] - r["knockouts"]["disabled"] for r in fake.results if r["variant"] == SAGAN]
    assert row.knocked["disabled"] == paired_interval(np.array(costs))
    assert row.used is True
    assert row.branch_shares == {"layer3.grafts.block": pytest.approx(0.12, rel=0.2)}
    assert row.gammas.keys() == row.branch_shares.keys()
    for result in fake.results:
        result["knockouts"] = {}
    group = only(fake)
    assert row_of(group, SAGAN).used is None
    assert "What knocking the attention out costs was not measured." in group.verdict


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"key": "f" * 16}, "result of cell 'ffffffffffffffff' is not in the plan"),
        ({"seed": 7}, "has seed 7, the plan 1000"),
        ({"format": 2}, "has format 2, not 1"),
        ({"outcome": "great"}, "has outcome 'great'"),
        ({"metrics": {"test/accuracy": float("nan")}}, "is finished without a test/accuracy between 0 and 1"),
        ({"metrics": {"test/accuracy": 91}}, "is finished without a test/accuracy between 0 and 1"),
        ({"metrics": None}, "is finished without a test/accuracy between 0 and 1"),
    ],
)
def test_a_wrong_record_is_named_and_left_out(change: dict, problem: str):
    fake = make()
    fake.result(SAGAN).update(change)
    analysis = of(fake)
    assert problem in analysis.problems[0]
    assert row_of(analysis.groups[0], SAGAN).why_none == "1 of 8 pairs are missing"


def test_odd_records_do_not_stop_the_rest():
    fake = make()
    odd = {"curves": "none", "gammas": [1], "evidence": {"a": 3}, "knockouts": None, "cost": 7, "provenance": "x"}
    fake.result(SAGAN).update(odd)
    fake.results.append(dict(fake.result("conv")))
    found = analyse(fake.plan, [*fake.results, 3, {}], [None, {"key": "x"}], fake.logits, ["told before"])
    assert found.problems[0] == "told before"
    assert len(found.problems) == 6
    assert row_of(found.groups[0], SAGAN).difference is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "the plan has format 3"),
        ({"cells": []}, "lists no cells"),
        ({"cells": [{"key": "a"}]}, "cell 0 of the plan must have key, stage"),
        ({"variants": {}}, "names no variants"),
        ({"variants": {"none": {"kind": "best"}}}, "variant 'none' of the plan must have a kind of"),
        ({"variants": {"none": {"kind": "baseline", "baseline": "gone"}}}, "the baseline 'gone' of 'none' is none of"),
    ],
)
def test_a_plan_that_is_none_is_refused(change: dict, message: str):
    fake = make()
    with pytest.raises(ConfigError, match=message):
        analyse({**fake.plan, **change}, fake.results, [], fake.logits)


def test_two_cells_with_one_key_are_refused():
    fake = make()
    fake.plan["cells"].append(fake.plan["cells"][0])
    with pytest.raises(ConfigError, match="two cells with key"):
        of(fake)


def test_a_hostile_one_is_analysed():
    analysis = of(hostile())
    assert [len(group.rows) for group in analysis.groups] == [6, 6, 6]
    assert {cell.state for cell in analysis.cells} == {"finished", "diverged", "failed", "missing"}
