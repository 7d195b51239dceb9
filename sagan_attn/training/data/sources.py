"""Where batches come from: one tensor that holds all images, or a decoder that reads them when asked.

Both give the same uint8 batches; which one is used is only a question of memory.
"""

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sagan_attn.training.data.preprocess import Preprocess

__all__ = ["ArrayPictures", "PicturePart", "Pictures", "StreamSource", "TensorSource", "make_source"]

SMALL_PICTURE = 128 * 128  # pixels

Batch = tuple[Tensor, Tensor]  # uint8 [B, 3, S, S], int64 [B]


class Pictures(Protocol):
    """A labelled collection that can be opened one by one, from any thread or worker process."""

    @property
    def labels(self) -> Sequence[int]: ...

    def open(self, index: int) -> Image.Image: ...

    def name(self, index: int) -> str:
        """What a user knows the picture by: a relative path, or its number."""
        ...

    def content_digest(self, indices: Sequence[int]) -> bytes:
        """Changes when the pictures at `indices` change, as far as can be seen without decoding them."""
        ...


class ArrayPictures:
    """Pictures already in memory. images: uint8 [N, H, W, 3]."""

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        self.images = images
        self.labels = labels

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def name(self, index: int) -> str:
        return str(index)

    def content_digest(self, indices: Sequence[int]) -> bytes:
        return hashlib.sha256(self.images[list(indices)].tobytes()).digest()


class PicturePart:
    """The pictures at `indices`, in that order (ascending, so that a disk is read in its own order)."""

    def __init__(self, pictures: Pictures, indices: Sequence[int]) -> None:
        self.pictures = pictures
        self.indices = list(indices)
        self.labels = [int(pictures.labels[index]) for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, position: int) -> Image.Image:
        return self.pictures.open(self.indices[position])


class TensorSource(Dataset[Batch]):
    """All images decoded: uint8 [N, 3, S, S], int64 [N]. A batch is one `index_select`."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        # non_blocking: the copy does not wait for the GPU's queue (safe: the driver has read the values on
        # return)
        index = torch.tensor(indices, dtype=torch.int64).to(self.images.device, non_blocking=True)
        return self.images.index_select(0, index), self.labels.index_select(0, index)

    def to(self, device: torch.device) -> "TensorSource":
        """On `device`; itself if it is there already."""
        if self.images.device == device:
            return self
        return TensorSource(self.images.to(device), self.labels.to(device))

    def digest(self) -> bytes:
        """sha256 of pixels and labels."""
        digest = hashlib.sha256(self.images.cpu().numpy().data)
        digest.update(self.labels.cpu().numpy().data)
        return digest.digest()


class StreamSource(Dataset[Batch]):
    """Images decoded when asked for, in the DataLoader's workers."""

    def __init__(self, part: PicturePart, preprocess: Preprocess) -> None:
        self.part = part
        self.preprocess = preprocess
        self.labels = torch.tensor(part.labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Batch:
        return self.preprocess.to_uint8(self.part.open(index)), self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        images, labels = zip(*map(self.__getitem__, indices), strict=True)
        return torch.stack(images), torch.stack(labels)

    def digest(self) -> bytes:
        """sha256 of what the pictures say of themselves without being decoded, and of the labels."""
        digest = hashlib.sha256(self.part.pictures.content_digest(self.part.indices))
        digest.update(self.labels.numpy().data)
        return digest.digest()


def make_source(part: PicturePart, preprocess: Preprocess, cache_bytes: int) -> TensorSource | StreamSource:
    """Hold the part as one tensor if it fits in `cache_bytes`, else stream it."""
    if len(part) * 3 * preprocess.image_size**2 > cache_bytes:
        return StreamSource(part, preprocess)
    return TensorSource(decode_all(part, preprocess), torch.tensor(part.labels, dtype=torch.int64))


def decode_all(part: PicturePart, preprocess: Preprocess) -> Tensor:
    """uint8 [N, 3, S, S]; large pictures by as many threads as there are cores."""
    size = preprocess.image_size
    if isinstance(part.pictures, ArrayPictures) and part.pictures.images.shape[1:3] == (size, size):
        # `pixels` would hand each of them back as it is
        pixels = part.pictures.images[part.indices]
    else:
        pixels = np.empty((len(part), size, size, 3), dtype=np.uint8)
        fill = functools.partial(_decode_into, pixels, part, preprocess)
        # Decoding frees Python's lock, but a small picture is mostly Python work and threads only fight over it
        # (60,000 JPEGs of 32 x 32 on two cores: 18 s with one thread, 24 s with two).
        if len(part) and math.prod(part.open(0).size) > SMALL_PICTURE:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                list(threads.map(fill, range(len(part))))  # list(): raises here what was raised in a thread
        else:
            for position in range(len(part)):
                fill(position)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _decode_into(pixels: np.ndarray, part: PicturePart, preprocess: Preprocess, position: int) -> None:
    pixels[position] = preprocess.pixels(part.open(position))
