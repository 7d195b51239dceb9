"""One page that shows everything and fetches nothing: style, script and figures are in it, links are relative.

Names, errors and labels come from files and are escaped; figures are images, in which no script runs; the page's own
policy forbids every fetch and every script but the one of its hash.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from sagan_attn.ablation.analysis import Analysis, Group
from sagan_attn.ablation.records import Cell
from sagan_attn.ablation.report.columns import COLUMNS
from sagan_attn.ablation.report.page_parts import SCRIPT, STYLE
from sagan_attn.ablation.report.tables import status_words
from sagan_attn.ablation.verdict import COVERS
from sagan_attn.viz.page import frame
from sagan_attn.viz.page import text as escaped

__all__ = ["page"]

LINKS = (
    ("config.yaml", "config"),
    ("log.txt", "log"),
    ("result.json", "result"),
    ("failure.json", "error"),
)
FIGURES = {
    "forest": "Paired differences to the baseline with their intervals",
    "curves": "Learning curves: mean and standard deviation over seeds",
    "gamma": "Gamma over training: mean and standard deviation over seeds. Its size proves nothing",
    "cost": "Accuracy against parameters, FLOPs, speed and memory",
}
STATES = ("failed", "diverged", "missing", "finished")
WORDS = ("note", "kind", "files", "error")  # columns to the left
CELL_HEADS = ("variant", "stage", "epochs", "seed", "state", "accuracy %", "files", "error")


def page(analysis: Analysis, svgs: Mapping[str, bytes], folder: Path, at: Path) -> str:
    """The page as text.

    Args:
        svgs: figures by name, as `draw` names them.
        folder: of the ablation.
        at: the folder the page will lie in, from which links to the cells' files lead.
    """
    title = f"Ablation {analysis.name}"
    body = [
        f"<h1>{escaped(title)}</h1>",
        *_verdicts(analysis),
        *(line for group in analysis.groups for line in _group(group)),
        *_figures(analysis, svgs),
        *_cells(analysis, folder, at),
        *_legend(),
    ]
    return frame(title, body, STYLE, SCRIPT)


def _verdicts(analysis: Analysis) -> list[str]:
    lines = []
    for group in analysis.groups:
        screen = group.stage == "screen"
        words = "screen: not to be quoted" if screen else "not to be quoted yet" if analysis.why_not else ""
        stamp = f' <span class="stamp">{words}</span>' if words else ""
        lines.append(
            f'<p class="verdict{" screen" if screen else ""}"><b>{escaped(group.title)}{stamp}</b>'
            f"{escaped(group.beside + group.verdict)}</p>"
        )
    words = status_words(analysis)
    if analysis.problems:
        words.append("Files that were left out:")
        words += analysis.problems
    if words:
        kind = "warn" if analysis.why_not or analysis.problems else "dim"
        lines += [f'<div class="{kind}">', *(f"<p>{escaped(line)}</p>" for line in words), "</div>"]
    return lines


def _group(group: Group) -> list[str]:
    stamp = ' <span class="stamp">not to be quoted</span>' if group.stage == "screen" else ""
    heads = [_head(column.header, column.meaning, column.header in WORDS) for column in COLUMNS]
    lines = [
        f"<h2>{escaped(group.title)}{stamp}</h2>",
        f'<p class="dim">{escaped(group.metric)} of the last epoch, differences in percentage points</p>',
        '<div class="wide" tabindex="0"><table class="sortable">',
        f"<thead><tr>{''.join(heads)}</tr></thead>",
        "<tbody>",
    ]
    for row in group.rows:
        kinds = " ".join(
            word for word in (row.variant.kind, row.outcome) if word in ("baseline", "control", "gain", "harm")
        )
        cells = []
        for column in COLUMNS:
            value = column.value(row)
            cells.append(_data(column.text(row), "" if value is None else value, column.header in WORDS))
        lines.append(f'<tr class="{kinds}">{"".join(cells)}</tr>')
    lines += ["</tbody></table></div>"]
    if group.marks:
        lines += ['<ul class="marks">', *(f"<li>{escaped(mark)}</li>" for mark in group.marks), "</ul>"]
    return lines


def _head(header: str, meaning: str = "", words: bool = False) -> str:
    kind = ' class="words"' if words else ""
    return f'<th scope="col"{kind} title="{escaped(meaning)}"><button type="button">{escaped(header)}</button></th>'


def _data(text: str, value: object, words: bool = False) -> str:
    kind = ' class="words"' if words else ""
    return f'<td{kind} data-v="{escaped(value)}">{escaped(text)}</td>'


def _figures(analysis: Analysis, svgs: Mapping[str, bytes]) -> list[str]:
    lines = ["<h2>Figures</h2>", '<div class="figures">'] if svgs else []
    for name, svg in svgs.items():
        kind, stage = name.split("-")[:2]
        words = f"{FIGURES.get(kind, kind)}: {stage}"
        data = base64.b64encode(svg).decode()
        lines.append(f'<figure><img alt="{escaped(words)}" src="data:image/svg+xml;base64,{data}"></figure>')
    return [*lines, "</div>"] if svgs else []


def _cells(analysis: Analysis, folder: Path, at: Path) -> list[str]:
    """Every run with links to its files, those without a result in sight."""
    cells = list({cell.key: cell for cell in analysis.cells}.values())
    labels = {row.variant.name: row.variant.label for group in analysis.groups for row in group.rows}
    states = {state: [cell for cell in cells if cell.state == state] for state in STATES}
    words = ", ".join(f"{len(found)} {state}" for state, found in states.items() if found)
    lines = ["<h2>Runs</h2>", f"<p>{len(cells)} runs: {words}.</p>"]
    without = [cell for state, found in states.items() if state != "finished" for cell in found]
    for title, found, seen in (("Without an accuracy", without, " open"), ("Finished", states["finished"], "")):
        if found:
            lines += [
                f"<details{seen}><summary>{title}</summary>",
                '<div class="wide" tabindex="0"><table class="sortable">',
                f"<thead><tr>{''.join(_head(head, words=head in WORDS) for head in CELL_HEADS)}</tr></thead>",
                "<tbody>",
                *(_run(cell, labels[cell.variant], _links(cell, folder, at)) for cell in found),
                "</tbody></table></div></details>",
            ]
    return lines


def _run(cell: Cell, label: str, links: str) -> str:
    accuracy = None if cell.accuracy is None else 100 * cell.accuracy
    cells = (
        _data(label, label),
        _data(cell.stage, cell.stage),
        _data(str(cell.budget), cell.budget),
        _data(f"{cell.seed}{' (added after looking)' if cell.added else ''}", cell.seed),
        f'<td class="{cell.state}" data-v="{cell.state}">{cell.state}</td>',
        _data("-" if accuracy is None else f"{accuracy:.2f}", "" if accuracy is None else accuracy),
        f'<td class="words" data-v="{escaped(cell.key)}">{links}</td>',
        _data(cell.error, cell.error, True),
    )
    return f"<tr>{''.join(cells)}</tr>"


def _links(cell: Cell, folder: Path, at: Path) -> str:
    """Links to those of the cell's files that there are."""
    place = folder / "cells" / cell.key
    found = [(place / file, words) for file, words in LINKS if (place / file).is_file()]
    return " ".join(f'<a href="{escaped(_relative(path, at))}">{words}</a>' for path, words in found) or "-"


def _relative(path: Path, at: Path) -> str:
    """With "./" in front, so that a colon in a name is no scheme."""
    return "./" + quote(os.fsencode(Path(os.path.relpath(path.resolve(), at.resolve())).as_posix()))


def _legend() -> list[str]:
    lines: Sequence[str] = [f"<dt>{escaped(c.header)}</dt><dd>{escaped(c.meaning)}</dd>" for c in COLUMNS]
    return [
        "<h2>How to read this</h2>",
        f'<p class="dim">Primary figure: {escaped(COVERS["difference"])}. Wider: {escaped(COVERS["images"])}. '
        "Intervals are those of one comparison, not adjusted for having picked the best of several; p is adjusted for "
        "the family of all variants and controls, and in a second one for all attention variants against the strongest "
        "control. "
        "Distinguishable means that the interval leaves out 0 and p is below 0.05.</p>",
        f"<details><summary>Columns</summary><dl>{''.join(lines)}</dl></details>",
    ]
