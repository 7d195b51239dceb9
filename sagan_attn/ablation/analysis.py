"""From the plan and the records of an ablation to everything a report shows. Nothing is drawn or read here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sagan_attn.ablation.comparisons import Logits, Row, compare
from sagan_attn.ablation.records import METRICS, Cell, Variant, cells_of, variants_of
from sagan_attn.ablation.verdict import agreement, epochs, verdict
from sagan_attn.errors import ConfigError

__all__ = ["Analysis", "Group", "analyse"]

PROVENANCE = ("code", "machine", "device", "threads", "precision", "data")  # and each of the versions
SHOWN = 24  # characters of a fingerprint


@dataclass(frozen=True)
class Group:
    """One stage at one budget (epochs), of the variants that share a baseline.

    Args:
        beside: names the baseline where the ablation has several, else empty.
        rows: the baseline first, then controls, then attention variants, as in the plan.
        strongest: name of the strongest control, None where none can be compared.
        marks: what a reader must know of these cells.
        verdict: what was found, in words.
    """

    stage: str
    budget: int
    baseline: str
    beside: str
    rows: tuple[Row, ...]
    strongest: str | None
    marks: tuple[str, ...]
    verdict: str

    @property
    def metric(self) -> str:
        return METRICS[self.stage]

    @property
    def title(self) -> str:
        against = f", against {self.rows[0].variant.label}" if self.beside else ""
        return f"{self.stage}, {epochs(self.budget)}{against}"

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.rows for cell in row.cells]

    @property
    def complete(self) -> bool:
        """Every cell finished or diverged."""
        return all(cell.state in ("finished", "diverged") for cell in self.cells)

    def row(self, name: str | None) -> Row | None:
        return next((row for row in self.rows if row.variant.name == name), None)


@dataclass(frozen=True)
class Analysis:
    """An ablation as found.

    Args:
        groups: confirm before screen, smaller budgets first.
        agreement: whether the confirmed budgets say the same.
        why_not: reasons why nothing may be quoted; none means that the confirmed verdicts may.
        problems: records that were left out, each named.
        screened, confirmed: attention variants of the two stages, by label.
    """

    name: str
    groups: tuple[Group, ...]
    agreement: str
    why_not: tuple[str, ...]
    problems: tuple[str, ...]
    screened: tuple[str, ...]
    confirmed: tuple[str, ...]

    @property
    def quotable(self) -> bool:
        return not self.why_not

    @property
    def cells(self) -> list[Cell]:
        return [cell for group in self.groups for cell in group.cells]

    def stage(self, name: str) -> list[Group]:
        return [group for group in self.groups if group.stage == name]


def analyse(
    plan: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
    logits: Logits,
    problems: Sequence[str] = (),
) -> Analysis:
    """Compare what was found with the baseline, stage by stage and budget by budget.

    Args:
        logits: (key of a cell, "val" or "test") -> logits [N, classes] and labels [N], or None where there are none.
        problems: of reading the records, to be shown with those found here.

    Raises:
        ConfigError: the plan is none of an ablation. What is wrong with a record is a problem, not an error.
    """
    if plan.get("format") != 1:
        raise ConfigError(f"the plan has format {plan.get('format')!r}; this version of the library reads 1")
    variants = variants_of(plan)
    cells, wrong = cells_of(plan, results, failures)
    families = dict.fromkeys(variant.baseline for variant in variants.values())
    groups = [
        _group(stage, budget, baseline, len(families) > 1, variants, cells, logits)
        for stage, budget in sorted({(cell.stage, cell.budget) for cell in cells})  # confirm comes first by its letter
        for baseline in families
        if any((cell.stage, cell.budget) == (stage, budget) and _beside(cell, baseline, variants) for cell in cells)
    ]
    confirmed = [group for group in groups if group.stage == "confirm"]
    by_baseline = [[group for group in confirmed if group.baseline == baseline] for baseline in families]
    agreements = [agreement([(group.budget, group.rows) for group in of]) for of in by_baseline]
    named = [f"{of[0].beside}{words}" for of, words in zip(by_baseline, agreements, strict=True) if words]
    return Analysis(
        name=str(plan.get("name") or "ablation"),
        groups=tuple(groups),
        agreement=" ".join(named),
        why_not=tuple(_why_not(by_baseline)),
        problems=(*problems, *wrong),
        screened=_attention(group for group in groups if group.stage == "screen"),
        confirmed=_attention(confirmed),
    )


def _beside(cell: Cell, baseline: str, variants: Mapping[str, Variant]) -> bool:
    return variants[cell.variant].baseline == baseline or cell.variant == baseline


def _group(
    stage: str,
    budget: int,
    baseline: str,
    several: bool,
    variants: Mapping[str, Variant],
    cells: Sequence[Cell],
    logits: Logits,
) -> Group:
    """One stage and budget of the variants that share a baseline."""
    here = [c for c in cells if (c.stage, c.budget) == (stage, budget) and _beside(c, baseline, variants)]
    by_variant = {name: sorted((c for c in here if c.variant == name), key=lambda c: c.seed) for name in variants}
    order = {baseline: 0, **{name: 1 for name, of in variants.items() if of.kind == "control" and name != baseline}}
    names = sorted((name for name in variants if by_variant[name]), key=lambda name: order.get(name, 2))
    rows, strongest, words = compare([(variants[name], by_variant[name]) for name in names], baseline, logits)
    by_name = {row.variant.name: row for row in rows}
    screened = {cell.seed for cell in cells if cell.stage == "screen"} if stage == "confirm" else set()
    base = by_name.get(baseline, Row(variants[baseline], ()))
    return Group(
        stage=stage,
        budget=budget,
        baseline=baseline,
        beside=f"Against {variants[baseline].label}: " if several else "",
        rows=tuple(rows),
        strongest=strongest,
        marks=(*_marks(here, screened), *words),
        verdict=verdict(stage, budget, rows, base, by_name.get(strongest or "")),
    )


def _attention(groups: Any) -> tuple[str, ...]:
    rows = [row for group in groups for row in group.rows]
    return tuple(dict.fromkeys(row.variant.label for row in rows if row.variant.kind == "variant"))


def _why_not(by_baseline: Sequence[Sequence[Group]]) -> list[str]:
    """Why the verdicts may not be quoted."""
    if not any(by_baseline):
        return ["nothing is confirmed: a screen chooses, it does not show"]
    reasons = []
    if any(len(confirmed) == 1 for confirmed in by_baseline):
        reasons.append("only one training budget was confirmed; two are needed")
    for group in [group for confirmed in by_baseline for group in confirmed]:
        open_cells = sum(cell.state in ("missing", "failed") for cell in group.cells)
        if open_cells:
            reasons.append(f"{open_cells} of {len(group.cells)} cells of {group.title} have no result")
    return reasons


def _marks(cells: Sequence[Cell], screen_seeds: set[int]) -> list[str]:
    """Seeds added later or used before, mixed provenance, failures."""
    marks = []
    added = sorted({cell.seed for cell in cells if cell.added})
    if added:
        marks.append(
            f"seeds added after looking: {', '.join(map(str, added))}; p and intervals do not account for that"
        )
    again = sorted({cell.seed for cell in cells} & screen_seeds)
    if again:
        marks.append(f"seeds of the screen used again: {', '.join(map(str, again))}; what it chose is favoured by them")
    with_result = [cell for cell in cells if cell.state in ("finished", "diverged")]
    for name in PROVENANCE:
        marks += _mixed(name, [cell.provenance.get(name) for cell in with_result])
    versions = [cell.provenance.get("versions") for cell in with_result]
    known = [of if isinstance(of, Mapping) else {} for of in versions]
    for name in sorted({str(name) for of in known for name in of}):
        marks += _mixed(f"versions of {name}", [of.get(name) for of in known])
    failed = sum(cell.state == "failed" for cell in cells)
    if failed:
        marks.append(f"{failed} of {len(cells)} cells failed; --retry-failed runs them again")
    return marks


def _mixed(name: str, values: Sequence[Any]) -> list[str]:
    counts: dict[str, int] = {}
    for value in values:
        words = "unknown" if value is None else str(value)
        counts[words] = counts.get(words, 0) + 1
    if len(counts) < 2:
        return []
    shown = ", ".join(f"{words[:SHOWN]} ({count} cell{'s' * (count > 1)})" for words, count in counts.items())
    return [f"mixed provenance: different {name}: {shown}"]
