"""What `bench data` compares: the library's data modules, torchvision's transforms image by image, timm's loader."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from sagan_attn.bench.machine import summary
from sagan_attn.bench.step import Classification
from sagan_attn.bench.timing import Budget, interleaved, ratios
from sagan_attn.errors import ConfigError
from sagan_attn.training.data import AugmentConfig, FolderData, ImageData, augment
from sagan_attn.training.data.base import Split
from sagan_attn.training.data.loaders import keep_batch
from sagan_attn.training.data.sources import ArrayPictures
from sagan_attn.training.hosts import HostConfig, build_host

__all__ = [
    "held_data",
    "held_epochs",
    "overlap",
    "streamed_data",
    "streamed_epochs",
    "timm_loaders",
    "write_photos",
]

PHOTO = (500, 375)  # width and height, as in ImageNet
CLASSES = 10


@dataclass(frozen=True)
class Epoch:
    """A pass over some images."""

    run: Callable[[], object]
    images: int


class RandomImages(ImageData):
    """Random pixels: for the time a batch takes, they are as good as any."""

    def __init__(self, count: int, size: int, batch_size: int) -> None:
        super().__init__(
            name="random",
            batch_size=batch_size,
            val_fraction=0.0,
            seed=0,
            image_size=size,
            augment=None,
            cache_bytes=1 << 40,
            num_workers=0,
            limit_train=None,
            drop_last=True,
        )
        pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8).numpy()
        self._pictures = ArrayPictures(pixels, torch.randint(0, CLASSES, (count,)).tolist())

    def pictures(self, split: Split) -> ArrayPictures | None:
        return self._pictures if split == "train" else None

    def read_classes(self) -> list[str]:
        return [str(number) for number in range(CLASSES)]

    def native_size(self) -> int:
        return self._pictures.images.shape[1]


class PerImage(Dataset):
    """Images and labels, each image through torchvision's transforms, as torchvision's own CIFAR10 does it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, data: ImageData) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[1], padding=data.augment.crop_padding, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.preprocess.mean, data.preprocess.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image: Any = self.transform(Image.fromarray(self.images[index]))
        return image, int(self.labels[index])


def held_data(root: str | None, size: int, images: int, batch: int) -> ImageData:
    """Images held in memory, with random crops and flips: of a folder, or random ones. Raises `DataError`."""
    if root is None:
        data: ImageData = RandomImages(images, size, batch)
    else:
        crop = AugmentConfig(crop_padding=size // 8)
        data = FolderData(
            root, image_size=size, batch_size=batch, limit_train=images, augment=crop, cache_bytes=1 << 40
        )
    data.setup("fit")
    return data


def held_epochs(data: ImageData, workers: int, device: torch.device) -> dict[str, Epoch]:
    """A pass over the held images by our data module, and one by torchvision's transforms in a DataLoader."""
    source: Any = data.train_dataloader().dataset
    images, labels = source.images.permute(0, 2, 3, 1).contiguous().numpy(), source.labels.numpy()
    peer = DataLoader(
        PerImage(images, labels, data),
        data.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        drop_last=True,
        pin_memory=device.type == "cuda",
    )
    own = our_epoch(data, device)
    seen = len(peer) * data.batch_size
    return {
        "sagan_attn": Epoch(lambda: _drain(own()), seen),
        "torchvision": Epoch(lambda: _drain(_moved(peer, device)), seen),
    }


def our_epoch(data: ImageData, device: torch.device) -> Callable[[], Iterable[tuple[Tensor, Tensor]]]:
    """Passes over normalised, augmented batches on the device; held images live there."""
    loader = data.train_dataloader()
    sampler: Any = loader.sampler
    if hasattr(loader.dataset, "to"):  # held
        source: Any = loader.dataset
        loader = DataLoader(source.to(device), data.batch_size, sampler=sampler, drop_last=True, collate_fn=keep_batch)
    loader.pin_memory = device.type == "cuda" and loader.num_workers > 0
    generator = torch.Generator(device)
    epochs = 0

    def epoch() -> Iterable[tuple[Tensor, Tensor]]:
        nonlocal epochs
        sampler.set_epoch(epochs)
        epochs += 1
        mean, std = data.preprocess.mean, data.preprocess.std
        for step, (images, labels) in enumerate(loader):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            yield augment(
                images, labels, data.augment, data.num_classes, mean, std, generator.manual_seed(epochs << 32 | step)
            )

    return epoch


def write_photos(folder: Path, count: int) -> None:
    """JPEG files below `folder/train/<class>`, as large as ImageNet's and about as hard to decode."""
    width, height = PHOTO
    for number in range(count):
        coarse = torch.rand(1, 3, height // 16, width // 16)
        smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        pixels = (255 * (0.9 * smooth + 0.1 * torch.rand(3, height, width))).to(torch.uint8).permute(1, 2, 0)
        place = folder / "train" / f"{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(place / f"{number}.jpg", quality=90)


def streamed_data(root: str, size: int, batch: int, workers: int) -> FolderData:
    """Photographs decoded anew each pass. Raises `DataError`."""
    data = FolderData(root, image_size=size, batch_size=batch, val_fraction=0.0, num_workers=workers, cache_bytes=0)
    data.setup("fit")
    return data


def timm_loaders(data: FolderData, device: torch.device) -> dict[str, Any]:
    """timm's loader of the same files: with its own random resized crop and flip, and with resize and crop alone.

    The second handles each photograph as ours does before its crop and flip. Colour jitter is off in both.
    """
    from timm.data.dataset import ImageDataset
    from timm.data.loader import create_loader

    place = Path(data.root, "train")
    root = str(place if place.is_dir() and any(entry.is_dir() for entry in place.iterdir()) else data.root)
    size = data.preprocess.image_size
    common: dict[str, Any] = {
        "input_size": (3, size, size),
        "batch_size": data.batch_size,
        "is_training": True,
        "color_jitter": None,
        "interpolation": "bilinear",
        "num_workers": data.num_workers,
        "device": device,
        "pin_memory": device.type == "cuda",
    }
    return {
        "timm, random crop": create_loader(ImageDataset(root), **common),
        "timm, resize": create_loader(ImageDataset(root), no_aug=True, **common),
    }


def streamed_epochs(data: FolderData, peers: dict[str, Any], device: torch.device) -> dict[str, Epoch]:
    """A pass over the photographs by our data module, and by each of timm's loaders. Raises `ConfigError`."""
    own = our_epoch(data, device)
    size = data.batch_size
    epochs = {"sagan_attn": Epoch(lambda: _drain(own()), len(data.train_dataloader()) * size)}
    for name, loader in peers.items():
        if not len(loader):
            raise ConfigError(
                f"--photo-batch-size ({size}) exceeds the {len(loader.dataset)} photographs of {data.root}"
            )
        epochs[name] = Epoch(lambda loader=loader: _drain(loader), len(loader) * size)
    return epochs


def overlap(data: ImageData, device: torch.device, budget: Budget) -> dict[str, Any]:
    """Milliseconds a step of the data alone, of training alone, and of both together; resnet18 in bf16.

    busy: what training alone takes of the time that both together take.
    """
    epoch, steps = our_epoch(data, device), len(data.train_dataloader())
    host = build_host(HostConfig("torchvision/resnet18", small_images=True), data.num_classes).to(device)
    host = host.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(host.parameters(), lr=1e-3, momentum=0.9)
    size = data.preprocess.image_size
    task = Classification((size, size), data.num_classes, channels_last=True)
    fixed = task.batch(data.batch_size, device)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = task.loss(host, (batch[0].contiguous(memory_format=torch.channels_last), batch[1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def alone() -> None:
        for _ in range(steps):
            step(fixed)

    def together() -> None:
        for batch in epoch():
            step(batch)

    seconds = interleaved({"data": lambda: _drain(epoch()), "training": alone, "both": together}, budget, device)
    return {
        "batch": data.batch_size,
        "ms_per_step": {name: summary([1000 * s / steps for s in values]) for name, values in seconds.items()},
        "busy": ratios(seconds, "training", "both"),
    }


def _drain(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def _moved(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
    for images, labels in batches:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
