"""`python -m sagan_attn maps` and `explore` on a trained run."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from looks import seen
from PIL import Image
from torch import nn

from sagan_attn.__main__ import main
from sagan_attn.commands.maps import _positions
from sagan_attn.training import load_run

PATH = "local.act.grafts.sagan"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two sizes, one deeper, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deeper").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (60, 90)), ("deeper/b.jpg", (48, 48))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_maps(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "sheet.png"
    run = ["maps", "--checkpoint", str(small_run), "--at", "local", "--out", str(out)]
    assert main([*run, "--images", "dataset:2", "--queries", "0,0", "47,47", "24.5,3"]) == 0
    printed = capsys.readouterr().out
    names = ["sheet.png", "sheet-heads.png", "sheet-summary.png", "sheet.html", "sheet-training.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*names, "sheet.csv", "sheet.json"])
    assert all(str(tmp_path / name) in printed for name in names)
    for name in names:
        if name.endswith(".png"):
            with Image.open(tmp_path / name) as image:
                assert min(image.size) > 300
    (numbers,) = json.loads((tmp_path / "sheet.json").read_text())
    assert numbers["queries"] == [0, 143, 6]  # of 12 x 12 cells of 4 pixels
    assert numbers["key_cells"]["rows"] == list(range(0, 49, 4))
    weights = np.array(numbers["weights"])
    assert weights.shape == (2, 1, 3, 144)
    assert weights.sum(-1) == pytest.approx(1, abs=1e-4)
    (row,) = csv.DictReader(io.StringIO((tmp_path / "sheet.csv").read_text()))
    assert row["path"] == PATH
    assert float(row["entropy"]) == pytest.approx(numbers["heads"][0]["entropy"], rel=1e-4)
    assert row["importance"] == "1"
    assert re.search(r"^local +0 ", printed, re.M)


def test_queries_by_default():
    view = seen()
    (path,) = view.records
    assert _positions(view, path, None) == [28, 10, 38]  # of 6 x 8 cells: the middle, and two of the middle half


def test_explore(small_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "page.html"
    run = ["explore", "--checkpoint", str(small_run / "checkpoints" / "last.ckpt"), "--out", str(out)]
    assert main([*run, "--images", str(photos / "a.png"), str(photos / "deeper"), "--title", "<mine>"]) == 0
    assert f"{out}: 2 images, {PATH}; {out.stat().st_size:,} bytes" in capsys.readouterr().out
    page = out.read_text()
    assert "<h1>&lt;mine&gt;</h1>" in page
    (words,) = re.findall(r'id="data">(.*?)</script>', page, re.S)
    captions = [image["caption"] for image in json.loads(words)["images"]]
    last = load_run(small_run, "last")
    for caption, file in zip(captions, ("a.png", "deeper/b.jpg"), strict=True):
        index = int(last.model(last.transform(photos / file)[None]).argmax())
        assert caption == f"{Path(file).name}: seen as {last.classes[index]}"
    assert json.loads(words)["sites"][0]["figures"][0][-1] == "-"  # no importance without labels
    assert main([*run, "--images", "dataset:2", "--max-page-bytes", "1000"]) == 2
    assert "would make a page of 55,296 bytes, and 1,000 are allowed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["maps", "explore"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"--at": "lokal"}, "no attention is called 'lokal'; near names: local"),
        ({"--at": "head"}, "no attention weights; there are some at local"),
        ({"--checkpoint": "nowhere"}, "there is no run folder nowhere"),
        ({"--checkpoint": "pyproject.toml"}, "pyproject.toml lies in no run folder"),
        ({"--images": "no.png"}, "there is no image, folder or pattern's match 'no.png'"),
        ({"--images": "pyproject.toml"}, "cannot read the image pyproject.toml"),
        ({"--images": "dataset:many"}, "'dataset:many' must say how many images: dataset:8"),
        ({"--images": "configs"}, "there are no images in configs"),
        ({"--max-bytes": "1000"}, "take 165,888 bytes, and max_bytes allows 1,000: name fewer queries"),
        ({"--out": "nowhere/out"}, "there is no folder 'nowhere'"),
        ({"--out": "out.txt"}, "'out.txt' must end in ."),
    ],
)
def test_bad_input_is_one_line(
    command: str,
    more: dict[str, str],
    message: str,
    small_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(Path(__file__).parents[2])
    suffix = ".png" if command == "maps" else ".html"
    given = {"--checkpoint": str(small_run), "--images": "dataset:2", "--out": str(tmp_path / f"out{suffix}")}
    given |= more
    if given["--out"] == "nowhere/out":
        given["--out"] += suffix
    assert main([command, *(part for pair in given.items() for part in pair)]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "suffix"), [("maps", ".png"), ("explore", ".html")])
def test_broken_images_of_a_folder_are_named_and_passed_over(
    command: str, suffix: str, small_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "mixed"
    shutil.copytree(photos, folder)
    shutil.copy(photos / "a.png", folder / "deeper" / "a.png")
    (folder / "0.png").write_text("no image")
    out = tmp_path / f"out{suffix}"
    run = [command, "--checkpoint", str(small_run), "--out", str(out), "--limit", "3", "--images"]
    assert main([*run, str(folder / "0.png"), str(folder)]) == 2  # named by itself
    assert main([*run, str(folder / "*.txt"), str(folder / "0*")]) == 2  # none left
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[2][:22] for line in said[:3]] == [" cannot read the image"] * 3
    assert said[3].startswith("error: no image in ")
    assert len(said) == 4
    assert not out.exists()
    assert main([*run, str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot read the image")
    assert "0.png" in line
    if command == "maps":
        (numbers,) = json.loads(out.with_suffix(".json").read_text())
        names = numbers["images"]
    else:
        (words,) = re.findall(r'id="data">(.*?)</script>', out.read_text(), re.S)
        names = [image["caption"] for image in json.loads(words)["images"]]
    assert [name.partition(":")[0] for name in names] == ["mixed/a.png", "deeper/a.png", "b.jpg"]


def test_a_run_without_grafts_is_named(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    bare = replace(load_run(small_run), model=nn.Sequential(nn.Flatten()))
    monkeypatch.setattr("sagan_attn.commands.attention_images.open_run", lambda _: bare)
    run = ["maps", "--checkpoint", str(small_run), "--out", str(tmp_path / "out.png"), "--images", "dataset:1"]
    assert main(run) == 2
    assert f"error: {small_run}: Sequential has no attention weights to record" in capsys.readouterr().err
    assert main([*run, "--at", "0"]) == 2
    assert "'0' is a Flatten: no attention weights; and there are none in the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("query", "message"),
    [("48.5,3", "query x = 48.5 lies outside of the image, whose x go from 0 to 48"), ("a", "'a' must be a point")],
)
def test_bad_queries(query: str, message: str, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = ["maps", "--checkpoint", str(small_run), "--images", "dataset:1", "--out", str(tmp_path / "a.png")]
    assert main([*run, "--queries", query]) == 2
    assert message in capsys.readouterr().err
