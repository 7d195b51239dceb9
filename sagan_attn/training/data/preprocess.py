"""From a picture to the network's input: what training did, in the form a user of the trained model
applies."""

import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from sagan_attn.errors import DataError
from sagan_attn.training.data.checks import require_at_least

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocess", "image_file", "open_image", "to_rgb"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# PIL would hand a file to whichever of its readers knows its first bytes, whatever its name: one of them, for
# PostScript, runs another program on the file.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# what PIL's decoders raise on damaged files: OSError (also truncated and unidentified), SyntaxError (PNG chunks),
# ValueError (bad headers), struct.error (EXIF)
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error)
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side to `image_size / crop_pct`, centre-crop to `image_size`, scale to [0, 1],
    normalise.

    An image that is already `image_size` square is taken as cropped: its pixels come back bit for bit,
    whatever `crop_pct`. `mean` and `std` are per RGB channel on the [0, 1] scale.

    Raises:
        DataError: a field is out of range; the message names it.
    """

    image_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        require_at_least("image_size", self.image_size, 1)
        for field in ("mean", "std"):
            value = getattr(self, field)
            if not isinstance(value, (tuple, list)) or len(value) != 3 or not all(map(_is_number, value)):
                raise DataError(f"{field} ({value!r}) must be three numbers, one per RGB channel")
            object.__setattr__(self, field, tuple(map(float, value)))  # JSON and YAML hand over lists
        if min(self.std) <= 0:
            raise DataError(f"std ({self.std}) must be positive")
        if self.interpolation not in _INTERPOLATIONS:
            raise DataError(f"interpolation ({self.interpolation!r}) must be one of {_INTERPOLATIONS}")
        if not _is_number(self.crop_pct) or not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct ({self.crop_pct!r}) must lie in (0, 1]")

    def to_uint8(self, image: Image.Image) -> Tensor:
        """The picture as uint8 RGB [3, S, S]; see `pixels`."""
        return torch.from_numpy(self.pixels(image)).permute(2, 0, 1).contiguous()

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The picture as uint8 RGB [S, S, 3]: EXIF rotation applied, converted to RGB, resized and cropped.

        Transparency is dropped, not composited: the colour stored under a transparent pixel is what is seen.
        16-bit grey keeps its upper 8 bits.

        Raises:
            DataError: a floating-point image, which has no agreed range; damaged EXIF data, which say how it is turned.
        """
        picture: Any = to_rgb(image)  # Any: torchvision declares tensors only
        size = self.image_size
        if picture.size != (size, size):
            mode = InterpolationMode(self.interpolation)
            picture = F.resize(picture, [round(size / self.crop_pct)], interpolation=mode)  # the shorter side
            picture = F.center_crop(picture, [size, size])
        return np.array(picture)

    def normalize(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 [..., 3, S, S] to `dtype`, computed in float32: (x / 255 - mean) / std."""
        return normalize(images, self.mean, self.std).to(dtype)

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """The network's input for one picture or file: float32 [3, S, S].

        Raises:
            DataError: the file is missing or not a readable image; the message names it.
        """
        return self.normalize(self.to_uint8(image if isinstance(image, Image.Image) else open_image(image)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; `from_dict` is the inverse."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocess":
        """Rebuild from `to_dict`'s answer.

        Raises:
            DataError: an unknown or missing key, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise DataError(f"unknown preprocess keys {unknown}; known: {known}")
        if missing := [key for key in known if key not in values]:
            raise DataError(f"preprocess keys {missing} are missing; found: {sorted(values)}")
        return cls(**values)

    @classmethod
    def from_timm(cls, model: nn.Module, image_size: int | None = None) -> "Preprocess":
        """What a timm model's pretrained weights were evaluated with; `image_size` overrides the size alone.

        Raises:
            DataError: the model wants something this class does not do (other than 3 channels, an input that
            is not
                square, a crop mode other than "center").
        """
        from timm.data.config import resolve_data_config  # only users of timm models need timm

        config = resolve_data_config({}, model=model)
        channels, height, width = config["input_size"]
        if channels != 3:
            raise DataError(f"the timm model takes {channels} channels; Preprocess makes RGB images (3)")
        if height != width and image_size is None:
            raise DataError(f"the timm model wants {height} x {width} images; pass image_size, a square one")
        if config["crop_mode"] != "center":
            raise DataError(
                f'the timm model wants crop_mode {config["crop_mode"]!r}; Preprocess only does "center": '
                "build a Preprocess with the values you want"
            )
        return cls(
            image_size=height if image_size is None else image_size,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
        )


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [..., C, H, W] to float32: (x / 255 - mean) / std, as one multiplication and one addition per
    value."""
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    # non_blocking: the copy does not wait for the GPU's queue (safe: the driver has read the values on
    # return)
    factors = torch.tensor([scale, shift]).to(images.device, non_blocking=True)
    factors = factors[..., None, None]  # [2, C, 1, 1]
    return images.float().mul_(factors[0]).add_(factors[1])


def open_image(path: str | Path) -> Image.Image:
    """The decoded picture of a file.

    Raises:
        DataError: the file is missing, truncated, not an image, or too large to be safe; the message names
        it.
    """
    with image_file(path) as image:
        image.load()
        return image


@contextmanager
def image_file(path: str | Path) -> Iterator[Image.Image]:
    """An image file opened but not yet decoded.

    Raises:
        DataError: as `open_image`, for whatever goes wrong inside too.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"cannot read the image {path}: it is no plain file; remove it")
        with Image.open(path, formats=FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS is not None and math.prod(image.size) > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(
                    f"{image.size[0]:,} x {image.size[1]:,} pixels are more than the {Image.MAX_IMAGE_PIXELS:,} that "
                    "PIL.Image.MAX_IMAGE_PIXELS allows"
                )
            yield image
    except BOMBS as error:
        raise DataError(f"the image {path} is too large to be safe: {error}; scale or remove it") from error
    except UNREADABLE as error:
        raise DataError(f"cannot read the image {path}: {error}; replace or remove the file") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, turned as its EXIF data say.

    Raises:
        DataError: a floating-point image; damaged EXIF data.
    """
    try:
        image = ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        name = getattr(image, "filename", "")
        raise DataError(f"cannot read the EXIF data of the image {name}: {error}; replace or remove it") from error
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise DataError("cannot convert an image of mode F (floating point) to RGB: its range is unknown")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if "transparency" in image.info:  # a palette with alpha: the direct conversion warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
