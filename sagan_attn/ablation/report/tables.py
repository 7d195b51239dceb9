"""The results as tables: on the terminal, as CSV, as Parquet."""

import csv
import importlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sagan_attn.ablation.analysis import Analysis, Group
from sagan_attn.ablation.report.columns import COLUMNS
from sagan_attn.errors import ConfigError
from sagan_attn.files import no_formula

__all__ = ["csv_text", "parquet_bytes", "print_report", "status_words"]


def status_words(analysis: Analysis) -> list[str]:
    """What stands beside the verdicts: whether they may be quoted, and whether the budgets agree."""
    lines = [f"Not to be quoted: {'; '.join(analysis.why_not)}."] if analysis.why_not else []
    return lines + ([analysis.agreement] if analysis.agreement else [])


def print_report(analysis: Analysis) -> None:
    """The verdicts and a table for each stage and budget, on stdout."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, width=240)  # rather long lines than figures cut off
    for group in analysis.groups:
        console.print(_plain(f"{group.title}: {group.beside}{group.verdict}"), soft_wrap=True)
    for line in status_words(analysis):
        console.print(_plain(line), soft_wrap=True)
    for group in analysis.groups:
        console.print()
        console.print(_table(group))
        for mark in group.marks:
            console.print(_plain(f"! {mark}"), soft_wrap=True)
    for cell in analysis.cells:
        if cell.error:
            console.print(_plain(f"! cell {cell.key} ({cell.variant}, seed {cell.seed}): {cell.error}"), soft_wrap=True)
    for problem in analysis.problems:
        console.print(_plain(f"! {problem}"), soft_wrap=True)


def _table(group: Group) -> Any:
    from rich.table import Table

    shown = [column for column in COLUMNS if column.short]
    note = " (not to be quoted)" if group.stage == "screen" else ""
    table = Table(
        title=f"{group.title}{note}; {group.metric}, differences in percentage points [95 % interval]",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for column in shown:
        text = column.header in ("variant", "note")
        table.add_column(column.header, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for row in group.rows:
        table.add_row(*(_plain(column.text(row)) for column in shown))
    return table


def _plain(text: str) -> str:
    """One line without control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a header; empty for None. The records have the same keys. Texts are as `no_formula` makes them."""
    out = io.StringIO()
    if records:
        writer = csv.writer(out, lineterminator="\n")
        names = list(records[0])
        rows = [names, *([record[name] for name in names] for record in records)]
        writer.writerows([no_formula(value) for value in row] for row in rows)
    return out.getvalue()


def parquet_bytes(records: Sequence[Mapping[str, Any]]) -> bytes:
    """The same as Parquet. Raises `ConfigError` where pyarrow is not installed."""
    try:
        importlib.import_module("pyarrow")
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow: pip install 'sagan_attn[report]', or take --csv") from error
    import pandas as pd

    out = io.BytesIO()
    pd.DataFrame(list(records)).to_parquet(out, index=False)
    return out.getvalue()
