"""What the numbers say, in sentences. "Points" are percentage points of accuracy."""

from collections.abc import Sequence

from sagan_attn.ablation.comparisons import Row
from sagan_attn.ablation.statistics import Interval, smallest_p

__all__ = ["COVERS", "agreement", "best_of", "epochs", "interval_words", "p_words", "points_words", "verdict"]

COVERS = {
    "difference": "95 % t interval by seed: covers new seeds of the same training, judged on the same images",
    "images": "95 % bootstrap interval over seeds and images: covers new seeds judged on new images",
    "knocked": "95 % t interval by seed, on the validation images: as trained minus knocked out",
}
OUTCOMES = {"gain": "gains", "harm": "loses", "not distinguishable": "is not distinguishable"}


def p_words(p: float | None) -> str:
    """Two digits; "-" for none."""
    if p is None:
        return "-"
    return "<0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def interval_words(of: Interval, signed: bool = True) -> str:
    """In points: "+0.84 [+0.52, +1.16]"."""
    mean, low, high = (points_words(value, signed) for value in (of.mean, of.low, of.high))
    return f"{mean} [{low}, {high}]"


def points_words(share: float, signed: bool = True) -> str:
    """A share in points: "+0.84"; "0.00", without a sign, for what rounds to nothing."""
    words = f"{100 * share:{'+' if signed else ''}.2f}"
    return "0.00" if float(words) == 0 else words


def epochs(budget: int) -> str:
    return f"{budget} epoch{'' if budget == 1 else 's'}"


def best_of(rows: Sequence[Row]) -> Row | None:
    """The attention variant with the highest mean difference; None where none has one."""
    found = [row for row in rows if row.variant.kind == "variant" and row.difference is not None]
    return max(found, key=lambda row: row.difference.mean if row.difference else 0.0, default=None)


def verdict(stage: str, budget: int, rows: Sequence[Row], baseline: Row, strongest: Row | None) -> str:
    """What was found at one stage and budget: the best variant first, then what else a reader must know."""
    sentences = ["Screen, not to be quoted:"] if stage == "screen" else []
    split = "validation" if stage == "screen" else "test"
    best = best_of(rows)
    if best is None:
        sentences.append(_nothing(rows, budget))
    else:
        sentences += [_effect(best, baseline, budget, split), _control(best, strongest, rows), _evidence(best)]
    ours = [row for row in rows if row.variant.kind == "variant"]
    worse = [row for row in ours if row is not best and row.outcome == "harm"]
    if worse:
        sentences.append(
            f"Worse than {baseline.variant.label}: "
            + ", ".join(f"{row.variant.label} ({interval_words(row.difference)})" for row in worse if row.difference)
            + "."
        )
    if best is not None:
        lost = [row for row in ours if row.why_none]
        if lost:
            sentences.append("Left out: " + ", ".join(f"{row.variant.label} ({row.why_none})" for row in lost) + ".")
    return " ".join(sentence for sentence in sentences if sentence)


def _nothing(rows: Sequence[Row], budget: int) -> str:
    ours = [row for row in rows if row.variant.kind == "variant"]
    if not ours:
        return f"No verdict at {epochs(budget)}: there are no attention variants, only controls."
    why = "; ".join(f"{row.variant.label}: {row.why_none}" for row in ours)
    return f"No verdict at {epochs(budget)}: no variant has a whole set of pairs ({why})."


def _effect(best: Row, baseline: Row, budget: int, split: str) -> str:
    label, base, found = best.variant.label, baseline.variant.label, best.difference
    assert found is not None  # for the type checker: best_of chose it
    figures = (
        f"{interval_words(found)} points of {split} accuracy "
        f"(95 % t interval over {found.n} seeds, adjusted p {_equals(best.p)}; the interval does not allow for having "
        "picked the best)"
    )
    if best.outcome == "gain":
        return f"{label} gains over {base} at {epochs(budget)}: {figures}."
    if best.outcome == "harm":
        return f"No variant helps: the best, {label}, loses against {base} at {epochs(budget)}: {figures}."
    least = smallest_p(found.n)
    if least >= 0.05:
        why = f"{found.n} seeds can never reach p < 0.05 (the smallest is {p_words(least)})"
    else:
        why = f"this design sees {100 * (best.detectable or 0):.2f} points or more with 80 % power"
    return f"{label}, the best variant, is not distinguishable from {base} at {epochs(budget)}: {figures}; {why}."


def _control(best: Row, strongest: Row | None, rows: Sequence[Row]) -> str:
    lost = [f"{row.variant.label} ({row.why_none})" for row in rows if row.variant.kind == "control" and row.why_none]
    without = f" Controls without a comparison: {', '.join(lost)}." if lost else ""
    return _over(best, strongest) + without


def _over(best: Row, strongest: Row | None) -> str:
    if strongest is None or strongest.difference is None:
        return "No control can be compared, so nothing is said of attention against other added layers."
    name = f"the strongest control, {strongest.variant.label} ({interval_words(strongest.difference)})"
    if best.against is None:
        return f"It cannot be compared with {name}."
    figures = f"{interval_words(best.against)} points (adjusted p {_equals(best.against_p)})"
    if best.against.covers_zero or (best.against_p or 0) >= 0.05:
        return f"It is not distinguishable from {name}: {figures}."
    if best.against.mean > 0:
        return f"It gains against {name}: {figures}."
    return f"It is below {name}, which these very results picked as the best of its kind: {figures}."


def _evidence(best: Row) -> str:
    if "disabled" not in best.knocked:
        return "What knocking the attention out costs was not measured."
    found = best.knocked["disabled"]
    sentence = f"Disabling its branch costs {interval_words(found)} points of validation accuracy"
    if not best.used:
        return sentence + ": the branch is unused."
    more = [
        f"{words} {interval_words(best.knocked[name])}"
        for name, words in (("uniform", "making its weights uniform"), ("other_image", "keys of another image"))
        if name in best.knocked
    ]
    return f"{sentence}{', ' if more else ''}{', '.join(more)}."


def _equals(p: float | None) -> str:
    words = p_words(p)
    return f"< {words[1:]}" if words.startswith("<") else f"= {words}"


def agreement(groups: Sequence[tuple[int, Sequence[Row]]]) -> str:
    """Whether confirmed budgets say the same; nothing for fewer than two. groups: budget and rows."""
    if len(groups) < 2:
        return ""
    by_variant: dict[str, list[tuple[int, Row]]] = {}
    for budget, rows in groups:
        for row in rows:
            if row.variant.kind == "variant" and row.outcome != "none":
                by_variant.setdefault(row.variant.name, []).append((budget, row))
    apart = []
    for found in by_variant.values():
        if len({row.outcome for _, row in found}) > 1:
            apart.append(
                f"{found[0][1].variant.label} "
                + ", ".join(f"{OUTCOMES[row.outcome]} at {epochs(b)}" for b, row in found)
            )
    winners = [(budget, best_of(rows)) for budget, rows in groups]
    named = [f"{row.variant.label} at {epochs(budget)}" for budget, row in winners if row]
    if len({row.variant.name for _, row in winners if row}) > 1:
        apart.append("the best variant is " + ", ".join(named))
    if apart:
        return "The budgets disagree: " + "; ".join(apart) + "."
    both = [found[0][1].variant.label for found in by_variant.values() if len(found) == len(groups)]
    if not both:
        return "The budgets cannot be compared: no variant has a whole set of pairs at each."
    budgets = " and ".join(str(budget) for budget, _ in groups)
    return f"The budgets ({budgets} epochs) agree on {', '.join(both)}."
