"""What the tables and figures show: variants of one stage and budget against their baseline and strongest control."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from sagan_attn.ablation.records import Cell, Variant
from sagan_attn.ablation.statistics import (
    Interval,
    detectable_effect,
    paired_interval,
    pairing_correlation,
    run_sd,
    sign_flip_max_t,
    two_way_bootstrap,
)

__all__ = ["KNOCKOUTS", "Logits", "Row", "compare"]

KNOCKOUTS = {
    "disabled": "the branch disabled",
    "uniform": "uniform weights",
    "other_image": "keys of another image",
}
SPLITS = {"screen": "val", "confirm": "test"}
ACCURACY_SLACK = 0.005  # logits are stored in half precision, where two classes can tie

Logits = Callable[[str, str], tuple[np.ndarray, np.ndarray] | None]


@dataclass(frozen=True)
class Row:
    """One variant at one stage and budget. Accuracies and differences are shares, not percent.

    Args:
        variant: which.
        cells: its runs, by seed.
        mean, sd: of the finished runs' accuracy.
        difference: to the baseline, paired by seed, 95 % t interval; None while any pair is missing or diverged.
        why_none: why there is no difference.
        p: of the difference, adjusted by max-t within the family of all variants and controls.
        correlation: of the pairs. detectable: smallest difference found with 80 % power at the measured spread.
        images: the difference over new seeds and new images (bootstrap); why_no_images: why there is none.
        against: to the strongest control, for attention variants; against_p: adjusted within their own family.
        knocked: accuracy lost on validation, as trained minus knocked out, by the knock-out's name.
        branch_shares, gammas: means by graft over the finished runs.
        cost: medians by name.
    """

    variant: Variant
    cells: tuple[Cell, ...]
    mean: float | None = None
    sd: float | None = None
    difference: Interval | None = None
    why_none: str = ""
    p: float | None = None
    correlation: float | None = None
    detectable: float | None = None
    images: Interval | None = None
    why_no_images: str = ""
    against: Interval | None = None
    against_p: float | None = None
    knocked: Mapping[str, Interval] = field(default_factory=dict)
    branch_shares: Mapping[str, float] = field(default_factory=dict)
    gammas: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)

    def count(self, state: str) -> int:
        return sum(cell.state == state for cell in self.cells)

    @property
    def finished(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.state == "finished"]

    @property
    def used(self) -> bool | None:
        """Whether disabling the branch changes accuracy by more than noise; None where that was not measured."""
        return None if "disabled" not in self.knocked else not self.knocked["disabled"].covers_zero

    @property
    def outcome(self) -> str:
        """ "gain", "harm", "not distinguishable" or "none" (there is no difference)."""
        if self.difference is None or self.p is None:
            return "none"
        if self.difference.covers_zero or self.p >= 0.05:
            return "not distinguishable"
        return "gain" if self.difference.mean > 0 else "harm"


def compare(
    rows: Sequence[tuple[Variant, Sequence[Cell]]], baseline: str, logits: Logits
) -> tuple[list[Row], str | None, list[str]]:
    """Rows in the order given, the strongest control, and a line for each thing a reader must know of the families.

    The strongest control is that with the highest mean difference: chosen by the same results, which favours it over
    the variants, never the other way.
    """
    cells = {variant.name: {cell.seed: cell for cell in found} for variant, found in rows}
    kinds = {variant.name: variant.kind for variant, _ in rows}
    others = [name for name in cells if name != baseline]
    reasons = {name: _why_none(cells[name], cells.get(baseline), baseline) for name in others}
    complete = [name for name in others if not reasons[name]]
    words = []
    if len(complete) < len(others):
        words.append(
            f"the family has {len(others)} comparisons, of which {len(complete)} can be made: p is adjusted for these"
        )
    differences = {name: _differences(cells[name], cells[baseline]) for name in complete}
    p, word = _family(differences)
    words += word
    controls = [name for name in complete if kinds[name] == "control"]
    strongest = max(controls, key=lambda name: float(np.mean(list(differences[name].values()))), default=None)
    against: dict[str, dict[int, float]] = {}
    if strongest is not None:
        for name in complete:
            if kinds[name] == "variant" and cells[name].keys() <= cells[strongest].keys():
                against[name] = _differences(cells[name], cells[strongest])
    against_p, word = _family(against)
    words += word
    correct = _Correct(logits)
    made = []
    for variant, found in rows:
        row = _measured(variant, found)
        name = variant.name
        if name in differences:
            ours, base = (_accuracies(cells[one], cells[name]) for one in (name, baseline))
            interval = paired_interval(np.array(list(differences[name].values())))
            images, why = _images(cells[name], cells[baseline], correct)
            row |= {
                "difference": interval,
                "p": p[name],
                "correlation": pairing_correlation(ours, base),
                "detectable": detectable_effect(interval.n, interval.sd, len(others)),
                "images": images,
                "why_no_images": why,
            }
        elif name in reasons:
            row["why_none"] = reasons[name]
        if name in against:
            row |= {"against": paired_interval(np.array(list(against[name].values()))), "against_p": against_p[name]}
        made.append(Row(variant, tuple(found), **row))
    return made, strongest, words + correct.words


def _why_none(cells: Mapping[int, Cell], base: Mapping[int, Cell] | None, baseline: str) -> str:
    """Why a variant has no mean difference to the baseline, or nothing."""
    if base is None:
        return f"no cells of the baseline {baseline}"
    for who, found in (("", cells), (f" of {baseline}", base)):
        diverged = sum(found[seed].state == "diverged" for seed in cells if seed in found)
        if diverged:
            return f"{diverged} of {len(found)} runs{who} diverged"
    missing = sum(
        cell.state != "finished" or seed not in base or base[seed].state != "finished" for seed, cell in cells.items()
    )
    if missing:
        return f"{missing} of {len(cells)} pairs are missing"
    return "" if len(cells) > 1 else "one seed has no spread"


def _accuracies(cells: Mapping[int, Cell], seeds: Mapping[int, Cell]) -> np.ndarray:
    return np.array([cells[seed].accuracy for seed in seeds], dtype=np.float64)


def _differences(cells: Mapping[int, Cell], others: Mapping[int, Cell]) -> dict[int, float]:
    """By seed."""
    return dict(zip(cells, (_accuracies(cells, cells) - _accuracies(others, cells)).tolist(), strict=True))


def _family(differences: Mapping[str, Mapping[int, float]]) -> tuple[dict[str, float], list[str]]:
    """Adjusted p by name, over the seeds that all share; a word where these are not all."""
    if not differences:
        return {}, []
    seeds = [seed for seed in next(iter(differences.values())) if all(seed in of for of in differences.values())]
    most = max(map(len, differences.values()))
    words = [f"variants have different seeds: p is over the {len(seeds)} they share"] if len(seeds) < most else []
    if not seeds:
        return dict.fromkeys(differences, 1.0), words
    table = np.array([[of[seed] for of in differences.values()] for seed in seeds])
    return dict(zip(differences, sign_flip_max_t(table).tolist(), strict=True)), words


def _measured(variant: Variant, cells: Sequence[Cell]) -> dict:
    """What needs no other variant: accuracy, evidence, cost."""
    done = [cell for cell in cells if cell.state == "finished"]
    if not done:
        return {}
    accuracies = np.array([cell.accuracy for cell in done], dtype=np.float64)
    knocked = {}
    for name in KNOCKOUTS:
        lost = [
            c.knockouts["as_trained"] - c.knockouts[name] for c in done if {"as_trained", name} <= c.knockouts.keys()
        ]
        if len(lost) > 1:
            knocked[name] = paired_interval(np.array(lost))
    costs = {name: [cell.cost[name] for cell in done if name in cell.cost] for name in done[0].cost}
    cost = {name: float(np.median(values)) for name, values in costs.items()}
    for name in ("parameters", "flops"):
        value = getattr(variant, name)
        if name not in cost and value is not None:
            cost[name] = value
    return {
        "mean": float(accuracies.mean()),
        "sd": run_sd(accuracies) if len(done) > 1 else None,
        "knocked": knocked,
        "branch_shares": _means([cell.branch_shares for cell in done]),
        "gammas": _means([cell.gammas for cell in done]),
        "cost": cost,
    }


def _means(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: fmean(run[name] for run in runs if name in run) for name in names}


class _Correct:
    """Which images a cell got right, read once a cell."""

    def __init__(self, logits: Logits) -> None:
        self.logits = logits
        self.words: list[str] = []
        self._found: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}

    def __call__(self, cell: Cell) -> tuple[np.ndarray, np.ndarray] | None:
        """bool [images] and labels [images], or None where logits are missing or are not those of the accuracy."""
        if cell.key not in self._found:
            self._found[cell.key] = self._read(cell)
        return self._found[cell.key]

    def _read(self, cell: Cell) -> tuple[np.ndarray, np.ndarray] | None:
        read = self.logits(cell.key, SPLITS[cell.stage])
        if read is None:
            return None
        logits, labels = (np.asarray(array) for array in read)
        if logits.ndim != 2 or labels.shape != logits.shape[:1] or not labels.size:
            self.words.append(f"cell {cell.key}: logits {logits.shape} do not fit labels {labels.shape}")
            return None
        right = logits.argmax(axis=1) == labels
        if cell.accuracy is None or abs(float(right.mean()) - cell.accuracy) > ACCURACY_SLACK:
            self.words.append(f"cell {cell.key}: its logits give {right.mean():.4f}, its result {cell.accuracy}")
            return None
        return right, labels


def _images(cells: Mapping[int, Cell], base: Mapping[int, Cell], correct: _Correct) -> tuple[Interval | None, str]:
    """The bootstrap's interval, or why there is none."""
    found = [(correct(cells[seed]), correct(base[seed])) for seed in cells]
    pairs = [(ours, theirs) for ours, theirs in found if ours is not None and theirs is not None]
    if len(pairs) < len(found):
        return None, f"{len(found) - len(pairs)} of {len(found)} pairs have no usable logits"
    labels = [one[1] for pair in pairs for one in pair]
    if not all(np.array_equal(labels[0], of) for of in labels[1:]):
        return None, "labels differ between cells"
    ours, theirs = (np.stack([pair[side][0] for pair in pairs]) for side in (0, 1))
    return (two_way_bootstrap(ours, theirs), "") if labels[0].size > 1 else (None, "one image has no spread")
