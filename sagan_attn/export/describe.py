"""What the JSON beside an exported file says, for those who use the file without this library."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sagan_attn.export import programs
from sagan_attn.training.data import Preprocess
from sagan_attn.training.run import Run

__all__ = ["description_of", "recipe"]

PACKAGES = ("torch", "torchvision", "timm")


def description_of(run: Run, to: str, checkpoint: str | None, sizes: dict[str, str]) -> dict[str, Any]:
    """Classes, preprocessing, input and output, source and versions. sizes: words for each dimension that is free."""
    from sagan_attn import __version__

    side, model = run.transform.image_size, run.config["model"]
    shape = ["batch", 3, *(("height", "width") if "height" in sizes else (side, side))]
    taken: dict[str, Any] = {"dtype": "float32", "shape": shape, "sizes": sizes}
    given: dict[str, Any] = {"dtype": "float32", "shape": ["batch", len(run.classes)]}
    if to == "onnx":  # torch's programs are called by position
        taken, given = {"name": programs.INPUT} | taken, {"name": programs.OUTPUT} | given
    return {
        "opset": programs.OPSET if to == "onnx" else None,
        "input": taken,
        "output": given,
        "classes": run.classes,
        "preprocess": run.transform.to_dict() | {"recipe": recipe(run.transform)},
        "source": {
            "run": run.folder.resolve().name,
            "checkpoint": checkpoint,
            "host": model["host"]["name"],
            "grafts": [{"at": graft["at"], "block": graft.get("block", "sagan")} for graft in model["grafts"] or []],
        },
        "versions": {"sagan_attn": __version__} | _versions(to),
    }


def recipe(how: Preprocess) -> list[str]:
    """What `Preprocess` does, in words."""
    size, short = how.image_size, round(how.image_size / how.crop_pct)
    return [
        "turn the picture as its EXIF orientation says, and convert it to RGB; transparency is dropped",
        f"if it is not {size} x {size} already: resize it ({how.interpolation}, as PIL does) so that its shorter side "
        f"is round({size} / {how.crop_pct:g}) = {short} and the longer one int({short} * longer / shorter), then crop "
        f"{size} x {size} from its centre, from pixel round((side - {size}) / 2) on",
        "divide by 255; then, for each channel, subtract the mean and divide by the standard deviation (std)",
        "order the numbers as channels, rows, columns (float32), with a dimension for the batch in front",
        "a softmax over the logits gives the probabilities of the classes, in their order",
    ]


def _versions(to: str) -> dict[str, str]:
    names = (*PACKAGES, *(programs.ONNX_PACKAGES if to == "onnx" else ("safetensors",) if to == "safetensors" else ()))
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # built from source, without metadata
            found[name] = "unknown"
    return found
