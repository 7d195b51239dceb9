"""`bench data`: images a second of the library's data path, against torchvision's pipeline and timm's loader."""

import argparse
import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sagan_attn.bench.machine import summary
from sagan_attn.bench.plots import dot_figure
from sagan_attn.bench.tables import print_table, spread
from sagan_attn.bench.timing import interleaved, ratios
from sagan_attn.commands.bench_options import Files, add_common_arguments, budget_of, device_of, note
from sagan_attn.commands.sites import count

__all__ = ["add_arguments", "run"]

OURS = "sagan_attn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", metavar="FOLDER", help="images to hold in memory, as [split/]class/file (default: random pixels)"
    )
    parser.add_argument("--image-size", type=count, default=32, metavar="SIDE", help="of those (default: 32)")
    parser.add_argument("--images", type=count, metavar="N", help="held at most (default: 20000; quick: 4000)")
    parser.add_argument(
        "--photos", metavar="FOLDER", help="photographs to decode anew each time (default: random JPEGs of 500 x 375)"
    )
    parser.add_argument("--photo-size", type=count, default=224, metavar="SIDE", help="of those (default: 224)")
    parser.add_argument("--photo-count", type=count, metavar="N", help="random JPEGs (default: 1024; quick: 192)")
    parser.add_argument("--batch-size", type=count, default=128, metavar="B", help="default: 128")
    parser.add_argument("--photo-batch-size", type=count, default=64, metavar="B", help="default: 64")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="processes of each loader (default: 2)")
    parser.add_argument("--label", default="", help="name of the data, for the JSON file")
    add_common_arguments(parser, repetitions=5, seconds=0)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. Raises `ConfigError` or `DataError`."""
    device, files, budget = device_of(arguments), Files(arguments), budget_of(arguments)
    from sagan_attn.commands import bench_data_sources as sources  # Lightning, torchvision and timm with it

    images = arguments.images or (4000 if arguments.quick else 20_000)
    count = arguments.photo_count or (192 if arguments.quick else 1024)
    results: dict[str, Any] = {}
    readings: dict[str, dict[str, list[float]]] = {}

    def measured(name: str, epochs: Mapping[str, sources.Epoch]) -> None:
        seconds = interleaved({way: epoch.run for way, epoch in epochs.items()}, budget, device)
        readings[name] = {way: [epochs[way].images / s for s in values] for way, values in seconds.items()}
        results[name] = {
            "images": {way: epoch.images for way, epoch in epochs.items()},
            "images_per_second": {way: summary(values) for way, values in readings[name].items()},
            "speed_over": {way: ratios(readings[name], OURS, way) for way in seconds if way != OURS},
        }
        note(f"{name}: {results[name]['images_per_second'][OURS]['median']:,.0f} images/s")
        files.write({"bench": "data", "label": arguments.label, "results": results})

    held = sources.held_data(arguments.root, arguments.image_size, images, arguments.batch_size)
    measured("held", sources.held_epochs(held, arguments.workers, device))
    if device.type == "cuda":
        results["training"] = sources.overlap(held, device, budget)
    with contextlib.ExitStack() as stack:
        folder = arguments.photos
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            sources.write_photos(Path(folder), count)
        streamed = sources.streamed_data(folder, arguments.photo_size, arguments.photo_batch_size, arguments.workers)
        measured("streamed", sources.streamed_epochs(streamed, sources.timm_loaders(streamed, device), device))
    _report(results, readings, device.type)
    files.write({"bench": "data", "label": arguments.label, "results": results})
    files.draw(lambda: dot_figure(readings, "images a second", f"Data path on {device.type}"))
    return 0


def _report(results: Mapping[str, Any], readings: Mapping[str, Mapping[str, Sequence[float]]], device: str) -> None:
    rows = []
    for name, ways in readings.items():
        for way, values in ways.items():
            over = results[name]["speed_over"].get(way)
            rows.append([f"{name}: {way}", spread(values), "" if over is None else f"{over:.2f}"])
    print_table(f"images a second on {device}", ["", "median (min-max)", "speed of ours over it"], rows)
    if "training" in results:
        of = results["training"]
        words = ", ".join(f"{name} {ms['median']:.3g} ms" for name, ms in of["ms_per_step"].items())
        print(f"resnet18 steps at batch {of['batch']}: {words}; busy {of['busy']:.1%} of the time with data")
