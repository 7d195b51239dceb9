"""Export of a run: made, checked on the bytes that will be the file, described, and only then written."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sagan_attn.errors import ConfigError
from sagan_attn.export import programs
from sagan_attn.export.check import TOLERANCE, check_random, check_real, check_weights, sizes_to_try
from sagan_attn.export.describe import description_of
from sagan_attn.export.weights import pack, unpack
from sagan_attn.files import whole_file
from sagan_attn.surgery import fuse, grafts_of
from sagan_attn.training.run import Run, RunPaths

__all__ = ["FORMATS", "export_run", "output_file"]

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}  # and the ends of their files' names


class Made(NamedTuple):
    """The bytes of a file, what runs them, and what there is to say of them."""

    data: bytes
    runner: Callable[[Tensor], Tensor]
    sizes: dict[str, str]
    fused: bool


def export_run(
    run: Run,
    to: str,
    out: str | Path = ".",
    *,
    fused: bool = True,
    fixed_size: bool = False,
    tolerance: float = TOLERANCE,
    images: Tensor | None = None,
    images_from: str = "none were given",
    checkpoint: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Write a run's model as a file, and beside it `<file>.json`, which says what a user of the file needs to know.

    A file that is there is replaced. Whatever fails, both are as they were, and nothing stays beside them.

    Args:
        to: one of `FORMATS`. "onnx": one file, weights inside, opset 18. "torch-export": for `torch.export.load`.
            "safetensors": the weights as they were trained, for `load_exported`: a fused model's have other names,
            which no host has, so these are never fused.
        out: the file, or a folder, in which it gets the name of the run.
        fused: export `fuse(model)`, where the model has grafts.
        fixed_size: of the images: that of the run alone. Their number is free in any case.
        tolerance: largest difference of a probability, and of a logit as a part of the largest one. The weights in a
            safetensors file are the same bit for bit in any case.
        images: [N, 3, S, S] as the model takes them, to compare on besides random ones.
        images_from: where they are from, in words, or why there are none.
        checkpoint: which one the run was read from, for the description.

    Returns the file's path and the description.

    Raises:
        ConfigError: an unknown format, options that do not go with it, a path that is no place for the file, missing
            packages, a model that takes one size alone, or one that differs at other sizes.
        SaganAttnError: the model cannot be exported, or what was exported differs from it.
        OSError: the file cannot be written.
    """
    if to not in FORMATS:
        raise ConfigError(f"format {to!r} must be one of {', '.join(FORMATS)}")
    if to == "onnx":
        programs.require_onnx()
    if to == "safetensors" and (fixed_size or not fused):
        raise ConfigError("safetensors holds the weights as trained, for any size: it has no other sizes or forms")
    path = output_file(out, to, run)
    with whole_file(path) as file, whole_file(path.with_name(f"{path.name}.json")) as beside:
        sizes, refused = [], []
        if to != "safetensors" and not fixed_size:
            sizes, refused = sizes_to_try(run.model, run.transform.image_size)
        made = _made(run, to, fused, sizes)
        random = asdict(check_random(run.model, made.runner, run.transform.image_size, sizes, tolerance))
        real = {} if images is None else asdict(check_real(run.model, made.runner, images, tolerance))
        content = {
            "file": path.name,
            "format": to,
            "bytes": len(made.data),
            "sha256": hashlib.sha256(made.data).hexdigest(),
            "fused": made.fused,
            **description_of(run, to, checkpoint, made.sizes),
            "checks": {
                "tolerance": tolerance,
                "random_images": {**random, "sizes_the_model_refuses": [f"{h}x{w}" for h, w in refused]},
                "real_images": {"from": images_from, **real},
            },
        }
        file.write(made.data)
        beside.write((json.dumps(content, indent=2) + "\n").encode())
    return path, content


def output_file(out: str | Path, to: str, run: Run) -> Path:
    """Where the file goes. Raises `ConfigError` for a path that is no place for it."""
    path, suffix = Path(out), FORMATS[to]
    if path.is_dir():
        path = path / f"{run.folder.resolve().name}{suffix}"
    if path.suffix != suffix:
        raise ConfigError(f"{out} must end in {suffix}, as {to} files do, or name a folder that is there")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} to write {path.name} into: make it first")
    paths = RunPaths(path.parent)
    if paths.config.is_file() and path in vars(paths).values():
        raise ConfigError(f"{path} is a file of the run itself: choose another name")
    return path


def _made(run: Run, to: str, fused: bool, sizes: Sequence[tuple[int, int]]) -> Made:
    """sizes: of images besides its own that the model takes; none for an export of a fixed size."""
    if to == "safetensors":
        data = pack(run)
        model = unpack(data, "the export").model
        check_weights(run.model, model)
        return Made(data, model, {"batch": "1 and more"}, False)
    fused = fused and bool(grafts_of(run.model))
    model = fuse(run.model) if fused else run.model
    side = run.transform.image_size
    program = programs.to_program(model, max(sizes, default=(side, side), key=math.prod), not sizes)
    if to == "onnx":
        data = programs.to_onnx(program)
        runner = programs.load_onnx(data)
    else:
        data = programs.to_pt2(program)
        runner = programs.load_program(data)
    return Made(data, runner, programs.allowed_sizes(program), fused)
