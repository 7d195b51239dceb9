"""What a benchmark's JSON says about where it was measured, and how its figures are summed up."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sagan_attn.errors import ConfigError
from sagan_attn.files import write_whole

__all__ = ["check_writable", "get_device", "machine", "save", "summary"]


def machine() -> dict[str, Any]:
    """CPU, GPU, threads, versions and the time."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "lightning")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of the repetitions."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repetitions": len(values)}


def get_device(name: str) -> torch.device:
    """The device of that name. Raises `ConfigError` for one that torch does not see."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} is missing: torch {torch.__version__} sees no CUDA GPU here; use cpu")
    return torch.device(name)


def check_writable(path: Path | None) -> None:
    """Raise `ConfigError` for a file that cannot be written, before hours are spent on what goes into it."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        problem = "is a folder" if path.is_dir() else f"is to be in {path.parent}, which is no folder"
        raise ConfigError(f"{path} {problem}: a file to be written is required")


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of the content, with the machine first."""
    text = json.dumps({"machine": machine(), **content}, indent=1)
    write_whole(path, (text + "\n").encode())
