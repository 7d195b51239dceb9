"""What the benchmarks of the command line have in common: options, progress and files."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sagan_attn.bench.floor import DTYPES
from sagan_attn.bench.machine import check_writable, get_device, save
from sagan_attn.bench.timing import Budget
from sagan_attn.commands.sites import count
from sagan_attn.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Files", "add_common_arguments", "budget_of", "device_of", "dtypes", "names", "note", "positive"]


def add_common_arguments(parser: argparse.ArgumentParser, *, repetitions: int = 5, seconds: float = 5.0) -> None:
    """`--device`, `--repetitions`, `--seconds`, `--quick`, `--json` and `--plot`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--repetitions", type=count, metavar="N", help=f"readings of each at least (default: {repetitions}; quick: 2)"
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        metavar="S",
        help=f"more readings until so many have passed for a case, all peers together (default: {seconds:g}; quick: 0)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases: under a minute on two cores")
    parser.add_argument(
        "--keep-freed-memory", action="store_true", help="the C library does not hand memory back, as in training here"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, machine, versions and date")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them: .png, .svg or .pdf")
    parser.set_defaults(default_repetitions=repetitions, default_seconds=seconds)


def budget_of(arguments: argparse.Namespace) -> Budget:
    """How often is measured: what was asked for, else few readings for `--quick`, else the benchmark's own number."""
    usual = (2, 0.0) if arguments.quick else (arguments.default_repetitions, arguments.default_seconds)
    repetitions, seconds = arguments.repetitions, arguments.seconds
    return Budget(usual[0] if repetitions is None else repetitions, usual[1] if seconds is None else seconds)


def device_of(arguments: argparse.Namespace) -> torch.device:
    """The device asked for. Raises `ConfigError` for a missing one."""
    return get_device(arguments.device)


def positive(text: str) -> float:
    """A finite number of at least 0, as an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return value


def names(text: str) -> list[str]:
    """Names parted by commas, as an argparse type."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} must be one name or several, parted by commas")
    return found


def dtypes(text: str) -> list[str]:
    """fp32, bf16 or both, as an argparse type."""
    found = names(text)
    for name in found:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"{name!r} must be {' or '.join(DTYPES)}")
    return list(dict.fromkeys(found))


class Files:
    """The files asked for. Raises `ConfigError` where one cannot be written."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.json: Path | None = arguments.json
        self.plot: Path | None = arguments.plot
        self.asked = {
            key: value if isinstance(value, (int, float, bool, str, list, type(None))) else str(value)
            for key, value in vars(arguments).items()
            if not key.startswith(("run", "default_")) and key not in ("command", "json", "plot")
        }
        check_writable(self.json)
        check_writable(self.plot)
        if self.plot is not None and self.plot.suffix not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"--plot {self.plot} must end in .png, .svg or .pdf")

    def write(self, content: Mapping[str, Any]) -> None:
        """Write the JSON file: also in between, so that a run that is stopped leaves what it has."""
        if self.json is not None:
            save(self.json, {"options": self.asked, **content})

    def draw(self, figure: "Callable[[], Figure]") -> None:
        if self.plot is not None:
            from sagan_attn.viz.draw import save_figure

            save_figure(figure(), self.plot)


def note(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
