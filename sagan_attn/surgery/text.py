"""Tables of plain text, for the `repr` of what a notebook or a terminal shows."""

from collections.abc import Mapping, Sequence

from sagan_attn.errors import one_line

__all__ = ["counted", "short_number", "text_table"]

MAX_ROWS = 30  # of a longer table the first and the last 15 are shown
MAX_CELL = 80  # letters


def text_table(columns: Mapping[str, str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under their headers, without spaces at the ends of lines.

    Control characters become `?`, and cells of over 80 letters and tables of over 30 rows lose their middle.

    Args:
        columns: header -> "<" for words or ">" for numbers.
        rows: a cell a column.
    """
    head = rows if len(rows) <= MAX_ROWS else rows[: MAX_ROWS // 2]
    tail = rows[len(rows) - MAX_ROWS // 2 :] if len(rows) > MAX_ROWS else []
    shown = [[_cell(text) for text in row] for row in (list(columns), *head, *tail)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [
        "  ".join(f"{text:{side}{width}}" for text, side, width in zip(row, columns.values(), widths, strict=True))
        for row in shown
    ]
    if tail:
        lines.insert(1 + len(head), f"... {len(rows) - MAX_ROWS} more ...")
    return "\n".join(line.rstrip() for line in lines)


def counted(number: int, what: str) -> str:
    """ "no sites", "1 site", "2 sites"."""
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def short_number(value: float, unit: str = "") -> str:
    """Three digits: 12.3 M, or 12.3 MFLOPs."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:  # what is rounded to it
            return f"{value / factor:.3g} {letter}{unit}"
    return f"{value} {unit}".rstrip()


def _cell(text: str) -> str:
    words = one_line(text[: 50 * MAX_CELL])  # a name from a file may have any length
    return words if len(words) <= MAX_CELL else f"{words[: MAX_CELL // 2]}…{words[1 - MAX_CELL // 2 :]}"
