"""The JSON files of this folder."""

import json
from pathlib import Path
from typing import Any

from sagan_attn.bench.machine import machine, summary

__all__ = ["machine", "save", "summary"]


def save(name: str, content: dict[str, Any]) -> None:
    """Print the result and write benchmarks/<name>.json."""
    text = json.dumps({"machine": machine(), **content}, indent=2)
    print(text)
    (Path(__file__).parent / f"{name}.json").write_text(text + "\n", encoding="utf-8")
