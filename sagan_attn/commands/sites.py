"""`python -m sagan_attn sites <model>`: where a block can go in a model, and what it would cost there."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from torch import nn

from sagan_attn.commands.models import add_model_arguments, create_model, example_image, json_object
from sagan_attn.surgery.build import check_block
from sagan_attn.surgery.cost import Budget
from sagan_attn.surgery.select import anchor_of
from sagan_attn.surgery.sites import NUMBERS, Site, SortBy, sort_sites, survey, within
from sagan_attn.surgery.text import short_number

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--block", default="sagan", help="registered name (default: sagan)")
    parser.add_argument(
        "--options", type=json_object, default={}, metavar="JSON", help="""of the block: '{"pool": 2}'"""
    )
    parser.add_argument("--sort", choices=get_args(SortBy), help="smallest first; by default in the model's order")
    parser.add_argument(
        "--max-flops-share", type=float, metavar="SHARE", help="0.05: at most 5 %% of the model's FLOPs"
    )
    parser.add_argument("--max-map-bytes", type=float, metavar="BYTES", help="100e6: at most 100 MB of weights")
    parser.add_argument("--limit", type=count, metavar="N", help="the first N places")
    parser.add_argument("--all", action="store_true", help="identities and all names of a place, too")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the places. Raises `ConfigError`, `GraftError` or `BlockError`."""
    budget = Budget(arguments.max_flops_share, arguments.max_map_bytes)
    check_block(arguments.block, arguments.options)  # before a library of models is imported
    model = create_model(arguments.model, arguments.model_options)
    example = example_image(model, arguments.model, arguments.image_size)
    found, host_flops = survey(model, example, arguments.block, arguments.options)
    shown = found if arguments.all else outermost(model, found)
    places = len(shown)
    shown = sort_sites(within(shown, budget), arguments.sort)[: arguments.limit]
    if arguments.json:
        json.dump([{**asdict(site), "positions": site.positions} for site in shown], sys.stdout, indent=1)
        print()
        return 0
    height, width = example.shape[-2:]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _print_table(shown, f"{arguments.block} in {arguments.model}, one image of {height} x {width}")
    print(
        f"{arguments.model} itself: {parameters:,} parameters, {short_number(host_flops, 'FLOPs')}; "
        f"{len(shown)} of {places} places shown"
    )
    return 0


def count(text: str) -> int:
    """A whole number of at least 1, as an argparse type."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def outermost(model: nn.Module, found: Sequence[Site]) -> list[Site]:
    """The sites without second names of a place, of which that with the fewest parts stays, and without identities."""
    kept: dict[int, Site] = {}
    for site in found:
        module = anchor_of(model, site.name)[1]
        if isinstance(module, nn.Identity):
            continue
        anchor = id(module)
        other = kept.get(anchor)
        if other is None or site.name.count(".") < other.name.count("."):
            kept[anchor] = site
    names = {site.name for site in kept.values()}
    return [site for site in found if site.name in names]


def _print_table(shown: Sequence[Site], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("name", overflow="fold")
    for header in NUMBERS:
        table.add_column(header, justify="right", no_wrap=True)
    for site in shown:
        table.add_row(*site.row())
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=200)  # a file or pipe has room for long names
    console.print(table)
