"""Every kind of file that the library writes: how it is written, through the function that does so in use."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import fake_results
import numpy as np
import pandas as pd
import safetensors
import torch
import yaml
from hosts import Tiny
from matplotlib.figure import Figure
from PIL import Image

from sagan_attn import graft, load_grafts, save_grafts
from sagan_attn.ablation import cell
from sagan_attn.ablation.analysis import Analysis, analyse
from sagan_attn.ablation.report import figures, write_report
from sagan_attn.ablation.store import Store, read_logits
from sagan_attn.bench import machine
from sagan_attn.surgery.hub import FILE, HubGrafts
from sagan_attn.training.callbacks import RunFolder
from sagan_attn.training.checkpoints import WholeFileIO
from sagan_attn.training.logger import EpochCSV
from sagan_attn.training.run import RunPaths, read_checkpoint, write_json, write_text
from sagan_attn.training.test_results import StoredLogits, write_test_results
from sagan_attn.viz.draw import save_figure, write_file

KEY = "0123456789abcdef"
WORDS = "word " * 2000


@dataclass(frozen=True)
class Product:
    """What is written.

    Args:
        file: its name in the folder, or that of one of several.
        write: into a folder, with content that depends on a number.
        load: read the file back; an error for what is not whole.
    """

    file: str
    write: Callable[[Path, int], Any]
    load: Callable[[Path], Any]


def grafted(number: int) -> Any:
    model = Tiny().eval()
    (only,) = graft(model, "top", example_input=torch.zeros(1, 3, 32, 32), seed=number)
    with torch.no_grad():
        torch.nn.init.constant_(only.block.gamma, number)
    return model


def figure(number: int) -> Figure:
    made = Figure(figsize=(1, 1))
    made.subplots().plot(np.sin(np.arange(100 * number)))
    return made


def _checkpoint(folder: Path, number: int) -> None:
    content = {"state_dict": {"network.weight": torch.full((20_000 * number,), float(number))}, "epoch": number}
    WholeFileIO().save_checkpoint(content, folder / "last.ckpt")


def _metrics(folder: Path, number: int) -> None:
    log = EpochCSV(folder / "metrics.csv")
    for epoch in range(300):  # all of them, as those of the file that is there are kept
        log.log_metrics({"epoch": epoch, "train/loss": 1 / (number + epoch)}, epoch)
    log.save()


def _test(folder: Path, number: int) -> None:
    images = 1000 * number
    results = StoredLogits(torch.full((images, 10), float(number)), torch.zeros(images, dtype=torch.long), None)
    write_test_results(RunPaths(folder), results, {"test/loss": float(number)})


def _predictions(folder: Path, number: int) -> None:
    probabilities = torch.rand(500 * number, 3, generator=torch.Generator().manual_seed(number))
    RunFolder(RunPaths(folder), "", False).write_predictions(
        [probabilities], ["a", "b", "c"], ["photo.jpg"] * len(probabilities)
    )


def _logits(folder: Path, number: int) -> None:
    parts = {"val": (torch.full((1000 * number, 10), float(number)), torch.zeros(1000 * number, dtype=torch.long))}
    path = Store(folder).file(KEY, "logits.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    cell._write_logits(path, parts)


@cache
def _analysed(number: int) -> tuple[Analysis, dict[str, dict[str, bytes]]]:
    """Of an ablation, with its figures: drawing takes seconds."""
    fake = fake_results.make({"none": 0.0, "conv": 0.004, "sagan at layer3": 0.03}, seeds=6 + number)
    analysis = analyse(fake.plan, fake.results, fake.failures, fake.logits)
    return analysis, {name: figures.image_files(drawn) for name, drawn in figures.draw(analysis).items()}


def _report(folder: Path, number: int) -> None:
    analysis, images = _analysed(number)
    with patch.object(figures, "draw", lambda _: images), patch.object(figures, "image_files", lambda drawn: drawn):
        write_report(folder, analysis, paper=True)


def _read_page(path: Path) -> None:
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


def _read_pdf(path: Path) -> None:
    assert path.read_bytes().rstrip().endswith(b"%%EOF")


def _read_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def _read_tensors(path: Path) -> None:
    with safetensors.safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (no dict)
            file.get_tensor(name)


def _read_json(path: Path) -> None:
    yaml.safe_load(path.read_text(encoding="utf-8"))


PRODUCTS = {
    "checkpoint": Product("last.ckpt", _checkpoint, read_checkpoint),
    "grafts": Product(
        "attn.safetensors",
        lambda folder, number: save_grafts(grafted(number), folder / "attn.safetensors"),
        lambda path: load_grafts(Tiny().eval(), path, example_input=torch.zeros(1, 3, 32, 32)),
    ),
    "hub": Product(
        FILE,
        lambda folder, number: HubGrafts(grafted(number)).save_pretrained(folder),
        lambda path: HubGrafts.from_pretrained(
            path.parent, model=Tiny().eval(), example_input=torch.zeros(1, 3, 32, 32)
        ),
    ),
    "run config": Product(
        "config.yaml",
        lambda folder, number: write_text(folder / "config.yaml", f"a: {number} {WORDS * number}"),
        _read_json,
    ),
    "run json": Product(
        "environment.json",
        lambda folder, number: write_json(folder / "environment.json", {"a": number, "b": WORDS * number}),
        _read_json,
    ),
    "metrics": Product("metrics.csv", _metrics, pd.read_csv),
    "test": Product("test_logits.safetensors", _test, _read_tensors),
    "predictions": Product("predictions.csv", _predictions, pd.read_csv),
    "plan": Product(
        "plan.json",
        lambda folder, number: Store(folder).write(
            Store(folder).plan, {"format": 1, "n": number, "words": WORDS * number}
        ),
        _read_json,
    ),
    "result": Product(
        f"cells/{KEY}/result.json",
        lambda folder, number: Store(folder).write(
            Store(folder).file(KEY, "result.json"), {"n": number, "words": WORDS * number}
        ),
        _read_json,
    ),
    "cell config": Product(
        f"cells/{KEY}/config.yaml",
        lambda folder, number: Store(folder).write_config(KEY, {"n": number, "words": WORDS * number}),
        _read_json,
    ),
    "cell logits": Product(
        f"cells/{KEY}/logits.safetensors", _logits, lambda path: read_logits(path.parents[2], KEY, "val")
    ),
    "page": Product(
        "page.html",
        lambda folder, number: write_file(folder / "page.html", f"<html>{number}{WORDS * number}</html>".encode()),
        _read_page,
    ),
    "png": Product(
        "sheet.png", lambda folder, number: save_figure(figure(number), folder / "sheet.png"), _read_picture
    ),
    "svg": Product(
        "sheet.svg", lambda folder, number: save_figure(figure(number), folder / "sheet.svg"), ElementTree.parse
    ),
    "pdf": Product("sheet.pdf", lambda folder, number: save_figure(figure(number), folder / "sheet.pdf"), _read_pdf),
    "bench": Product(
        "bench.json",
        lambda folder, number: machine.save(
            folder / "bench.json", {"n": number, "values": np.arange(500 * number).tolist()}
        ),
        _read_json,
    ),
}
REPORT = Product(
    "report/report.html",
    _report,
    _read_page,
)
