"""Results as tables on the terminal."""

from collections.abc import Sequence
from typing import Any

from sagan_attn.bench.block import Measured
from sagan_attn.bench.floor import Ceilings
from sagan_attn.bench.machine import summary
from sagan_attn.bench.peers import OURS, PEERS

__all__ = ["block_table", "block_words", "ceiling_words", "print_table", "skipped_words", "spread"]

SLOWER = 1.05  # what is slower than the fastest by more is named


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: the first column to the left, the others to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False, width=240).print(table)  # rather long lines than figures cut off


def spread(values: Sequence[float]) -> str:
    """Median and, in brackets, smallest and largest."""
    of = summary(values)
    return f"{of['median']:.3g} ({of['min']:.3g}-{of['max']:.3g})"


def ceiling_words(ceilings: Ceilings) -> str:
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in ceilings.flops.items())
    return f"ceilings: matrix product {rates}; copy {ceilings.bandwidth / 1e9:,.1f} GB/s"


def block_table(results: Sequence[Measured], ceilings: Ceilings) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row a case: milliseconds, and how ours stands."""
    names = [name for name in PEERS if any(name in r.seconds or name in r.skipped for r in results)]
    headers = ["B, C, H x W", "dtype", "pass", "floor ms", *names, "min-max", "x floor", "vs best", "vs plain"]
    rows = []
    for r in results:
        case = r.case
        times = [f"{1000 * r.median(name):.3g}" if name in r.seconds else "-" for name in names]
        ours, floor = r.seconds[OURS], ceilings.floor(case)
        best, plain = r.speed(OURS, r.best_peer()), r.speed(OURS, "plain")
        rows.append(
            [
                f"{case.batch}, {case.channels}, {case.height} x {case.width}",
                case.dtype,
                "fwd+bwd" if case.backward else "fwd",
                f"{1000 * floor:.3g}",
                *times,
                f"{1000 * min(ours):.3g}-{1000 * max(ours):.3g}",
                f"{r.median(OURS) / floor:.2f}",
                "-" if best is None else f"{best:.2f}",
                "-" if plain is None else f"{plain:.2f}",
            ]
        )
    return headers, rows


def block_words(results: Sequence[Measured]) -> list[str]:
    """Where ours is slower than a peer, where `auto` is slower than a forced path, and what was left out."""
    lines = []
    for r in results:
        best = r.best_peer()
        speed = r.speed(OURS, best)
        if speed is not None and speed < 1 / SLOWER:
            lines.append(f"slower than {best}: {r.case.name}: {speed:.2f} of its speed")
    for r in results:
        forced = [name for name in r.seconds if PEERS[name].kind == "ours" and name != OURS]
        fastest = min(forced, key=r.median, default=None)
        speed = r.speed(OURS, fastest)
        if speed is not None and speed < 1 / SLOWER:
            lines.append(f"auto is not the fastest path: {r.case.name}: {speed:.2f} of the speed of {fastest}")
    return lines + skipped_words(results)


def skipped_words(results: Sequence[Measured]) -> list[str]:
    """What was left out where, and why."""
    lines = []
    reasons: dict[tuple[str, str], list[Any]] = {}
    for r in results:
        for name, reason in r.skipped.items():
            reasons.setdefault((name, reason), []).append(r.case)
    for (name, reason), cases in reasons.items():
        more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        lines.append(f"without {name}: {cases[0].name}{more}: {reason}")
    return lines
