"""`bench scaling`: time and memory of a block's forward and backward pass against the number of positions."""

import argparse
from typing import TYPE_CHECKING, Any

from sagan_attn.bench.block import Options
from sagan_attn.bench.floor import Ceilings, measure_ceilings
from sagan_attn.bench.peers import OURS, PEERS, check_peers
from sagan_attn.bench.plots import line
from sagan_attn.bench.scaling import SIZES, Scaled, cases_of, exponents, measure_scaled
from sagan_attn.bench.tables import ceiling_words, print_table, skipped_words, spread
from sagan_attn.commands.bench_block import add_peer_arguments
from sagan_attn.commands.bench_options import Files, add_common_arguments, budget_of, device_of, note
from sagan_attn.commands.models import image_size
from sagan_attn.commands.sites import count
from sagan_attn.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["add_arguments", "run"]

QUICK_SIZES = SIZES[:5]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes", type=image_size, nargs="+", metavar="HxW", help="of the map (default: 16x16 to 128x128)"
    )
    parser.add_argument("--channels", type=count, default=64, metavar="C", help="of the map (default: 64)")
    add_peer_arguments(parser, ["plain"], ["fp32"])
    add_common_arguments(parser, repetitions=3, seconds=3.0)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. Raises `ConfigError`."""
    device, peers, files = device_of(arguments), check_peers(arguments.peers), Files(arguments)
    sizes = list(dict.fromkeys(arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES)))
    if len(sizes) < 2:
        raise ConfigError(f"--sizes has {len(sizes)} size: at least two are required to see growth")
    options = Options(device, budget_of(arguments), arguments.max_bytes, arguments.max_call_seconds)
    ceilings = measure_ceilings(arguments.dtypes, device, 0.1 if arguments.quick else 1.0)
    note(ceiling_words(ceilings))
    results: list[Scaled] = []
    for case in cases_of(arguments.channels, sizes, arguments.dtypes):
        results.append(measure_scaled(case, peers, options))
        peak = results[-1].bytes.get(OURS, 0)
        note(f"{case.name}: {1000 * results[-1].measured.median(OURS):.3g} ms, {peak / 1e6:,.1f} MB")
        files.write(content(results, ceilings))
    print_table(
        f"forward and backward of one sample on {device.type}", ["H x W", "dtype", *_headers(results)], _rows(results)
    )
    for dtype, found in exponents(results).items():
        for name, fitted in found.items():
            print(f"{name}, {dtype}: time ~ N^{fitted['time']:.2f}, memory ~ N^{fitted['memory']:.2f}")
    for words in (*skipped_words([r.measured for r in results]), ceiling_words(ceilings)):
        print(words)
    files.draw(lambda: figure(results, f"Forward and backward, {arguments.channels} channels, on {device.type}"))
    return 0


def content(results: list[Scaled], ceilings: Ceilings) -> dict[str, Any]:
    """What goes into the JSON file."""
    return {
        "bench": "scaling",
        "ceilings": {"flops_per_second": dict(ceilings.flops), "bytes_per_second": ceilings.bandwidth},
        "exponents": exponents(results),
        "cases": [result.to_dict(ceilings) for result in results],
    }


def _shown(results: list[Scaled]) -> list[str]:
    return [name for name in PEERS if any(name in r.bytes for r in results)]


def _headers(results: list[Scaled]) -> list[str]:
    return [f"{name} {unit}" for name in _shown(results) for unit in ("ms", "MB")]


def _rows(results: list[Scaled]) -> list[list[str]]:
    rows = []
    for r in results:
        row = [f"{r.measured.case.height} x {r.measured.case.width}", r.measured.case.dtype]
        for name in _shown(results):
            known = name in r.bytes
            row.append(spread([1000 * s for s in r.measured.seconds[name]]) if known else "-")
            row.append(f"{r.bytes[name] / 1e6:,.1f}" if known else "-")
        rows.append(row)
    return rows


def figure(results: list[Scaled], title: str) -> "Figure":
    """Time and memory against the number of positions, with the fitted exponents."""
    from matplotlib.figure import Figure

    fitted = exponents(results)
    kinds = list(dict.fromkeys(r.measured.case.dtype for r in results))
    drawn = Figure(figsize=(10, 4.2 * len(kinds)), layout="constrained")
    panels = drawn.subplots(len(kinds), 2, squeeze=False)
    for row, dtype in enumerate(kinds):
        for name in PEERS:
            mine = [r for r in results if r.measured.case.dtype == dtype and name in r.bytes]
            if not mine:
                continue
            n = [r.measured.case.positions for r in mine]
            power = fitted.get(dtype, {}).get(name)
            words = {key: f"{name}: N^{power[key]:.2f}" if power else name for key in ("time", "memory")}
            milliseconds = [[1000 * s for s in r.measured.seconds[name]] for r in mine]
            line(panels[row, 0], name, n, milliseconds, words["time"])
            line(panels[row, 1], name, n, [[r.bytes[name] / 1e6] for r in mine], words["memory"])
        for column, (what, unit) in enumerate((("time", "ms"), ("peak memory", "MB"))):
            axes = panels[row, column]
            axes.set_title(f"{what}, {dtype}")
            axes.set_xlabel("positions N = H x W")
            axes.set_ylabel(f"{what} ({unit})")
            axes.legend(fontsize=8)
    drawn.suptitle(title, fontsize=11)
    return drawn
