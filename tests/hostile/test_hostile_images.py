"""Images and folders of images from elsewhere: read by a few readers, of sizes with a limit, and never for ever."""

import io
import os
import pickle
import random
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import EpsImagePlugin, Image, PngImagePlugin

from sagan_attn.__main__ import main
from sagan_attn.errors import DataError
from sagan_attn.training.callbacks import RunFolder
from sagan_attn.training.data import CIFARData, FolderData, Preprocess, TorchvisionData
from sagan_attn.training.data.folder import FolderPictures
from sagan_attn.training.data.preprocess import FORMATS, open_image
from sagan_attn.training.run import RunPaths

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def encoded(kind: str, **how: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, format=kind, **how)
    return out.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_readers_that_are_asked(kind: str, tmp_path: Path):
    path = tmp_path / "a.png"  # whatever the name says
    path.write_bytes(encoded(kind))
    assert open_image(path).size == (12, 12)


def test_photographs_of_several_pictures_are_read(tmp_path: Path):
    """MPO, which cameras write with the suffix of JPEG."""
    image = Image.fromarray(PIXELS)
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image])
    assert open_image(tmp_path / "a.jpg").size == (12, 12)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_postscript_is_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PIL knows a file by its first bytes, and hands PostScript to another program, whatever the file is called."""
    called = []

    def ghostscript(*arguments: Any) -> Any:
        called.append(arguments)
        return Image.fromarray(PIXELS).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    path = tmp_path / "folder" / "cats" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(encoded("EPS"))
    for read in (
        lambda: open_image(path),
        lambda: Preprocess(8)(path),
        lambda: FolderData(str(tmp_path / "folder")).native_size(),
        lambda: FolderPictures(path.parent, [name], [0]).open(0),
        lambda: FolderPictures(path.parent, [name], [0]).size(0),
    ):
        with pytest.raises(DataError, match=f"cannot read the image {re.escape(str(path))}|of the 1 images"):
            read()
    assert called == []
    with Image.open(path) as image:
        image.load()
    assert called  # the payload is live


def png(width: int, height: int) -> bytes:
    """The head of an image of that size, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 14_000, 60_000])  # of which PIL warns, and refuses the last
def test_bombs_are_refused_before_they_are_decoded(side: int, tmp_path: Path):
    for place in ("train/cats", "train/dogs", "test/cats", "test/dogs"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(encoded("PNG"))
    path = tmp_path / "train" / "cats" / "b.png"
    path.write_bytes(png(side, side))
    match = rf"the image {re.escape(str(path))} is too large to be safe: .*scale or remove it"
    with pytest.raises(DataError, match=match):
        open_image(path)
    for options in ({}, {"image_size": 8}, {"image_size": 8, "cache_bytes": 0}):
        data = FolderData(str(tmp_path), val_fraction=0, batch_size=3, **options)
        with pytest.raises(DataError, match=match):
            _first_batch(data)


def _first_batch(data: FolderData) -> None:
    data.setup("fit")
    next(iter(data.train_dataloader()))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_where_warnings_are_not_errors(tmp_path: Path):
    path = tmp_path / "b.png"
    path.write_bytes(png(10_000, 10_000))
    with pytest.raises(DataError, match=r"b.png is too large .*10,000 x 10,000 pixels are more than the 89,478,485"):
        open_image(path)


def test_text_that_unpacks_to_more_is_refused(tmp_path: Path):
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(DataError, match=r"cannot read the image .*a.png: Decompressed data too large"):
        open_image(tmp_path / "a.png")


def test_damaged_exif_data_are_named(tmp_path: Path):
    """They say how an image is turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.webp"
    data = encoded("WEBP", exif=exif)
    path.write_bytes(data.replace(b"MM\0*", b"MM\0?"))
    with pytest.raises(DataError, match=r"cannot read the EXIF data of the image .*a.webp: not a TIFF file"):
        Preprocess(8)(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PIL, on what it leaves out
def test_damaged_images_are_read_or_named(tmp_path: Path):
    """4,000 images with some bytes changed, added or cut off."""
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    more: dict[str, dict[str, Any]] = {"JPEG": {"exif": exif}, "PNG": {"exif": exif}, "WEBP": {"exif": exif}}
    whole = [encoded(kind, **more.get(kind, {})) for kind in FORMATS]
    whole += [encoded("TIFF", compression="tiff_lzw"), encoded("JPEG", progressive=True)]
    path, refused = tmp_path / "a.png", []
    for _ in range(4_000):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = int(rng.random() ** 2 * len(data))
            how = rng.random()
            if how < 0.6:
                data[place] = rng.randrange(256)
            elif how < 0.8:
                data = data[: max(1, place)]
            else:
                data[place:place] = rng.randbytes(rng.choice([1, 4, 100]))
        path.write_bytes(data)
        for read in (Preprocess(8), lambda file: FolderPictures(file.parent, [file.name], [0]).size(0)):
            try:
                read(path)
            except DataError as error:
                refused.append(str(error))
    assert 2_000 < len(refused) < 8_000
    assert all(str(path) in message for message in refused)


def image_folder(root: Path, *classes: str | bytes) -> Path:
    for name in classes:
        folder = Path(os.fsdecode(os.path.join(os.fsencode(root), os.fsencode(name))))
        folder.mkdir(parents=True)
        for index in range(4):
            (folder / f"{index}.png").write_bytes(encoded("PNG"))
    return root


def test_links_in_circles_end(tmp_path: Path):
    root = image_folder(tmp_path / "root", "cats", "dogs")
    cats = root / "cats"
    for index in range(8):
        (cats / f"back{index}").symlink_to(root / "cats")  # 8 ** 40 ways
    (cats / "up").symlink_to(root)
    for index in range(12):  # without a circle: 2 ** 12 ways to the last
        deeper = tmp_path / f"deeper{index}"
        deeper.mkdir()
        (deeper / "a.png").write_bytes(encoded("PNG"))
        for side in "ab":
            (deeper / side).symlink_to(tmp_path / f"deeper{index + 1}")
    (cats / "deeper").symlink_to(tmp_path / "deeper0")
    data = FolderData(str(root), test_fraction=0.25)
    data.setup()
    assert sum(data.describe()["sizes"].values()) == 4 + 4 + 12 + 4  # the dogs lie under "up" too


@pytest.mark.parametrize("name", ["pipe.png", "zero.png", "folder.png"])
def test_what_is_no_file_is_not_waited_for(name: str, small_run: Path, tmp_path: Path, capsys: Any):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    path = tmp_path / name
    with pytest.raises(DataError, match=f"cannot read the image {re.escape(str(path))}: it is no plain file"):
        open_image(path)
    run = ["explore", "--checkpoint", str(small_run), "--out", str(tmp_path / "page.html"), "--images", str(path)]
    assert main(run) == 2
    assert str(path) in capsys.readouterr().err


NAMES = [
    "=1+1",
    "-cmd",
    "@x",
    "<img src=x onerror=alert(1)>",
    "a\nb",
    "a\x1b[31mb",
    "a,b\"c'",
    b"caf\xe9",
    "prediction",
]


def test_names_of_classes_are_names(tmp_path: Path):
    """Of folders: any bytes but a slash. No two runs are confused, and no spreadsheet computes them."""
    root = image_folder(tmp_path / os.fsdecode(b"r\xe9"), *NAMES)
    data = FolderData(str(root), test_fraction=0.25)
    data.setup()
    assert sorted(data.classes) == sorted(map(os.fsdecode, NAMES))
    assert len(data.fingerprint()) == 64
    streamed = FolderData(str(root), test_fraction=0.25, cache_bytes=0)
    streamed.setup()
    assert len(streamed.fingerprint()) == 64
    paths = RunPaths(tmp_path / "run")
    probabilities = torch.eye(len(NAMES))
    RunFolder(paths, "", False).write_predictions(
        [probabilities], data.classes, [f"={name}.png" for name in data.classes]
    )
    table = pd.read_csv(paths.predictions, header=None, dtype=str, keep_default_na=False)
    assert table.shape == (len(NAMES) + 1, len(NAMES) + 3)
    assert list(table.iloc[1:, 2]) == list(table.iloc[0, 3:])
    for cell in table.to_numpy().ravel():
        assert not cell.startswith(("=", "-", "@", "+"))
    assert "'=1+1" in set(table.iloc[0])


def test_data_sets_that_unpickle_are_refused():
    for name in ("LSUN", "LSUNClass"):
        with pytest.raises(DataError, match=f"torchvision.datasets.{name}'.* unpickles a file beside its images"):
            TorchvisionData(f"torchvision.datasets.{name}")


def test_a_data_cache_is_not_unpickled(tmp_path: Path):
    """The files of CIFAR are pickles: torchvision opens them only if they have the md5 that it knows."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    call = b"cos\nmkdir\n(V" + str(tmp_path / "made").encode() + b"\ntR."
    for name in [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(call)
    with pytest.raises(DataError, match="not found or corrupted"):
        CIFARData(root=str(tmp_path), download=False).setup("fit")
    assert not (tmp_path / "made").exists()
    pickle.loads(call)
    assert (tmp_path / "made").is_dir()  # the payload is live
