"""`bench block`: the block against its peers, shape by shape."""

import argparse
import re

from sagan_attn.bench.block import Measured, Options, grid, measure
from sagan_attn.bench.floor import DTYPES, Ceilings, measure_ceilings
from sagan_attn.bench.peers import DEFAULT_PEERS, OURS, PEERS, check_peers
from sagan_attn.bench.plots import block_figure
from sagan_attn.bench.tables import block_table, block_words, ceiling_words, print_table
from sagan_attn.commands.bench_options import (
    Files,
    add_common_arguments,
    budget_of,
    device_of,
    dtypes,
    names,
    note,
    positive,
)

__all__ = ["add_arguments", "add_peer_arguments", "run"]

QUICK_SHAPES = [(8, 64, 8, 8), (4, 256, 16, 16), (1, 64, 32, 32)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        type=shape,
        nargs="+",
        metavar="B,C,HxW",
        help="by default C of 64, 128, 256 and 512 at sides of 4, 8, 16, 32 and 64",
    )
    parser.add_argument("--passes", choices=("forward", "backward", "both"), default="both")
    add_peer_arguments(parser, DEFAULT_PEERS, list(DTYPES))
    parser.add_argument("--channels-last", action="store_true", help="maps and weights in that memory format")
    add_common_arguments(parser)


def add_peer_arguments(parser: argparse.ArgumentParser, default: list[str], default_dtypes: list[str]) -> None:
    """`--peers`, `--dtypes` and `--max-bytes`."""
    parser.add_argument(
        "--peers",
        type=names,
        default=default,
        metavar="NAME,NAME",
        help=f"beside {OURS}, of {', '.join(PEERS)} (default: {','.join(default)})",
    )
    parser.add_argument(
        "--dtypes",
        type=dtypes,
        default=default_dtypes,
        metavar="DTYPE,DTYPE",
        help=f"of maps and weights, of {', '.join(DTYPES)} (default: {','.join(default_dtypes)})",
    )
    parser.add_argument(
        "--max-bytes",
        type=positive,
        default=2.0**30,
        metavar="BYTES",
        help="peers whose N x N weights would take more are left out (default: 2^30)",
    )
    parser.add_argument(
        "--max-call-seconds",
        type=positive,
        default=20.0,
        metavar="S",
        help="and those that take longer for one call (default: 20)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. Raises `ConfigError`."""
    device, peers, files = device_of(arguments), check_peers(arguments.peers), Files(arguments)
    options = Options(
        device, budget_of(arguments), arguments.max_bytes, arguments.max_call_seconds, arguments.channels_last
    )
    cases = grid(arguments.dtypes, arguments.shapes or (QUICK_SHAPES if arguments.quick else None))
    cases = [case for case in cases if arguments.passes in ("both", "backward" if case.backward else "forward")]
    seconds = 0.1 if arguments.quick else 1.0
    ceilings = measure_ceilings(arguments.dtypes, device, seconds)
    note(ceiling_words(ceilings))
    results: list[Measured] = []
    for number, case in enumerate(cases, 1):
        result = measure(case, peers, options)
        results.append(result)
        speed = result.speed(OURS, best := result.best_peer())
        against = "" if speed is None else f", {speed:.2f} of the speed of {best}"
        note(f"{number} of {len(cases)}: {case.name}: {1000 * result.median(OURS):.3g} ms{against}")
        files.write(content(results, ceilings))
    ceilings = ceilings.best(measure_ceilings(arguments.dtypes, device, seconds))  # the machine may have been busy
    title = f"{OURS} and its peers on {device.type}, milliseconds"
    print_table(title, *block_table(results, ceilings))
    print(ceiling_words(ceilings))
    print("vs best, vs plain: speed of sagan over that of the fastest other block of the same form, and of plain")
    for line in block_words(results):
        print(line)
    files.write(content(results, ceilings))
    files.draw(lambda: block_figure(results, ceilings, f"Time of one block over the floor on {device.type}"))
    return 0


def content(results: list[Measured], ceilings: Ceilings) -> dict:
    """What goes into the JSON file."""
    return {
        "bench": "block",
        "ceilings": {"flops_per_second": dict(ceilings.flops), "bytes_per_second": ceilings.bandwidth},
        "cases": [result.to_dict(ceilings) for result in results],
    }


def shape(text: str) -> tuple[int, int, int, int]:
    """Batch, channels, height and width from "8,256,32x32", as an argparse type."""
    found = re.fullmatch(r"(\d+),(\d+),(\d+)x(\d+)", text.replace(" ", ""), re.ASCII)
    sides = tuple(map(int, found.groups())) if found else ()
    if len(sides) != 4 or not all(sides):
        raise argparse.ArgumentTypeError(f"{text!r} must be <batch>,<channels>,<height>x<width>: 8,256,32x32")
    return sides
