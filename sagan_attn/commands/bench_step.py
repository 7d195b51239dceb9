"""`bench step`: a host without and with grafts: training step, latency, memory, kernels and the largest batch."""

import argparse
import copy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from sagan_attn.bench.plots import dot_figure
from sagan_attn.bench.step import Classification, Detection, How, Task, measure_step
from sagan_attn.bench.tables import print_table
from sagan_attn.commands.bench_options import Files, add_common_arguments, budget_of, device_of, names, note
from sagan_attn.commands.models import image_size, json_object
from sagan_attn.commands.sites import count
from sagan_attn.errors import ConfigError
from sagan_attn.surgery import graft
from sagan_attn.surgery.build import check_block

__all__ = ["PRESETS", "Setup", "add_arguments", "run"]

DETECTORS = ("fasterrcnn", "retinanet", "fcos", "ssd", "maskrcnn", "keypointrcnn")


@dataclass(frozen=True)
class Setup:
    """A host, its images, and where grafts go.

    Args:
        name: torchvision/<name>, timm/<name> or a small host of the library's own.
        batch_size: on a GPU; cpu_batch_size: on a CPU.
    """

    name: str
    size: tuple[int, int]
    batch_size: int
    cpu_batch_size: int
    at: tuple[str, ...]
    small_images: bool = False
    num_classes: int = 1000
    options: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    "cifar-resnet18": Setup("torchvision/resnet18", (32, 32), 128, 128, ("layer3",), True, 10),
    "resnet50": Setup("torchvision/resnet50", (224, 224), 64, 8, ("layer2", "layer3")),
    "convnext-tiny": Setup("timm/convnext_tiny", (224, 224), 64, 8, ("stages.1", "stages.2")),
    "faster-rcnn": Setup("torchvision/fasterrcnn_resnet50_fpn", (800, 800), 4, 1, ("backbone.body.layer3",), False, 91),
}
QUICK = ("cifar-resnet18",)
QUICK_BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        type=names,
        metavar="NAME,NAME",
        help=f"of {', '.join(PRESETS)} (default: all; the options below change them)",
    )
    parser.add_argument("--model", help="a host instead: resnet20, torchvision/resnet18, timm/resnet50")
    parser.add_argument("--model-options", type=json_object, metavar="JSON", help="of its constructor")
    parser.add_argument("--small-images", action="store_true", help="a first convolution of 3x3 without stride")
    parser.add_argument("--image-size", type=image_size, metavar="SIDE|HxW")
    parser.add_argument("--batch-size", type=count, metavar="B")
    parser.add_argument("--at", type=names, metavar="NAME,NAME", help="modules that grafts go behind")
    parser.add_argument("--block", default="sagan", help="registered name (default: sagan)")
    parser.add_argument("--options", type=json_object, default={}, metavar="JSON", help="of the block")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: by autocast")
    parser.add_argument("--channels-last", action="store_true", help="images and weights in that memory format")
    parser.add_argument("--no-largest-batch", action="store_true", help="do not fill the GPU's memory to find it")
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report. Raises `ConfigError`, `GraftError` or `BlockError`."""
    device, files = device_of(arguments), Files(arguments)
    check_block(arguments.block, arguments.options)
    how = How(
        device,
        budget_of(arguments),
        arguments.precision,
        arguments.channels_last,
        find_largest_batch=not (arguments.quick or arguments.no_largest_batch),
    )
    setups = setups_of(arguments)
    results: list[dict[str, Any]] = []
    for name, setup in setups.items():
        batch = setup.batch_size if device.type == "cuda" else setup.cpu_batch_size
        host, task = build(setup, arguments.channels_last)
        grafted = copy.deepcopy(host)
        example = task.images(task.batch(1, next(host.parameters()).device))
        grafts = graft(grafted, list(setup.at), arguments.block, example_input=example, options=arguments.options)
        measured = measure_step(host, grafted, task, batch, how)
        about = {"preset": name, **asdict(setup), "batch": batch, "block": arguments.block}
        results.append({**about, "grafts": [one.path for one in grafts], **measured})
        note(f"{name}: {measured['grafted_over_host']:.3f} times the host's step")
        files.write({"bench": "step", "cases": results})
    title = f"{arguments.block} on {device.type}, {arguments.precision}" + ", channels_last" * arguments.channels_last
    print_table(f"training step and batch-1 latency: {title}", HEADERS, [row for r in results for row in _rows(r)])
    if device.type != "cuda":
        print("kernels and the largest batch: not measured, which needs --device cuda")
    bars = {r["preset"]: r["readings"] for r in results}
    files.draw(lambda: dot_figure(bars, "training step (ms)", f"Host and grafted: {title}"))
    return 0


def setups_of(arguments: argparse.Namespace) -> dict[str, Setup]:
    """What is asked for, by name. Raises `ConfigError`."""
    changes: dict[str, Any] = {}
    if arguments.image_size is not None:
        changes["size"] = arguments.image_size
    if arguments.batch_size is not None or arguments.quick:
        changes["batch_size"] = changes["cpu_batch_size"] = arguments.batch_size or QUICK_BATCH
    if arguments.at is not None:
        changes["at"] = tuple(arguments.at)
    if arguments.model_options is not None:
        changes["options"] = arguments.model_options
    if arguments.small_images:
        changes |= {"small_images": True}
    if arguments.model is None:
        chosen = arguments.preset or (list(QUICK) if arguments.quick else list(PRESETS))
        for name in chosen:
            if name not in PRESETS:
                raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}, or give --model")
        if len(chosen) > 1 and (wrong := changes.keys() & {"at", "options", "small_images"}):
            raise ConfigError(
                f"{', '.join(sorted(wrong))} of {len(chosen)} hosts cannot be the same: name one --preset"
            )
        return {name: replace(PRESETS[name], **changes) for name in dict.fromkeys(chosen)}
    if arguments.preset is not None:
        raise ConfigError(f"--model {arguments.model!r} and --preset {','.join(arguments.preset)} exclude each other")
    if arguments.at is None:
        raise ConfigError(f"--model {arguments.model!r} needs --at: `sites {arguments.model}` lists its places")
    setup = Setup(arguments.model, (224, 224), 32, 8, ())
    return {arguments.model: replace(setup, **changes)}


def build(setup: Setup, channels_last: bool) -> tuple[nn.Module, Task]:
    """The host with fresh weights, and what it is trained on. Raises `ConfigError`."""
    library, _, plain = setup.name.partition("/")
    if library == "torchvision" and plain.startswith(DETECTORS):
        from torchvision import models

        own: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": setup.num_classes}
        if not plain.startswith("ssd"):  # the others scale images to a least side of 800, whatever they are given
            own["min_size"] = min(setup.size)
        try:
            model = models.get_model(plain, **{**own, **setup.options})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"host {setup.name!r} with options {setup.options} is refused: {error}") from error
        return model, Detection(setup.size, setup.num_classes)
    from sagan_attn.training.hosts import HostConfig, build_host  # Lightning with it

    config = HostConfig(setup.name, small_images=setup.small_images, options=setup.options)
    return build_host(config, setup.num_classes), Classification(setup.size, setup.num_classes, channels_last)


HEADERS = (
    "host", "", "B", "step ms", "min-max", "images/s", "over host", "peak MB", "kernels", "largest B", "latency ms",
    "min-max", "over host", "kernels",
)  # fmt: skip


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for way in ("host", "grafted", "fused"):
        step, latency = result["step_ms"].get(way), result["latency_ms"][way]
        over = result["latency_over_host"].get(way)
        trained = ["-"] * 6
        if step is not None:
            trained = [
                f"{step['median']:.4g}",
                f"{step['min']:.4g}-{step['max']:.4g}",
                f"{result['images_per_second'][way]['median']:.4g}",
                f"{result['grafted_over_host']:.3f}" if way == "grafted" else "",
                f"{result['peak_bytes'][way] / 1e6:,.0f}",
                _number(result, "kernels_of_a_step", way),
            ]
        rows.append(
            [
                f"{result['preset']} {result['size'][0]} x {result['size'][1]}" if way == "host" else "",
                way,
                str(result["batch"]) if step is not None else "",
                *trained,
                _number(result, "largest_batch", way),
                f"{latency['median']:.4g}",
                f"{latency['min']:.4g}-{latency['max']:.4g}",
                "" if over is None else f"{over:.3f}",
                _number(result, "kernels_of_a_forward", way),
            ]
        )
    return rows


def _number(result: dict[str, Any], key: str, way: str) -> str:
    return str(result.get(key, {}).get(way, "-"))
