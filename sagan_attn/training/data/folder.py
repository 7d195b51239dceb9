"""Image files in folders, one folder a class."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import ExifTags, Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from sagan_attn.errors import DataError, one_line
from sagan_attn.training.data.augment import AugmentConfig
from sagan_attn.training.data.base import ImageData, Split
from sagan_attn.training.data.preprocess import image_file, open_image, to_rgb
from sagan_attn.training.data.splits import seeded_order, stratified_split

__all__ = ["FolderData"]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class FolderPictures:
    """Image files below `root`: relative paths and class numbers."""

    root: Path
    files: list[str]
    labels: list[int]

    def open(self, index: int) -> Image.Image:
        try:
            return open_image(self.root / self.files[index])
        except DataError as error:
            raise DataError(f"{error}, or leave out such files with data.unreadable: skip") from error

    def name(self, index: int) -> str:
        return self.files[index]

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) as shown, from the file's header alone."""
        with image_file(self.root / self.files[index]) as image:
            width, height = image.size
            # orientations 5 to 8 lie on their side; a square needs no such question
            turned = width != height and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (height, width) if turned else (width, height)

    def content_digest(self, indices: Sequence[int]) -> bytes:
        files = sorted(self.files[index] for index in indices)
        lines = [f"{file} {(self.root / file).stat().st_size}" for file in files]
        return hashlib.sha256(os.fsencode("\n".join(lines))).digest()  # names are bytes, not always UTF-8

    def subset(self, indices: Sequence[int]) -> "FolderPictures":
        return FolderPictures(self.root, [self.files[i] for i in indices], [self.labels[i] for i in indices])


class FolderData(ImageData):
    """A folder of your own images, in one of two layouts:

    `root/train/<class>/...` and `root/test/<class>/...`; a `root/val/` of the same shape is the validation
    part if it is there, and otherwise `val_fraction` of the training images is.

    `root/<class>/...`: `test_fraction` of the images is kept for testing, the same ones whatever `seed` is,
    so that no seed trains on what another is tested on; the validation part is split off the rest.

    Both splits are stratified: of each class its share, rounded, and at least one image, as long as one is left for
    each other part. Training comes first, then testing: classes too small for all parts are named in a warning.

    Files may lie deeper within a class; hidden files and files that are no images (torchvision's
    IMG_EXTENSIONS) are passed over. A file that cannot be read is refused when it is met; with `unreadable`
    "skip" all files are decoded once beforehand, and those that fail are left out with a warning that names
    them. Without `image_size` all training images must be squares of one size.
    mean and std default to ImageNet's. Crop and flip by default. See `ImageData` for the other options.
    """

    stratified = True

    def __init__(
        self,
        root: str,
        test_fraction: float = 0.2,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        order_seed: int | None = None,
        image_size: int | None = None,
        augment: AugmentConfig | None = None,
        cache_bytes: int = 1 << 30,
        num_workers: int = 0,
        limit_train: int | None = None,
        drop_last: bool = True,
        unreadable: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        super().__init__(
            name=f"folder:{Path(root).name}",
            batch_size=batch_size,
            val_fraction=val_fraction,
            seed=seed,
            order_seed=order_seed,
            image_size=image_size,
            augment=augment,
            cache_bytes=cache_bytes,
            num_workers=num_workers,
            limit_train=limit_train,
            drop_last=drop_last,
            mean=mean,
            std=std,
        )
        if not 0 < test_fraction < 1:
            raise DataError(f"test_fraction ({test_fraction}) must lie in (0, 1)")
        if unreadable not in ("refuse", "skip"):
            raise DataError(f"unreadable ({unreadable!r}) must be refuse or skip")
        self.root = root
        self.test_fraction = test_fraction
        self.unreadable = unreadable
        self.left_out: list[str] = []
        self._listed: dict[str, FolderPictures] = {}
        self._warned = False

    def pictures(self, split: Split) -> FolderPictures | None:
        root = Path(self.root)
        if _has_splits(root):
            if split == "val" and not (root / "val").is_dir():
                return None
            pictures = self._list(split)
            if split == "train" and self.val_fraction and not (root / "val").is_dir():
                self._warn_of_small_classes(pictures, ["train", "val"])
            return pictures
        if split == "val":
            return None
        whole = self._list("")
        order = seeded_order(len(whole.files), "test split")
        # one is left for validation whether there is any or not: what is tested on hangs on no other option
        test, train = stratified_split(whole.labels, self.test_fraction, order, keep=2)
        if not test:
            raise DataError(
                f"test_fraction ({self.test_fraction}) of the {len(order)} images in {root} leaves 0 to test on: no "
                "class has a second image"
            )
        self._warn_of_small_classes(whole, ["train", "test", "val"] if self.val_fraction else ["train", "test"])
        return whole.subset(sorted(test if split == "test" else train))

    def _warn_of_small_classes(self, pictures: FolderPictures, parts: Sequence[str]) -> None:
        """Name, once, the classes with fewer images than there are parts to share them."""
        counts = Counter(pictures.labels)
        small = [
            f"{one_line(name)} ({counts[label]})"
            for label, name in enumerate(_class_names(pictures.root))
            if counts[label] < len(parts)
        ]
        if small and not self._warned:
            self._warned = True
            more = f", and {len(small) - 10} more" if len(small) > 10 else ""
            warnings.warn(
                f"classes with too few images for all parts ({', '.join(parts)}, served in this order): "
                f"{', '.join(small[:10])}{more}",
                stacklevel=2,
            )

    def read_classes(self) -> list[str]:
        root = Path(self.root)
        if not _has_splits(root):
            return _class_names(root)
        classes = _class_names(root / "train")
        for split in ("val", "test"):
            if (root / split).is_dir() and (other := _class_names(root / split)) != classes:
                raise DataError(
                    f"the classes of {root / 'train'} and {root / split} differ: only in train "
                    f"{sorted(set(classes) - set(other))}, only in {split} "
                    f"{sorted(set(other) - set(classes))}"
                )
        return classes

    def native_size(self) -> int:
        pictures = self.pictures("train")
        if pictures is None:
            raise DataError(f"there are no training images in {self.root}")
        sizes = {pictures.size(index) for index in range(len(pictures.files))}
        width, height = min(sizes)
        if len(sizes) > 1 or width != height:
            found = f"from {min(sizes)} to {max(sizes)}" if len(sizes) > 1 else f"all {width} x {height}"
            raise DataError(
                f"the images in {self.root} are not squares of one size ({found}, width and height): give image_size"
            )
        return width

    def _list(self, split: str) -> FolderPictures:
        """All images of a split ("": of the root itself), read from the disk once."""
        if split not in self._listed:
            folder = Path(self.root, split)
            if not folder.is_dir():
                raise DataError(
                    f"{folder} is missing: {self.root} holds {_folders(Path(self.root))}; add the folder, or use "
                    "the layout class/file and let test_fraction choose"
                )
            pictures = _list_images(folder, _class_names(folder))
            self._listed[split] = self._readable(pictures) if self.unreadable == "skip" else pictures
        return self._listed[split]

    def _readable(self, pictures: FolderPictures) -> FolderPictures:
        """Those that decode; a warning names the others. Raises `DataError` where a class would be left empty."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            good = list(threads.map(partial(_is_readable, pictures), range(len(pictures.files))))
        bad = [str(pictures.root / file) for file, fine in zip(pictures.files, good, strict=True) if not fine]
        if not bad:
            return pictures
        more = f", and {len(bad) - 10} more" if len(bad) > 10 else ""
        warnings.warn(f"left out {len(bad)} files that cannot be read: {', '.join(bad[:10])}{more}", stacklevel=2)
        self.left_out += bad
        kept = pictures.subset([index for index, fine in enumerate(good) if fine])
        if empty := sorted({*pictures.labels} - {*kept.labels}):
            raise DataError(
                f"no image in {pictures.root / _class_names(pictures.root)[empty[0]]} can be read: remove it"
            )
        return kept

    def describe(self) -> dict[str, Any]:
        """As every data module's, with the files that were left out."""
        return super().describe() | {"left_out": self.left_out}


def _is_readable(pictures: FolderPictures, index: int) -> bool:
    try:
        to_rgb(pictures.open(index))
    except DataError:
        return False
    return True


def _folders(root: Path) -> list[str]:
    """Names of the folders in `root`, hidden ones left out, sorted.

    Raises:
        DataError: `root` is not a folder.
    """
    if not root.is_dir():
        raise DataError(f"the image folder {root} (that is {root.resolve()}) does not exist: check root")
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _has_splits(root: Path) -> bool:
    """Whether `root` holds train/, val/, test/ with class folders in them, rather than class folders.

    Raises:
        DataError: it holds both, or splits without train/.
    """
    folders = _folders(root)
    splits = [name for name in folders if name in SPLITS]
    others = [name for name in folders if name not in SPLITS]
    # "train" may be a class among bus and car; as a split it has folders in it
    if not splits or (others and not any(_folders(root / name) for name in splits)):
        return False
    if others:
        raise DataError(
            f"{root} holds both splits {splits} and other folders {others[:10]}: keep either split/class/file "
            "or class/file"
        )
    if "train" not in splits:
        raise DataError(f"{root} holds {splits} but no train folder: make it train/<class>/ and test/<class>/")
    return True


def _class_names(folder: Path) -> list[str]:
    if not (classes := _folders(folder)):
        raise DataError(f"{folder} holds no class folders: put the images of a class in a folder of its name")
    return classes


def _list_images(folder: Path, classes: list[str]) -> FolderPictures:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        before = len(files)
        seen: set[str] = set()
        # links are followed, as torchvision's ImageFolder does, but no folder is listed twice: links can make circles
        for place, folders, names in os.walk(folder / name, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
            inside = os.path.relpath(place, folder)
            for file in sorted(names):
                if not file.startswith(".") and file.lower().endswith(IMG_EXTENSIONS):
                    files.append(os.path.join(inside, file))
                    labels.append(label)
        if len(files) == before:
            raise DataError(
                f"the class folder {folder / name} holds no images ({', '.join(IMG_EXTENSIONS)}): fill or remove it"
            )
    return FolderPictures(folder, files, labels)
