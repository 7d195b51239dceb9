import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sagan_attn.errors import DataError
from sagan_attn.training.data import Preprocess


def pixels(height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_an_image_of_the_right_size_is_unchanged(crop_pct):
    out = Preprocess(8, crop_pct=crop_pct).to_uint8(Image.fromarray(pixels()))
    assert out.dtype == torch.uint8
    assert torch.equal(out, torch.from_numpy(pixels()).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (5, 7), (9, 9)])
def test_any_size_becomes_a_square(size):
    out = Preprocess(8, crop_pct=0.9, interpolation="bicubic").to_uint8(Image.fromarray(pixels(*size)))
    assert out.shape == (3, 8, 8)


def test_the_centre_is_kept():
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = pixels()
    assert torch.equal(Preprocess(8).to_uint8(Image.fromarray(wide)), torch.from_numpy(pixels()).permute(2, 0, 1))


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(pixels())
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter to the right
    image.save(tmp_path / "turned.png", exif=exif)
    out = Preprocess(8, mean=(0, 0, 0), std=(1, 1, 1))(tmp_path / "turned.png")
    expected = torch.from_numpy(np.rot90(pixels(), -1).copy()).permute(2, 0, 1) / 255
    assert torch.allclose(out, expected)


def test_grey_and_16_bit_grey():
    grey = pixels(channels=1)
    expected = torch.from_numpy(grey).expand(3, 8, 8)
    assert torch.equal(Preprocess(8).to_uint8(Image.fromarray(grey)), expected)
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 17)
    assert deep.mode == "I;16"
    assert torch.equal(Preprocess(8).to_uint8(deep), expected)
    assert torch.equal(Preprocess(8).to_uint8(Image.fromarray(grey.astype(np.int32) * 256)), expected)


def test_transparency_is_dropped():
    rgba = np.dstack([pixels(), pixels(channels=1)])
    expected = torch.from_numpy(pixels()).permute(2, 0, 1)
    assert torch.equal(Preprocess(8).to_uint8(Image.fromarray(rgba)), expected)


def test_palette_with_transparency_and_cmyk(tmp_path):
    palette = Image.fromarray(pixels()).quantize(16)
    expected = Preprocess(8).to_uint8(palette.convert("RGB"))
    palette.save(tmp_path / "p.png", transparency=bytes(range(16)))
    opened = Image.open(tmp_path / "p.png")
    assert opened.mode == "P"
    assert torch.equal(Preprocess(8).to_uint8(opened), expected)
    opened.close()
    cmyk = Image.fromarray(pixels()).convert("CMYK")
    assert torch.equal(Preprocess(8).to_uint8(cmyk), torch.from_numpy(pixels()).permute(2, 0, 1))


def test_floating_point_images_are_refused():
    with pytest.raises(DataError, match="mode F"):
        Preprocess(8).to_uint8(Image.fromarray(np.zeros((8, 8), dtype=np.float32)))


def test_normalize_is_the_usual_formula():
    p = Preprocess(8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x = p.to_uint8(Image.fromarray(pixels()))
    expected = (x.double() / 255 - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(p.std).view(3, 1, 1)
    assert torch.allclose(p.normalize(x).double(), expected, atol=1e-6)
    assert p.normalize(x, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(p(Image.fromarray(pixels())), p.normalize(x))
    assert torch.equal(p.normalize(x.expand(4, 3, 8, 8))[2], p.normalize(x))


def test_round_trip_through_json():
    p = Preprocess(24, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bicubic", 0.9)
    assert Preprocess.from_dict(json.loads(json.dumps(p.to_dict()))) == p


def test_from_dict_refuses_unknown_and_missing_keys():
    values = Preprocess(24).to_dict()
    with pytest.raises(DataError, match=r"unknown preprocess keys \['size'\]"):
        Preprocess.from_dict({**values, "size": 3})
    del values["std"]
    with pytest.raises(DataError, match=r"preprocess keys \['std'\] are missing"):
        Preprocess.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, r"image_size \(0\) must be a whole number"),
        ({"image_size": "8"}, r"image_size \('8'\) must be a whole number"),
        ({"mean": (0.5,)}, r"mean \(\(0.5,\)\) must be three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std .* must be positive"),
        ({"interpolation": "cubic"}, r"interpolation \('cubic'\) must be one of"),
        ({"crop_pct": 1.2}, r"crop_pct \(1.2\) must lie in \(0, 1\]"),
    ],
)
def test_bad_fields_are_named(values, message):
    with pytest.raises(DataError, match=message):
        Preprocess(**({"image_size": 8} | values))


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the image .*broken.jpg"):
        Preprocess(8)(path)
    with pytest.raises(DataError, match=r"cannot read the image .*missing.jpg"):
        Preprocess(8)(tmp_path / "missing.jpg")


def timm_like(**config) -> nn.Module:
    model = nn.Identity()
    model.pretrained_cfg = {
        "input_size": (3, 160, 160), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4),
        "interpolation": "bicubic", "crop_pct": 0.95, "crop_mode": "center",
    } | config  # fmt: skip
    return model


def test_from_timm_takes_what_the_weights_were_evaluated_with():
    expected = Preprocess(160, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.95)
    assert Preprocess.from_timm(timm_like()) == expected
    assert Preprocess.from_timm(timm_like(), image_size=32).image_size == 32
    with pytest.raises(DataError, match="takes 1 channels"):
        Preprocess.from_timm(timm_like(input_size=(1, 8, 8)))
    with pytest.raises(DataError, match="wants 8 x 10 images"):
        Preprocess.from_timm(timm_like(input_size=(3, 8, 10)))
    with pytest.raises(DataError, match="crop_mode 'squash'"):
        Preprocess.from_timm(timm_like(crop_mode="squash"))
