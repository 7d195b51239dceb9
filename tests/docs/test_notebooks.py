"""The notebooks of docs/: every code cell runs, in order, and what is stored beside it is what it shows."""

import ast
import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))
WALK = DOCS / "from_pretrained_to_picture.ipynb"
SIZE = "TRAINING_IMAGES = 8_192"


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def stored_text(cell: dict[str, Any]) -> str:
    """What the cell printed, and the text of its last line."""
    parts = ("".join(out.get("text") or out["data"]["text/plain"]) for out in cell["outputs"])
    return "\n".join(part.rstrip("\n") for part in parts)


def run_cell(source: str, names: dict[str, Any]) -> tuple[str, Any]:
    """What a notebook would show of a cell: its text, and the value of its last line."""
    body = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith("%"))).body
    shown = body and isinstance(body[-1], ast.Expr) and not source.rstrip().endswith(";")
    last = ast.Expression(body.pop().value) if shown else None  # type: ignore[attr-defined]
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        value = None if last is None else eval(compile(last, "cell", "eval"), names)
    text = printed.getvalue().rstrip("\n")
    return "\n".join(part for part in (text, "" if value is None else repr(value)) if part), value


def run_all(path: Path, change: dict[str, str], names: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Each code cell with what it shows: its text, and the value of its last line. Fills the names."""
    for cell in code_cells(path):
        source = source_of(cell)
        for old, new in change.items():
            source = source.replace(old, new)
        yield cell, *run_cell(source, names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_of_this_code(path: Path):
    content = json.loads(path.read_text(encoding="utf-8"))
    cells = code_cells(path)
    code = "\n\n".join(source_of(cell) for cell in cells)
    assert content["metadata"]["executed_source"] == sha256(code.encode()).hexdigest(), "python docs/execute.py"
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell["outputs"]]
    assert {out["output_type"] for out in outputs} <= {"stream", "execute_result"}  # and no error
    assert not [out for out in outputs if out.get("name") == "stderr"]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert path.stat().st_size < 300_000


def test_every_cell_runs_and_shows_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert sum(SIZE in source_of(cell) for cell in code_cells(WALK)) == 1
    monkeypatch.chdir(tmp_path)
    compared = figures = 0
    for cell, text, value in run_all(WALK, {SIZE: "TRAINING_IMAGES = 128"}, {}):
        if "trained" not in cell["metadata"].get("tags", []):
            assert text == stored_text(cell)
            compared += bool(text)
        if isinstance(value, Figure):
            value.savefig(io.BytesIO(), format="png")
            figures += 1
    assert (compared, figures) == (4, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_it_says_of_its_numbers_holds():
    said: dict[str, float] = {}
    names: dict[str, Any] = {}
    for _, text, _ in run_all(WALK, {}, names):
        for line in text.splitlines():
            if line.startswith("test accuracy"):
                words, _, number = line.rpartition(": ")
                said[words] = float(number)
    host, grafted, disabled = said.values()
    assert 0.3 < host < 0.45  # a guess among four digits is right in 0.25 + 0.75 / 10 of all cases
    assert grafted > host + 0.2
    assert disabled == host
    on_marker, images = names["on_marker"], torch.arange(500)
    assert on_marker[images, names["meant"]].mean() > 0.5
    assert on_marker[names["others"]].mean() < 0.2
