"""The ONNX file of a run, and the example of the README that needs nothing of torch."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sagan_attn.__main__ import main
from sagan_attn.export import programs
from sagan_attn.training.data import Preprocess
from sagan_attn.training.run import load_run

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "onnxruntime" in code]


@pytest.fixture(scope="module")
def exported(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of model.onnx and model.onnx.json."""
    folder = tmp_path_factory.mktemp("onnx")
    assert main(["export", str(small_run), "--to", "onnx", "--out", str(folder / "model.onnx")]) == 0
    return folder


def test_the_file_of_a_run(small_run: Path, exported: Path):
    assert sorted(path.name for path in exported.iterdir()) == ["model.onnx", "model.onnx.json"]
    data = (exported / "model.onnx").read_bytes()
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", programs.OPSET)]
    assert not any(tensor.data_location for tensor in model.graph.initializer)
    assert str(Path(__file__).parents[2]).encode() not in data
    about = json.loads((exported / "model.onnx.json").read_text())
    for value, said in ((model.graph.input, about["input"]), (model.graph.output, about["output"])):
        assert [each.name for each in value] == [said["name"]]
        assert [dim.dim_param or dim.dim_value for dim in value[0].type.tensor_type.shape.dim] == said["shape"]
    session, run = ort.InferenceSession(data), load_run(small_run)
    for shape in ((1, 3, 48, 48), (5, 3, 61, 35)):
        images = torch.randn(shape)
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), run.model(images), rtol=0, atol=1e-5)
    real = about["checks"]["real_images"]
    assert (real["from"], real["images"]) == ("the test split, 64 of 64", 64)
    assert 0 < real["logits"] < 1e-5


def photo(path: Path, width: int, height: int, orientation: int = 1, mode: str = "RGB") -> None:
    """A picture whose corners and middle differ, so that turns and crops show."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, 255 * ((x // 5 + y // 7) % 2)], 2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).convert(mode).save(path, exif=exif, quality=95)


PHOTOS: list[dict[str, Any]] = [
    {"width": 101, "height": 60},
    {"width": 64, "height": 149, "orientation": 6},
    {"width": 48, "height": 48},
    {"width": 97, "height": 50, "mode": "L", "orientation": 3},
]
HOW = [{}, {"image_size": 41, "crop_pct": 0.875, "interpolation": "bicubic", "std": [0.2, 0.3, 0.4]}]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("picture", PHOTOS)
def test_the_example(how: dict, picture: dict, small_run: Path, exported: Path, tmp_path: Path, monkeypatch, capsys):
    """As the run itself, and as one with another preprocessing would."""
    run = load_run(small_run)
    about = json.loads((exported / "model.onnx.json").read_text())
    about["preprocess"] |= how
    (tmp_path / "model.onnx").symlink_to(exported / "model.onnx")
    (tmp_path / "model.onnx.json").write_text(json.dumps(about))
    photo(tmp_path / "photo.jpg", **picture)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(EXAMPLE, names)
    transform = Preprocess.from_dict(run.transform.to_dict() | how)
    image = transform(tmp_path / "photo.jpg")
    torch.testing.assert_close(torch.from_numpy(names["pixels"]), image, rtol=0, atol=1e-5)
    expected = run.model(image[None]).softmax(1)[0]
    torch.testing.assert_close(torch.from_numpy(names["probabilities"]), expected, rtol=0, atol=1e-6)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[0][0] == run.classes[int(expected.argmax())]
    assert [float(words[1]) for words in printed] == pytest.approx(expected.sort(descending=True)[0][:3].tolist())


def test_the_example_is_short_and_needs_no_torch(exported: Path, tmp_path: Path):
    assert len(EXAMPLE.splitlines()) <= 20
    for name in ("model.onnx", "model.onnx.json"):
        (tmp_path / name).symlink_to(exported / name)
    photo(tmp_path / "photo.jpg", 101, 60)
    code = EXAMPLE + "import sys\nprint({'torch', 'torchvision', 'sagan_attn'} & {*sys.modules})\n"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert len(answer.stdout.splitlines()) == 4
    assert answer.stdout.splitlines()[-1] == "set()"
