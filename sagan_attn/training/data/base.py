"""The data module all data sets share: split, cache or stream, order, augmentation on the training device."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sagan_attn.errors import DataError
from sagan_attn.training.data.augment import AugmentConfig, augment
from sagan_attn.training.data.checks import require_at_least
from sagan_attn.training.data.loaders import EpochSampler, TrainLoader, keep_batch
from sagan_attn.training.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from sagan_attn.training.data.seeds import batch_seed, stateless_seed
from sagan_attn.training.data.sources import PicturePart, Pictures, StreamSource, TensorSource, make_source
from sagan_attn.training.data.splits import split_indices

__all__ = ["ImageData", "Split"]

Split = Literal["train", "val", "test"]


class ImageData(L.LightningDataModule, ABC):
    """Labelled RGB images, for Lightning or by hand.

    Each part (train, val, test) is decoded to uint8 images of one size and held as one tensor if that takes
    at most `cache_bytes`; otherwise it is decoded anew each epoch by `num_workers` processes. Both roads give
    the same batches: uint8 [B, 3, S, S] and int64 [B]. `on_after_batch_transfer` augments (training only) and
    normalises them as whole tensors on the device. A held part is read in the main process, whatever
    `num_workers`, and lives on the GPU when the trainer uses one.

    Everything random follows from the seeds, the epoch and the batch's number; the global generators are neither
    read nor moved, and a run resumed in mid-epoch goes on with the next batch. CPU and CUDA draw different
    augmentations.

    Options every data set has:
        batch_size: images a step and process.
        val_fraction: share of the training images kept for validation, chosen by `seed`; 0: no validation.
        seed: decides the split and, without `order_seed`, the order and the augmentation.
        order_seed: decides the order and the augmentation alone; None for `seed`. Runs that differ only here share
            training and validation images.
        image_size: side in pixels; None: the pretrained model's, or else the data's own.
        augment: None: the data set's own default.
        cache_bytes: the largest part held in memory.
        num_workers: processes that decode a streamed part.
        limit_train: train on so many images only, chosen by `seed`.
        drop_last: leave out the last, smaller training batch.

    After `setup` of any stage: `classes` (names), `num_classes`, `in_channels`, `preprocess`, `augment`.
    """

    default_mean: tuple[float, ...] = IMAGENET_MEAN
    default_std: tuple[float, ...] = IMAGENET_STD
    stratified: bool = False  # whether the validation part is split off class by class

    def __init__(
        self,
        *,
        name: str,
        batch_size: int,
        val_fraction: float,
        seed: int,
        image_size: int | None,
        augment: AugmentConfig | None,
        cache_bytes: int,
        num_workers: int,
        limit_train: int | None,
        drop_last: bool,
        order_seed: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        require_at_least("batch_size", batch_size, 1)
        require_at_least("cache_bytes", cache_bytes, 0)
        require_at_least("num_workers", num_workers, 0)
        if limit_train is not None:
            require_at_least("limit_train", limit_train, 1)
        if not 0 <= val_fraction < 1:
            raise DataError(f"val_fraction ({val_fraction}) must lie in [0, 1)")
        self.name = name
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.order_seed = seed if order_seed is None else order_seed
        self.cache_bytes = cache_bytes
        self.num_workers = num_workers
        self.limit_train = limit_train
        self.drop_last = drop_last
        self.in_channels = 3
        asked = {"image_size": image_size, "mean": mean, "std": std}
        self._asked: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        checked: dict[str, Any] = {"image_size": 1} | self._asked
        Preprocess(**checked)  # refuse bad values now, not after a download
        self._asked_augment = augment
        self._model_preprocess: Preprocess | None = None
        self._sources: dict[Split, TensorSource | StreamSource] = {}

    @abstractmethod
    def pictures(self, split: Split) -> Pictures | None:
        """The labelled pictures of a split; None for "val" where it is to be split off the training
        pictures."""

    @abstractmethod
    def read_classes(self) -> list[str]:
        """Class names; a label is an index into them."""

    @abstractmethod
    def native_size(self) -> int:
        """The side, in pixels, to use when neither the user nor a pretrained model names one."""

    def default_augment(self, image_size: int) -> AugmentConfig:
        """Crop and flip, as usual for photographs; the padding of 4 pixels at 32, in proportion."""
        return AugmentConfig(crop_padding=image_size // 8)

    def use_preprocess(self, preprocess: Preprocess) -> None:
        """Prepare images as a pretrained model wants them; an image_size, mean or std the user gave
        explicitly wins.

        Parts already set up are decoded again if that changes their pixels.
        """
        self._model_preprocess = preprocess
        if not self._sources:
            return
        before, self.preprocess = self.preprocess, self._resolve_preprocess()
        self._resolve_augment()
        if replace(before, mean=self.preprocess.mean, std=self.preprocess.std) != self.preprocess:
            done = list(self._sources)
            self._sources.clear()
            self.setup("test" if done == ["test"] else None if "test" in done else "fit")

    def setup(self, stage: str | None = None) -> None:
        """Load what `stage` needs (fit, validate: train and val; test, predict: test; None: all), once.

        Raises:
            DataError: data missing or unreadable, or an option that does not fit them.
        """
        wanted: dict[str | None, list[Split]] = {
            None: ["train", "val", "test"],
            "fit": ["train", "val"],
            "validate": ["train", "val"],
            "test": ["test"],
            "predict": ["test"],
        }
        if stage not in wanted:
            raise DataError(f"stage ({stage!r}) must be fit, validate, test, predict or None")
        missing = [split for split in wanted[stage] if split not in self._sources]
        if not missing:
            return
        self.classes = self.read_classes()
        self.num_classes = len(self.classes)
        self.preprocess = self._resolve_preprocess()
        self._resolve_augment()
        parts = self._training_parts() if "train" in missing else {}
        if "test" in missing:
            pictures = self.given_pictures("test")
            parts["test"] = PicturePart(pictures, range(len(pictures.labels)))
        for split, part in parts.items():
            if max(part.labels, default=-1) >= self.num_classes:
                raise DataError(
                    f"{self.name} has a label {max(part.labels)} among its {split} images but only "
                    f"{self.num_classes} classes"
                )
            self._sources[split] = make_source(part, self.preprocess, self.cache_bytes)

    def _resolve_preprocess(self) -> Preprocess:
        if self._model_preprocess is not None:
            return replace(self._model_preprocess, **self._asked)
        defaults: dict[str, Any] = {"mean": self.default_mean, "std": self.default_std}
        if "image_size" not in self._asked:
            defaults["image_size"] = self.native_size()
        return Preprocess(**(defaults | self._asked))

    def _resolve_augment(self) -> None:
        size = self.preprocess.image_size
        self.augment = self.default_augment(size) if self._asked_augment is None else self._asked_augment
        self.augment.check_size(size)

    def given_pictures(self, split: Split) -> Pictures:
        """The pictures of a split that cannot be missing. Raises `DataError` where there are none."""
        pictures = self.pictures(split)
        if pictures is None or not len(pictures.labels):
            raise DataError(f"{self.name} has no {split} images")
        return pictures

    def _training_parts(self) -> dict[Split, PicturePart]:
        pictures, val_pictures = self.given_pictures("train"), self.pictures("val")
        val_fraction = self.val_fraction if val_pictures is None else 0.0
        labels = pictures.labels if self.stratified else None
        train, val = split_indices(len(pictures.labels), val_fraction, self.seed, self.limit_train, labels)
        if val_pictures is None:
            val_pictures = pictures
        else:
            val = range(len(val_pictures.labels))
        return {"train": PicturePart(pictures, train), "val": PicturePart(val_pictures, val)}

    def train_dataloader(self) -> DataLoader:
        source = self._ready_source("train")
        trainer = self.trainer
        sampler = EpochSampler(
            source,
            batch_size=self.batch_size,
            seed=self.order_seed,
            drop_last=self.drop_last,
            num_replicas=1 if trainer is None else trainer.world_size,
            rank=0 if trainer is None else trainer.global_rank,
            position=self._batches_done,
        )
        options = self._loader_options(source)
        loader = TrainLoader(source, sampler=sampler, drop_last=self.drop_last, **options)
        if not len(loader):
            raise DataError(
                f"batch_size ({self.batch_size}) exceeds the {len(sampler)} training images of a process and "
                "drop_last leaves none: lower it or set drop_last to false"
            )
        return loader

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        source = self._ready_source("val")
        # an empty list is how Lightning is told that there is nothing to validate on
        return DataLoader(source, **self._loader_options(source)) if len(source) else []

    def test_dataloader(self) -> DataLoader:
        source = self._ready_source("test")
        return DataLoader(source, **self._loader_options(source))

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def _ready_source(self, split: Split) -> TensorSource | StreamSource:
        if split not in self._sources:
            stage = "test" if split == "test" else "fit"
            raise DataError(f'the {split} images are not loaded: call setup("{stage}") first')
        source = self._sources[split]
        if isinstance(source, TensorSource):
            # only a trainer knows the device, and only when the loaders are asked for
            device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
            source = source.to(device if device.type == "cuda" else torch.device("cpu"))
            self._sources[split] = source
        return source

    def _loader_options(self, source: TensorSource | StreamSource) -> dict[str, Any]:
        # a held part needs no workers: a batch costs microseconds, and CUDA tensors cannot be shared
        workers = self.num_workers if isinstance(source, StreamSource) else 0
        trainer = self.trainer
        to_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": to_gpu and isinstance(source, StreamSource),
            "collate_fn": keep_batch,
            # DataLoader seeds its workers from the global generator unless it is given one
            "generator": torch.Generator().manual_seed(stateless_seed("workers", self.seed)),
        }

    def _batches_done(self) -> int:
        """Batches of the trainer's epoch made ready before the one under way; no hook is told its number."""
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """uint8 images to normalised ones in the trainer's precision; augmented while training, and only
        then."""
        images, labels = batch
        trainer = self.trainer
        if trainer is None:
            return self.preprocess.normalize(images), labels
        if trainer.training:
            seed = batch_seed(self.order_seed, trainer.current_epoch, self._batches_done(), trainer.global_rank)
            generator = torch.Generator(images.device).manual_seed(seed)
            mean, std = self.preprocess.mean, self.preprocess.std
            images, labels = augment(images, labels, self.augment, self.num_classes, mean, std, generator)
        else:
            images = self.preprocess.normalize(images)
        # Lightning converts the inputs before this hook, when they are still uint8
        return trainer.precision_plugin.convert_input((images, labels))

    def fingerprint(self, stage: Literal["fit", "test"] = "fit") -> str:
        """sha256 (hex) of the name, sizes and content of the parts of `stage`, which are set up if need be.

        A held part counts by its pixels and labels, a streamed one by what is known without decoding (for files:
        relative names and sizes) and its labels, so the two differ for the same data.
        """
        self.setup(stage)
        digest = hashlib.sha256(os.fsencode(str(self.name)))  # of a folder: not always UTF-8
        for split in ("train", "val") if stage == "fit" else ("test",):
            source = self._sources[split]
            digest.update(f"/{split}/{len(source)}/".encode())
            digest.update(source.digest())
        return digest.hexdigest()

    def test_digest(self) -> str:
        """sha256 (hex) of class names, labels and content of the test pictures, whatever is made of them.

        Content is what is known without decoding: pixels held in memory, or relative names and sizes of files.
        """
        pictures = self.given_pictures("test")
        labels = [int(label) for label in pictures.labels]
        digest = hashlib.sha256(json.dumps([self.read_classes(), labels]).encode())
        digest.update(pictures.content_digest(range(len(labels))))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """JSON-able: name, seeds, sizes of the parts set up so far, classes, image size, augmentation."""
        ready = bool(self._sources)
        return {
            "name": self.name,
            "seed": self.seed,
            "order_seed": self.order_seed,
            "sizes": {split: len(source) for split, source in self._sources.items()},
            "classes": self.classes if ready else None,
            "image_size": self.preprocess.image_size if ready else None,
            "augment": asdict(self.augment) if ready else None,
        }
