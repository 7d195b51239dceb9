"""What a benchmark's JSON says about where it was measured, and how its figures are summed up."""

import json
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """CPU, GPU, threads, versions and the time."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
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


def save(name: str, content: dict[str, Any]) -> None:
    """Print the result and write benchmarks/<name>.json."""
    text = json.dumps({"machine": machine(), **content}, indent=2)
    print(text)
    (Path(__file__).parent / f"{name}.json").write_text(text + "\n", encoding="utf-8")
