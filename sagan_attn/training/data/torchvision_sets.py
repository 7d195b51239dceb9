"""Data sets torchvision can download: CIFAR, and any classification set by its class path."""

import importlib
import inspect
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, LSUN, LSUNClass, VisionDataset

from sagan_attn.errors import DataError
from sagan_attn.training.data.augment import AugmentConfig
from sagan_attn.training.data.base import ImageData, Split
from sagan_attn.training.data.sources import ArrayPictures

__all__ = ["CIFARData", "TorchvisionData"]


UNPICKLING = (LSUN, LSUNClass)  # CIFAR is unpickled too, but its files must have the md5 that torchvision knows

# mean and standard deviation per channel over the training images
_CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class CIFARData(ImageData):
    """CIFAR-10 or CIFAR-100 (https://www.cs.toronto.edu/~kriz/cifar.html), 32 x 32, downloaded to `root` if
    need be.

    Crop of 4 pixels and flip by default. See `ImageData` for the other options.
    """

    def __init__(
        self,
        name: Literal["cifar10", "cifar100"] = "cifar10",
        root: str = "data",
        download: bool = True,
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
    ) -> None:
        if name not in _CIFAR_STATISTICS:
            raise DataError(f"name ({name!r}) must be cifar10 or cifar100")
        super().__init__(
            name=name,
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
        )
        self.default_mean, self.default_std = _CIFAR_STATISTICS[name]
        self.root = root
        self.download = download
        self._dataset_class = CIFAR10 if name == "cifar10" else CIFAR100
        self._read: dict[Split, CIFAR10] = {}

    def prepare_data(self) -> None:
        if self.download:
            _open_dataset(self._dataset_class, self.root, {"train": True, "download": True})

    def pictures(self, split: Split) -> ArrayPictures | None:
        if split == "val":
            return None
        dataset = self._dataset(split)
        return ArrayPictures(dataset.data, dataset.targets)

    def read_classes(self) -> list[str]:
        return list(self._dataset("train").classes)

    def native_size(self) -> int:
        return 32

    def _dataset(self, split: Split) -> CIFAR10:
        if split not in self._read:
            self._read[split] = _open_dataset(self._dataset_class, self.root, {"train": split == "train"})
        return self._read[split]


class TorchvisionData(ImageData):
    """Any torchvision data set whose items are (picture, class number), e.g. "torchvision.datasets.SVHN".

    `train_args` and `test_args` are passed to the class and choose the split; None: worked out from its
    signature (`train=True/False`, or `split="train"/"test"`). `image_size` is required unless a pretrained
    model brings one or the first training picture is square. mean and std default to ImageNet's. By default
    crops but never flips: what is a digit or a letter here does not survive a mirror. See `ImageData` for the
    other options.
    """

    def __init__(
        self,
        dataset: str,
        root: str = "data",
        download: bool = True,
        train_args: dict[str, Any] | None = None,
        test_args: dict[str, Any] | None = None,
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
    ) -> None:
        super().__init__(
            name=dataset,
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
        self.root = root
        self.download = download
        self._dataset_class = _vision_class(dataset)
        self._arguments: dict[Split, dict[str, Any]] = {
            "train": _split_arguments(self._dataset_class, "train") if train_args is None else train_args,
            "test": _split_arguments(self._dataset_class, "test") if test_args is None else test_args,
        }
        self._read: dict[Split, _DatasetPictures] = {}

    def prepare_data(self) -> None:
        if self.download and "download" in inspect.signature(self._dataset_class).parameters:
            for arguments in self._arguments.values():
                _open_dataset(self._dataset_class, self.root, {**arguments, "download": True})

    def pictures(self, split: Split) -> "_DatasetPictures | None":
        return None if split == "val" else self._opened(split)

    def read_classes(self) -> list[str]:
        pictures = self._opened("train")  # whatever the stage, so that every stage has the same classes
        names = getattr(pictures.dataset, "classes", range(max(pictures.labels, default=-1) + 1))
        return [str(name) for name in names]

    def native_size(self) -> int:
        width, height = self._opened("train").open(0).size
        if width != height:
            raise DataError(f"the images of {self.name} are {width} x {height}, not square: give image_size")
        return width

    def default_augment(self, image_size: int) -> AugmentConfig:
        return AugmentConfig(crop_padding=image_size // 8, flip=False)

    def _opened(self, split: Split) -> "_DatasetPictures":
        if split not in self._read:
            dataset = _open_dataset(self._dataset_class, self.root, self._arguments[split])
            self._read[split] = _DatasetPictures(dataset, f"{self.name} ({split})")
        return self._read[split]


class _DatasetPictures:
    """A torchvision data set's items, opened one by one. `of`: its name and split."""

    def __init__(self, dataset: VisionDataset, of: str) -> None:
        self.dataset = dataset
        self.of = of
        self.labels = self._read_labels()

    def open(self, index: int) -> Image.Image:
        image = self.dataset[index][0]
        if not isinstance(image, Image.Image):
            raise DataError(f"item {index} of {self.of} is a {type(image).__name__}, not a PIL image")
        return image

    def name(self, index: int) -> str:
        return str(index)

    def content_digest(self, indices: Sequence[int]) -> bytes:
        return repr(list(indices)).encode()  # the class knows no more without decoding

    def _read_labels(self) -> list[int]:
        count = len(self.dataset)  # type: ignore[arg-type]
        for attribute in ("targets", "labels", "_labels"):
            values = getattr(self.dataset, attribute, None)
            if values is not None and len(values) == count:
                break
        else:  # the class keeps them elsewhere: read every item, which is slow but right
            values = [self.dataset[index][1] for index in range(count)]
        if isinstance(values, (np.ndarray, torch.Tensor)):
            values = values.tolist()
        for index, value in enumerate(values):
            if not isinstance(value, numbers.Integral) or value < 0:
                raise DataError(f"label {index} of {self.of} is {value!r}, not a class number")
        return [int(value) for value in values]


def _vision_class(path: str) -> type[VisionDataset]:
    module_name, _, name = path.rpartition(".")
    example = 'for example "torchvision.datasets.SVHN"'
    if not module_name:
        raise DataError(f"dataset ({path!r}) must be the full path of a class, {example}")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"dataset ({path!r}) cannot be imported ({error}): give a path, {example}") from error
    if not (isinstance(found, type) and issubclass(found, VisionDataset)):
        raise DataError(f"dataset ({path!r}) is not a torchvision VisionDataset: give a path, {example}")
    if issubclass(found, UNPICKLING):
        raise DataError(f"dataset ({path!r}) unpickles a file beside its images, which could run code: give another")
    return found


def _split_arguments(dataset_class: type[VisionDataset], split: Literal["train", "test"]) -> dict[str, Any]:
    parameters = inspect.signature(dataset_class).parameters
    if "train" in parameters:
        return {"train": split == "train"}
    if "split" in parameters:
        return {"split": split}
    raise DataError(f"{dataset_class.__name__} has no `train` and no `split` argument: give train_args and test_args")


def _open_dataset(dataset_class: type[VisionDataset], root: str, arguments: dict[str, Any]) -> Any:
    try:
        return dataset_class(root=root, **arguments)
    # torchvision: URLError and OSError from the network and the disk, RuntimeError for missing or corrupt
    # files
    except (URLError, OSError, RuntimeError) as error:
        name, folder = dataset_class.__name__, Path(root).resolve()
        tried = "could not be downloaded" if arguments.get("download") else "was not found"
        raise DataError(
            f"{name} {tried} ({type(error).__name__}: {error}). Its files are expected in {folder}: "
            "run once with download=true where there is a network, or copy them there from such a machine"
        ) from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{dataset_class.__name__} refuses the arguments {arguments}: {error}") from error
