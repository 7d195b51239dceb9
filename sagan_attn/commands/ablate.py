"""`python -m sagan_attn ablate <spec>`: one YAML in, a table with intervals and a verdict out."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sagan_attn.commands.sites import count, outermost
from sagan_attn.errors import ConfigError, one_line

if TYPE_CHECKING:
    from sagan_attn.ablation.spec import Spec
    from sagan_attn.ablation.store import Store

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", type=Path, help="configs/ablation/<name>.yaml")
    parser.add_argument("--folder", type=Path, help="of the results (default: runs/ablation/<name>)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and compute nothing")
    parser.add_argument("--stage", choices=("screen", "confirm"), help="that stage alone")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every cell: lr=0.1")
    parser.add_argument("--workers", type=count, metavar="N", help="cells at a time (default: 1, or 1 a device)")
    parser.add_argument("--devices", metavar="0,1", help="CUDA devices, by number; by default all, or the CPU")
    parser.add_argument("--cells-per-device", type=count, default=1, metavar="N")
    parser.add_argument("--threads", type=count, metavar="N", help="of a cell (default: an equal share of the cores)")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: auto or its address")
    parser.add_argument("--retry-failed", action="store_true", help="run cells that failed once more")
    parser.add_argument("--same-code", action="store_true", help="refuse to mix results of different code")
    parser.add_argument("--add-seeds", type=count, metavar="N", help="N more for `confirm`, marked as added")
    parser.add_argument("--screen-sites", action="store_true", help="screen every place of the host: which site?")


def run(arguments: argparse.Namespace) -> int:
    """Compute what is missing, then report. Returns 0 if every cell has a result, 1 if not, 130 after Ctrl-C.

    Raises `ConfigError` and what else is refused before anything runs.
    """
    from sagan_attn.ablation import plan as plans
    from sagan_attn.ablation.runner import run_cells
    from sagan_attn.ablation.spec import read_spec
    from sagan_attn.ablation.stages import add_confirm, cells_of
    from sagan_attn.ablation.store import Store, read_plan, read_results, valid_results
    from sagan_attn.training.quiet import quieten

    quieten()
    spec, extra = read_spec(arguments.spec), _settings(arguments.set)
    if arguments.stage == "screen" and spec.screen is None:
        raise ConfigError(f"{spec.path} has no stage `screen`")
    workers = _workers(arguments)
    store = Store(arguments.folder or Path("runs") / "ablation" / spec.name)
    try:
        if arguments.screen_sites:
            spec, extra = _with_all_sites(spec, extra), {**extra, "screen_sites": True}
        if arguments.dry_run:
            _print_plan(spec, plans.frozen(store, spec, extra) or _new_plan(spec, extra), workers)
            return 0
        with store.planning():
            plan = plans.frozen(store, spec, extra)
            changed = plan is None
            plan = plan or _new_plan(spec, extra)
            if arguments.add_seeds:
                changed |= plans.add_seeds(plan, spec, arguments.add_seeds, valid_results(store) if not changed else ())
            if changed:
                plans.freeze(store, plan)
        for stage in [stage.name for stage in spec.stages]:
            if arguments.stage == "screen" and stage == "confirm":
                break
            if stage not in plan["stages"]:
                with store.planning():
                    plan = plans.frozen(store, spec, extra) or plan  # another runner may have been here
                    if stage not in plan["stages"]:
                        chosen = add_confirm(plan, spec, read_results(store.folder)[0])
                        print(one_line(f"chosen by the screen: {', '.join(chosen)}"))
                        plans.freeze(store, plan)
            cells = cells_of(plan, stage)
            if arguments.stage == "confirm" and stage == "screen":
                if len({cell["key"] for cell in cells} - valid_results(store)):
                    raise ConfigError("--stage confirm: the screen is not complete; leave the option out to finish it")
                continue
            if not _compute(arguments, store, cells, workers, run_cells):
                _report(store)
                print(
                    f"{stage}: not every cell has a result; the same command computes what is missing, and "
                    "with --retry-failed what failed by its own fault"
                )
                return 1
        return _report(store)
    except KeyboardInterrupt:
        if not store.plan.is_file():
            print("\nstopped while planning: nothing was computed yet")
            return 130
        have, cells = valid_results(store), read_plan(store.folder)["cells"]
        print(f"\nstopped: {len(have)} of {len(cells)} cells have a result; the same command goes on from there")
        return 130
    except OSError as error:
        raise ConfigError(f"{store.folder} cannot be written: {error}; results that are there are whole") from error


def _new_plan(spec: "Spec", extra: dict[str, Any]) -> dict[str, Any]:
    from sagan_attn.ablation.plan import new_plan

    plan = new_plan(spec, {key: value for key, value in extra.items() if key != "screen_sites"})
    return {**plan, "set": extra}


def _compute(
    arguments: argparse.Namespace, store: "Store", cells: list[dict[str, Any]], workers: Any, run_cells: Any
) -> bool:
    def say(line: str) -> None:
        print(one_line(line), flush=True)  # names come from the plan

    how: dict[str, Any] = {"retry_failed": arguments.retry_failed, "same_code": arguments.same_code}
    if arguments.ray:
        from sagan_attn.ablation.cluster import run_on_ray

        return run_on_ray(store, cells, arguments.ray, say, share=1 / arguments.cells_per_device, **how)
    return run_cells(store, cells, workers, say, **how)


def _report(store: "Store") -> int:
    from sagan_attn.commands import report

    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(store.folder)]))


def _workers(arguments: argparse.Namespace) -> Any:
    import torch

    from sagan_attn.ablation.runner import Workers

    found = torch.cuda.device_count()
    devices = arguments.devices.split(",") if arguments.devices else [str(i) for i in range(found)]
    for device in devices:
        if not device.strip().isdigit() or int(device) >= found:
            raise ConfigError(f"--devices ({arguments.devices}): torch sees {found} CUDA devices here")
    workers = arguments.workers or max(1, len(devices) * arguments.cells_per_device)
    return Workers(workers, devices, arguments.threads)


def _settings(given: list[str]) -> dict[str, Any]:
    from sagan_attn.ablation.settings import check_settings

    settings = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: KEY=VALUE is required")
        try:
            settings[key] = yaml.safe_load(value)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"--set {text:.100}: its value is no YAML: {one_line(error)}") from error
    check_settings("--set", settings)
    return settings


def _with_all_sites(spec: "Spec", extra: dict[str, Any]) -> "Spec":
    """The spec with every place of its host as the axis `site`, second names of a place left out."""
    import torch

    from sagan_attn.ablation.models import network_of
    from sagan_attn.ablation.settings import apply_settings
    from sagan_attn.surgery.sites import survey
    from sagan_attn.training.resolve import resolve_config

    if spec.screen is None:
        raise ConfigError(f"{spec.path}: --screen-sites needs a stage `screen`")
    base = apply_settings("--set", apply_settings(str(spec.path), spec.base, spec.settings), extra)
    resolved = resolve_config(base, str(spec.path))
    resolved.data.setup("fit")
    host = network_of(resolved, [])
    side = resolved.data.preprocess.image_size
    found, _ = survey(host, torch.zeros(1, resolved.data.in_channels, side, side), "sagan", {})
    sites = [site.name for site in outermost(host, found) if site.positions > 1]
    return dataclasses.replace(spec, axes={**spec.axes, "site": sites})


def _print_plan(spec: "Spec", plan: dict[str, Any], workers: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from sagan_attn.ablation.estimate import DEFAULT_SD, detectable, outlook, seconds_an_image

    table = Table(title=f"{plan['name']}: what would be run", title_justify="left", box=None, pad_edge=False)
    for header in ("variant", "kind", "compared with", "parameters", "FLOPs", "ms an image", "cells"):
        table.add_column(header, justify="left" if header in ("variant", "kind", "compared with") else "right")
    an_image = seconds_an_image(plan["variants"], workers.threads_of_one())
    for name, variant in plan["variants"].items():
        cells = sum(cell["variant"] == name for cell in plan["cells"])
        beside = "" if variant["kind"] == "baseline" else variant["baseline"]
        numbers = (f"{variant['parameters']:,}", f"{variant['flops']:,}", f"{1000 * an_image[name]:.2f}", str(cells))
        table.add_row(one_line(name), one_line(variant["kind"]), one_line(beside), *numbers)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=160)
    console.print(table)
    for name, variant in plan["variants"].items():
        if variant["note"]:
            print(one_line(f"{name}: {variant['note']}"))
    seconds = 0.0
    for stage in spec.stages:
        ahead = outlook(plan, stage, an_image)
        seconds += ahead.seconds
        print(
            f"{stage.name}: {ahead.variants} variants x {ahead.seeds} seeds x epochs "
            f"{', '.join(map(str, ahead.budgets))} = {ahead.cells} cells; "
            + (
                f"smallest effect seen with 80 % power: {100 * detectable(plan, ahead):.2f} points of accuracy"
                if stage.name == "confirm"
                else "it chooses, and nothing of it is quoted"
            )
        )
    sd = plan["expected_sd"] or DEFAULT_SD
    known = "the spec's expected_sd" if plan["expected_sd"] else "no expected_sd is given"
    print(
        f"That effect is for a standard deviation of {100 * sd:g} points between runs ({known}), unpaired, 5 % over "
        "all comparisons of the stage."
    )
    minutes = math.ceil(seconds / workers.count / 60)
    print(f"About {minutes} minutes with {workers.count} at a time on this machine.")
