"""The columns of the tables: what each shows, what it is sorted by, and what it means."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sagan_attn.ablation.comparisons import KNOCKOUTS, Row
from sagan_attn.ablation.statistics import Interval
from sagan_attn.ablation.verdict import COVERS, interval_words, p_words

__all__ = ["COLUMNS", "Column", "runs_words", "short_number"]

Sortable = float | str | None


@dataclass(frozen=True)
class Column:
    """One column. text: as shown, "-" for nothing. value: to sort by. short: is in the terminal's table too."""

    header: str
    meaning: str
    text: Callable[[Row], str]
    value: Callable[[Row], Sortable]
    short: bool = False


def short_number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """12.3M; "-" for none."""
    if value is None:
        return "-"
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.{digits}g}{letter}{unit}"
    return f"{value:.{digits}g}{unit}"


def runs_words(row: Row) -> str:
    """ "12 of 12", "10 of 12, 2 diverged"."""
    states = [(row.count(state), state) for state in ("diverged", "failed", "missing")]
    return ", ".join(
        [f"{len(row.finished)} of {len(row.cells)}", *(f"{count} {state}" for count, state in states if count)]
    )


def _interval(of: Interval | None) -> str:
    return "-" if of is None else interval_words(of)


def _mean(of: Interval | None) -> float | None:
    return None if of is None else of.mean


def _accuracy(row: Row) -> str:
    if row.mean is None:
        return "-"
    return f"{100 * row.mean:.2f}" + ("" if row.sd is None else f" ± {100 * row.sd:.2f}")


def _by_graft(of: Mapping[str, float]) -> str:
    """The value of one graft, or the range of several."""
    if not of:
        return "-"
    low, high = min(of.values()), max(of.values())
    return f"{low:.3g}" if len(of) == 1 else f"{low:.3g} to {high:.3g}"


def _largest(of: Mapping[str, float]) -> float | None:
    return max(of.values(), default=None)


def _used(row: Row) -> str:
    return {None: "-", True: "used", False: "unused"}[row.used]


def _knocked(name: str) -> Column:
    return Column(
        f"{KNOCKOUTS[name]}: cost",
        f"points of accuracy lost; {COVERS['knocked']}",
        lambda row: _interval(row.knocked.get(name)),
        lambda row: _mean(row.knocked.get(name)),
        short=name == "disabled",
    )


def _cost(header: str, name: str, meaning: str, unit: str = "", short: bool = False) -> Column:
    return Column(
        header,
        meaning,
        lambda row: short_number(row.cost.get(name), unit),
        lambda row: row.cost.get(name),
        short,
    )


def _note(row: Row) -> str:
    added = sum(cell.added for cell in row.cells)
    return "; ".join(filter(None, [row.why_no_images, f"{added} runs with seeds added after looking" * bool(added)]))


COLUMNS = (
    Column("variant", "what was trained", lambda row: row.variant.label, lambda row: row.variant.label, True),
    Column("runs", "finished runs of those planned", runs_words, lambda row: len(row.finished), True),
    Column("accuracy %", "mean and standard deviation of a run", _accuracy, lambda row: row.mean, True),
    Column(
        "difference, points",
        f"to the baseline, paired by seed; {COVERS['difference']}",
        lambda row: row.why_none or _interval(row.difference),
        lambda row: _mean(row.difference),
        True,
    ),
    Column("p", "sign flips, adjusted by max-t in the family", lambda row: p_words(row.p), lambda row: row.p, True),
    Column(
        "over strongest control",
        f"points; {COVERS['difference']}",
        lambda row: _interval(row.against),
        lambda row: _mean(row.against),
        True,
    ),
    Column(
        "its p", "adjusted in the variants' own family", lambda row: p_words(row.against_p), lambda row: row.against_p
    ),
    Column(
        "difference on new images",
        f"points; {COVERS['images']}",
        lambda row: _interval(row.images),
        lambda row: _mean(row.images),
    ),
    *map(_knocked, KNOCKOUTS),
    Column("branch", "unused: disabling changes accuracy within noise", _used, _used, True),
    Column(
        "branch / trunk",
        "mean size of the branch over that of the trunk, on validation images; a range over grafts",
        lambda row: _by_graft(row.branch_shares),
        lambda row: _largest(row.branch_shares),
    ),
    Column(
        "gamma",
        "mean at the end; its size proves nothing; a range over grafts",
        lambda row: _by_graft(row.gammas),
        lambda row: _largest(row.gammas),
    ),
    Column(
        "pairing",
        "correlation of the runs paired by seed",
        lambda row: "-" if row.correlation is None or row.correlation != row.correlation else f"{row.correlation:.2f}",
        lambda row: None if row.correlation is None or row.correlation != row.correlation else row.correlation,
    ),
    Column(
        "sees, points",
        "smallest difference found with 80 % power at the measured spread, over the family",
        lambda row: "-" if row.detectable is None else f"{100 * row.detectable:.2f}",
        lambda row: row.detectable,
    ),
    _cost("parameters", "parameters", "of the whole model", short=True),
    _cost("FLOPs", "flops", "of one image"),
    _cost("images/s", "images_per_second", "in training, median over runs", short=True),
    _cost("memory", "peak_bytes", "peak of a run, median over runs", "B"),
    Column(
        "kind", "baseline, control or attention variant", lambda row: row.variant.kind, lambda row: row.variant.kind
    ),
    Column("note", "what else to know of these runs", _note, _note, True),
)
