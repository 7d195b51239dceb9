"""From 37 classes of photographs to predictions: mixed sizes, turned, grey, transparent and broken files."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from small_runs import CONFIGS

from sagan_attn.__main__ import main
from sagan_attn.training import load_run
from sagan_attn.training.cli import main as train

CLASSES = [f"breed {number:02d}" for number in range(37)]
EACH = 6  # of a class


def photograph(label: int, random: np.random.Generator) -> Image.Image:
    """A polygon in a class's colour, with as many corners as its number says, on noise."""
    width, height = (int(side) for side in random.integers(40, 90, 2))
    image = Image.fromarray(random.integers(90, 130, (height, width, 3), dtype=np.uint8))
    angle, corners, radius = random.uniform(0, 6.28), 3 + label % 3, 0.42 * min(width, height)
    colour = tuple(int(127 + 127 * math.sin(label * 0.9 + shift)) for shift in (0, 2.1, 4.2))
    turns = [angle + 2 * math.pi * corner / corners for corner in range(corners)]
    points = [(width / 2 + radius * math.cos(turn), height / 2 + radius * math.sin(turn)) for turn in turns]
    ImageDraw.Draw(image).polygon(points, fill=colour)
    return image


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("photographs")
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for number in range(EACH):
            image, path = photograph(label, random), root / name / f"{number}.jpg"
            exif = Image.Exif()
            if number == 1:  # lies on its side, as cameras write it
                exif[0x0112] = 6
                image = image.transpose(Image.Transpose.ROTATE_90)
            if number == 2:
                image, path = image.convert("RGBA"), path.with_suffix(".png")
            if number == 3 and label == 5:
                image = image.convert("L")
            image.save(path, exif=exif)
    (root / CLASSES[3] / "4.jpg").write_bytes(b"\xff\xd8 no photograph")
    whole = (root / CLASSES[7] / "5.jpg").read_bytes()
    (root / CLASSES[7] / "5.jpg").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a download would bring: weights with a head for 1,000 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.mark.filterwarnings("ignore:left out 2 files that cannot be read")
def test_a_folder_of_photographs(photographs: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    options = ["--config", str(CONFIGS / "finetune_folder.yaml"), f"--data.root={photographs}", "--data.num_workers=0"]
    host = ["--model.host.name=timm/test_resnet", "--model.host.pretrained=false", f"--model.host.weights={weights}"]
    short = ["--data.image_size=64", "--data.batch_size=16", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    quiet = [
        "--model.unfreeze_epoch=1",
        "--model.optimizer.lr=0.01",
        "--trainer.enable_progress_bar=false",
        f"--run_dir={run}",
    ]
    assert train(["fit", *options, *host, *short, *quiet]) == 0
    assert re.search(r"; training [\d,]+ until epoch 1, [\d,]+ from then on", capsys.readouterr().out)
    described = json.loads((run / "environment.json").read_text())["data"]
    assert described["classes"] == CLASSES
    assert sorted(Path(file).relative_to(photographs).as_posix() for file in described["left_out"]) == [
        "breed 03/4.jpg",
        "breed 07/5.jpg",
    ]
    assert described["sizes"] == {"train": 146, "val": 37}  # of 222, two are broken; one of each class for the test
    model = timm.create_model("test_resnet")
    expected = model.pretrained_cfg
    transform = json.loads((run / "transform.json").read_text())
    assert tuple(transform["mean"]) == expected["mean"]
    assert transform["interpolation"] == expected["interpolation"]
    assert transform["crop_pct"] == expected["crop_pct"]
    assert train(["test", "--config", str(run / "config.yaml"), "--trainer.enable_progress_bar=false"]) == 0
    assert json.loads((run / "test_metrics.json").read_text())["images"] == 37
    losses = pd.read_csv(run / "metrics.csv")["train/loss"]
    assert losses.iloc[-1] < losses.iloc[0] - 0.1
    capsys.readouterr()
    assert main(["predict", str(run), "--images", str(photographs / CLASSES[7]), "--out", str(tmp_path / "p.csv")]) == 1
    assert "5 of 6 images" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    assert [Path(file).name for file, error in zip(table["image"], table["error"], strict=True) if error] == ["5.jpg"]
    loaded = load_run(run)
    turned = Image.open(photographs / CLASSES[0] / "1.jpg")
    upright = Image.fromarray(np.rot90(np.asarray(turned), -1))
    assert torch.equal(loaded.transform.to_uint8(turned), loaded.transform.to_uint8(upright))
