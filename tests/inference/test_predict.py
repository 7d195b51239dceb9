"""Classes of image files: the same whatever the batches, and broken files do not stop the rest."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from sagan_attn.__main__ import main
from sagan_attn.commands.image_files import short_names
from sagan_attn.commands.predict import _sheet
from sagan_attn.errors import ConfigError
from sagan_attn.inference import Prediction, predict_images
from sagan_attn.training import Run, load_run
from sagan_attn.training.data import LookupData


@pytest.fixture(scope="module")
def run(small_run: Path) -> Run:
    return load_run(small_run)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """Ten images, of which the fifth is cut off and the last is none at all."""
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(LookupData(**run.config["data"]["init_args"]).test_slots().images[:10]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    (folder / "9.png").write_text("no image")
    return folder


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.mark.parametrize("batch_size", [1, 3, 10, None])
def test_predictions_are_the_models(run: Run, images: Path, batch_size: int | None):
    found = list(predict_images(run, files_in(images), top_k=3, batch_size=batch_size))
    assert [one.file for one in found] == files_in(images)
    for one in found:
        if one.file.name in ("4.png", "9.png"):
            assert one.top == ()
            assert one.image is None
            assert "cannot read the image" in str(one.error)
            assert one.file.name in str(one.error)
            continue
        with torch.no_grad():
            probabilities = run.model(run.transform(one.file)[None])[0].softmax(dim=0)
        values, classes = probabilities.topk(3)
        assert [name for name, _ in one.top] == [run.classes[int(index)] for index in classes]
        torch.testing.assert_close(torch.tensor([value for _, value in one.top]), values, rtol=1e-4, atol=1e-6)
        assert one.image is not None
        assert torch.equal(run.transform.normalize(one.image), run.transform(one.file))


class Small(nn.Module):
    """A model that has memory for two images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        if len(images) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes.")
        return self.model(images)


def test_batches_shrink_to_the_memory_there_is(run: Run, images: Path):
    small = Small(run.model)
    found = list(predict_images(replace(run, model=small), files_in(images)))
    expected = list(predict_images(run, files_in(images), batch_size=1))
    assert [[name for name, _ in one.top] for one in found] == [[name for name, _ in one.top] for one in expected]
    assert small.batches == [1, 8, 4, 2, 2, 4, 2, 2]  # the first is to see what an image takes
    with pytest.raises(ConfigError, match="not enough memory for 4 images at once: take a smaller batch_size"):
        list(predict_images(replace(run, model=small), files_in(images)[:4], batch_size=4))


class Broken(nn.Module):
    """Gives no numbers for dark images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 10)
        logits[images.mean(dim=(1, 2, 3)) < 0] = torch.nan
        return logits


def test_an_image_without_finite_numbers_is_named(run: Run, tmp_path: Path):
    for name, grey in (("dark", 0), ("light", 255)):
        Image.new("RGB", (48, 48), (grey, grey, grey)).save(tmp_path / f"{name}.png")
    dark, light = predict_images(replace(run, model=Broken()), files_in(tmp_path))
    assert "no finite numbers for" in str(dark.error)
    assert "dark.png" in str(dark.error)
    assert light.error is None
    assert len(light.top) == 5


@pytest.mark.parametrize(("option", "value"), [("top_k", 0), ("batch_size", 0), ("batch_size", -1)])
def test_numbers_below_one_are_refused(run: Run, images: Path, option: str, value: int):
    with pytest.raises(ConfigError, match=rf"{option} \({value}\) must be at least 1"):
        predict_images(run, files_in(images), **{option: value})  # type: ignore[arg-type]


def test_the_command(small_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    call = ["predict", str(small_run), "--top-k", "2", "--out", str(tmp_path / "out.csv"), "--images"]
    assert main([*call, str(images), str(images / "1.png"), str(images / "[0-3].png")]) == 1
    said = capsys.readouterr()
    assert said.err.count("error: cannot read the image") == 2
    assert "8 of 10 images; 2 could not be done" in said.out
    table = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    assert list(table) == ["image", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert table["image"].tolist() == [str(file) for file in files_in(images)]
    assert [bool(error) for error in table["error"]] == [i in (4, 9) for i in range(10)]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.get("error", "")[:6] for line in lines] == [error[:6] for error in table["error"]]
    assert lines[0]["top"][0]["class"] == str(table["class_1"][0])
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.width > 500
    assert main([*call, str(images / "1.png")]) == 0


def test_nothing_is_written_where_no_image_can_be_read(
    small_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    call = ["predict", str(small_run), "--out", str(tmp_path / "out.csv"), "--images"]
    assert main([*call, str(images / "1.png")]) == 0
    before = {file: file.read_bytes() for file in files_in(tmp_path)}
    assert len(before) == 3
    capsys.readouterr()
    assert main([*call, str(images / "4.png"), str(images / "9.png")]) == 1
    first, second, last = capsys.readouterr().err.splitlines()
    assert "4.png" in first
    assert "9.png" in second
    assert last == "error: none of the 2 images could be done: nothing was written"
    assert {file: file.read_bytes() for file in files_in(tmp_path)} == before
    assert main([*call, str(images / "9.png")]) == 1
    assert capsys.readouterr().err.endswith("error: the image could not be done: nothing was written\n")


def answers(*names: str, error: str | None = None, image: bool = True) -> list[Prediction]:
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8) if image else None
    return [Prediction(Path(name), () if error else (("cat", 1.0),), pixels, error) for name in names]


def words_of(sheet: Figure) -> tuple[str, list[str]]:
    return sheet.get_suptitle(), [label.partition("\n")[0] for axes in sheet.axes if (label := axes.get_xlabel())]


def test_the_sheet_says_what_it_shows():
    broken = answers("x.png", error="cannot be read", image=False)
    title, names = words_of(_sheet([*answers("a/1.png", "b/1.png"), *broken, *answers("b/2.png")]))
    assert title == "Predictions for 3 images"
    assert names == ["a/1.png", "b/1.png", "2.png"]
    assert words_of(_sheet(answers("1.png")))[0] == "Predictions for 1 image"
    title, _ = words_of(_sheet([*answers("a/1.png"), *broken, *answers("2.png", "3.png", image=False)]))
    assert title == "Predictions for 3 images, the first 1 of them"


def test_short_names_tell_files_apart():
    files = [Path(name) for name in ("1.png", "a/1.png", "x/a/2.png", "y/a/2.png", "y/3.png")]
    assert short_names(files) == ["1.png", "a/1.png", "x/a/2.png", "y/a/2.png", "3.png"]
    assert short_names([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--images", "."], "there is no run folder nowhere"),
        (["RUN", "--images", "nowhere/*.png"], "there is no image, folder or pattern's match 'nowhere/*.png'"),
        (["RUN", "--images", "."], "there are no images in ."),
        (["RUN", "--images", ".", "--out", "table.txt"], "'table.txt' must end in .csv"),
        (["RUN", "--images", ".", "--out", "no/table.csv"], "there is no folder 'no'"),
        (["RUN", "--images", ".", "--top-k", "0"], "'0' must be a whole number of at least 1"),
        (["RUN", "--images", ".", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    message: str,
    small_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", *(str(small_run) if one == "RUN" else one for one in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
