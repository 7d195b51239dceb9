"""The confirmed results for a paper: a LaTeX table and a paragraph of methods."""

from collections.abc import Sequence

from sagan_attn.ablation.analysis import Analysis, Group
from sagan_attn.ablation.comparisons import Row
from sagan_attn.ablation.report.flat import run_records
from sagan_attn.ablation.report.tables import csv_text
from sagan_attn.ablation.statistics import Interval
from sagan_attn.ablation.verdict import COVERS, epochs, p_words, points_words
from sagan_attn.errors import ConfigError

__all__ = ["escape", "methods", "paper_files", "table"]

SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
}


def escape(text: str) -> str:
    """Text that LaTeX prints as it is; control characters become spaces."""
    return "".join(SPECIAL.get(letter, letter) if letter.isprintable() else " " for letter in text)


def paper_files(analysis: Analysis) -> dict[str, str]:
    """table.tex, methods.tex and runs.csv by name.

    Raises `ConfigError` where nothing is confirmed: a screen may not be quoted.
    """
    if not analysis.stage("confirm"):
        raise ConfigError("a paper quotes what was confirmed, and nothing is: run the confirm stage first")
    return {
        "table.tex": table(analysis),
        "methods.tex": methods(analysis),
        "runs.csv": csv_text(run_records(analysis)),
    }


def table(analysis: Analysis) -> str:
    """A booktabs table for each confirmed budget. Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}."""
    lines = [] if analysis.quotable else [f"% NOT TO BE QUOTED: {escape('; '.join(analysis.why_not))}"]
    for index, group in enumerate(analysis.stage("confirm")):
        baseline = group.rows[0].variant.label
        strongest = group.row(group.strongest)
        over = f"over {strongest.variant.label}" if strongest else "over a control"
        preliminary = "" if analysis.quotable else "Preliminary. "
        lines += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{preliminary}{escape(_caption(group, baseline))}}}",
            rf"\label{{tab:ablation-{index}}}",
            r"\begin{tabular}{lrrrrrr}",
            r"\toprule",
            rf"Variant & Runs & Accuracy (\%) & $\Delta$ {escape(baseline)} & $p$ & {escape(over)} & Disabled costs \\",
            r"\midrule",
            *(_line(row) for row in group.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    return "\n".join(lines) + "\n"


def _caption(group: Group, baseline: str) -> str:
    return (
        f"Test accuracy after {epochs(group.budget)} (mean and standard deviation of a run), differences to {baseline} "
        "paired by seed in percentage points [95 % t interval], p adjusted by max-t within the table, difference to "
        "the strongest control, and validation accuracy lost when the trained branch is disabled."
    )


def _line(row: Row) -> str:
    accuracy = "--" if row.mean is None else f"{100 * row.mean:.2f}"
    if row.mean is not None and row.sd is not None:
        accuracy += rf" $\pm$ {100 * row.sd:.2f}"
    if row.p is None:
        p = "--"
    else:
        p = f"${p_words(row.p)}$"
    difference = escape(row.why_none) if row.why_none else _interval(row.difference)
    label = escape(row.variant.label).strip()
    cells = [
        "{}" * label.startswith(("[", "*")) + label,  # which would else be read as an argument of the line's end above
        f"{len(row.finished)}/{len(row.cells)}",
        accuracy,
        difference,
        p,
        _interval(row.against),
        _interval(row.knocked.get("disabled")),
    ]
    return " & ".join(cells) + r" \\"


def _interval(of: Interval | None) -> str:
    if of is None:
        return "--"
    mean, low, high = (points_words(value) for value in (of.mean, of.low, of.high))
    return f"${mean}$ [${low}$, ${high}$]"


def methods(analysis: Analysis) -> str:
    """How the numbers came about, in one paragraph."""
    confirmed = analysis.stage("confirm")
    cells = [cell for group in confirmed for cell in group.cells]
    seeds = sorted({cell.seed for cell in cells})
    added = sorted({cell.seed for cell in cells if cell.added})
    budgets = " and ".join(str(budget) for budget in sorted({group.budget for group in confirmed}))
    diverged = sum(cell.state == "diverged" for cell in cells)
    words = [
        f"Each variant was trained with {len(seeds)} seeds ({_seeds(seeds)}) at training budgets of {budgets} epochs; "
        "for a seed, all variants of one host share its initial weights, the order of the data and their augmentation. "
        "The last epoch counts; the test split was read once a run.",
        "Added after looking at results: seeds " + ", ".join(map(str, added)) + "." if added else "",
        _chosen(analysis),
        f"The primary figure is the mean difference to the baseline ({_names(_baselines(confirmed))}), paired by seed, "
        f"with a {COVERS['difference']}. Two-sided p values are of sign flips of whole seeds, "
        f"{_exact(seeds)}, adjusted by single-step max-t (Westfall and Young, 1993) within two families declared "
        "beforehand for each budget: every variant and control against the baseline, and every attention variant "
        "against the strongest control, that with the highest mean difference.",
        f"{_controls(confirmed)} {diverged} of {len(cells)} runs diverged; a variant with a diverged or missing run "
        "has no mean difference.",
        "That attention is used was tested on validation images: the accuracy lost when the trained branch is "
        "disabled, when its weights are made uniform, and when its keys come from another image.",
    ]
    notes = [f"{group.title}: {mark}." for group in confirmed for mark in group.marks]
    notes += [] if analysis.quotable else [f"Not to be quoted: {'; '.join(analysis.why_not)}."]
    return "\n".join(escape(line) for line in [*words, analysis.agreement, *notes] if line) + "\n"


def _exact(seeds: Sequence[int]) -> str:
    return "all of them enumerated" if len(seeds) <= 16 else "65,536 of them drawn at random"


def _seeds(seeds: Sequence[int]) -> str:
    """1000 to 1011, where there is no gap."""
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _baselines(groups: Sequence[Group]) -> list[str]:
    return [group.rows[0].variant.label for group in groups]


def _names(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _controls(groups: Sequence[Group]) -> str:
    names = _names([row.variant.label for group in groups for row in group.rows if row.variant.kind == "control"])
    return f"Controls: {names}." if names else "There were no controls."


def _chosen(analysis: Analysis) -> str:
    if not analysis.screened:
        return "No variant was chosen by results: all that were specified were confirmed."
    screens = analysis.stage("screen")
    seeds, later = ({cell.seed for group in of for cell in group.cells} for of in (screens, analysis.stage("confirm")))
    fresh = "with fresh seeds" if not seeds & later else "with seeds of which some were used before"
    return (
        f"{len(analysis.screened)} attention variants were screened on the validation split alone with {len(seeds)} "
        f"seeds; confirmed {fresh} were {_names(analysis.confirmed)}."
    )
