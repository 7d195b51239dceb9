"""A task a small receptive field cannot solve: find the marker, then read the digit that has its colour.

Made in memory from scikit-learn's handwritten digits; nothing is downloaded.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sagan_attn.errors import DataError
from sagan_attn.training.data.augment import AugmentConfig
from sagan_attn.training.data.base import ImageData, Split
from sagan_attn.training.data.checks import require_at_least
from sagan_attn.training.data.seeds import stateless_seed
from sagan_attn.training.data.sources import ArrayPictures

__all__ = ["LookupData", "LookupSplit", "lookup_digits", "make_lookup"]

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255))
TRAIN_DIGITS = 1400  # of 1,797; the other 397 make the test images


class LookupSplit(NamedTuple):
    """images uint8 [n, 3, 48, 48]; labels, marker_slot, target_slot int64 [n].

    A slot is one of 3 x 3 squares of 16 pixels, numbered row by row: row slot // 3, column slot % 3.
    """

    images: Tensor
    labels: Tensor
    marker_slot: Tensor
    target_slot: Tensor


def make_lookup(digits: Tensor, labels: Tensor, n: int, seed: int) -> LookupSplit:
    """Draw n images from a pool of digits.

    digits: [P, 8, 8], values 0 to 16 (scikit-learn's scale); labels: int64 [P], every class 0..9 present.

    On black, four of nine slots hold a digit, in white on a 12 x 12 square of one of six colours at half
    brightness; the four colours differ. A fifth slot holds a plain 12 x 12 square, the marker, in one of
    these four colours at full brightness. The label is the digit on the square of that colour. Classes are
    drawn with equal probability.

    Raises:
        DataError: n below 1, or a class without a digit in the pool.
    """
    require_at_least("n", n, 1)
    counts = labels.bincount(minlength=10)
    if len(counts) != 10 or not counts.min():
        raise DataError(f"the digit pool must hold every class, 0 to 9; digits a class: {counts.tolist()}")
    generator = torch.Generator().manual_seed(seed)
    # a row of random numbers, sorted, gives distinct slots and distinct colours
    slots = torch.rand(n, 9, generator=generator).argsort(1)[:, :5]  # [n, 5]: four digits, then the marker
    colours = torch.rand(n, 6, generator=generator).argsort(1)[:, :4]  # [n, 4]
    classes = torch.randint(0, 10, (n, 4), generator=generator)
    # a class first, then one of its digits: they lie side by side once sorted
    by_class = labels.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    which = (torch.rand(n, 4, generator=generator) * counts[classes]).long()
    chosen = by_class[starts[classes] + which]  # [n, 4], rows of the pool
    target = torch.randint(0, 4, (n, 1), generator=generator)  # which of the four the marker points at

    # every tile that can occur, once: empty, six markers, then each digit on each colour
    tile = torch.zeros(n, 9, dtype=torch.int64)
    tile.scatter_(1, slots[:, :4], 7 + chosen * 6 + colours)
    tile.scatter_(1, slots[:, 4:], 1 + colours.gather(1, target))
    images = _tiles(digits).index_select(0, tile.flatten())  # [n*9, 3, 16, 16]
    images = images.view(n, 3, 3, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 48, 48)
    return LookupSplit(
        images,
        classes.gather(1, target).squeeze(1),
        slots[:, 4].contiguous(),
        slots.gather(1, target).squeeze(1),
    )


@functools.cache
def lookup_digits(train: bool) -> tuple[Tensor, Tensor]:
    """The digits of the training (1,400) or the test images (397): uint8 [P, 8, 8] of 0 to 16, int64 [P].

    The two never share a digit, and the choice is the same for every seed.
    """
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    pixels, classes = load_digits(return_X_y=True)  # [1797, 64], [1797]
    # RandomState's stream is frozen by numpy's policy, so the choice outlives versions
    order = np.random.RandomState(0).permutation(len(classes))
    rows = order[:TRAIN_DIGITS] if train else order[TRAIN_DIGITS:]
    return torch.from_numpy(pixels[rows].astype(np.uint8)).view(-1, 8, 8), torch.from_numpy(classes[rows]).long()


class LookupData(ImageData):
    """The lookup task as a data set: 48 x 48 RGB, classes "0" to "9", no augmentation unless asked for.

    n_train + n_val images are made from 1,400 digits and the validation part is split off them by `seed`, so
    those two share digits (not images); the n_test test images are made from 397 others. `data_seed`
    decides the images, `seed` the rest. See `ImageData` for the other options.
    """

    default_mean = (0.12, 0.12, 0.12)  # measured, rounded
    default_std = (0.27, 0.27, 0.27)

    def __init__(
        self,
        n_train: int = 20_000,
        n_val: int = 2_000,
        n_test: int = 2_000,
        data_seed: int = 0,
        batch_size: int = 128,
        seed: int = 0,
        order_seed: int | None = None,
        image_size: int | None = None,
        augment: AugmentConfig | None = None,
        cache_bytes: int = 1 << 30,
        num_workers: int = 0,
        limit_train: int | None = None,
        drop_last: bool = True,
    ) -> None:
        for name, value, least in (("n_train", n_train, 1), ("n_val", n_val, 0), ("n_test", n_test, 1)):
            require_at_least(name, value, least)
        super().__init__(
            name="lookup",
            batch_size=batch_size,
            val_fraction=n_val / (n_train + n_val),
            seed=seed,
            order_seed=order_seed,
            image_size=image_size,
            augment=augment,
            cache_bytes=cache_bytes,
            num_workers=num_workers,
            limit_train=limit_train,
            drop_last=drop_last,
        )
        self.n_fit = n_train + n_val
        self.n_test = n_test
        self.data_seed = data_seed

    def pictures(self, split: Split) -> ArrayPictures | None:
        if split == "val":
            return None
        made = self.test_slots() if split == "test" else self._make("train", self.n_fit)
        return ArrayPictures(made.images.permute(0, 2, 3, 1).numpy(), made.labels.tolist())

    def test_slots(self) -> LookupSplit:
        """The test images in the test loader's order, at 48 pixels, with the slots of marker and target:
        where attention ought to look from, and at."""
        return self._make("test", self.n_test)

    def read_classes(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def native_size(self) -> int:
        return 48

    def default_augment(self, image_size: int) -> AugmentConfig:
        return AugmentConfig(crop_padding=0, flip=False)

    def _make(self, split: Split, n: int) -> LookupSplit:
        digits, labels = lookup_digits(train=split == "train")
        return make_lookup(digits, labels, n, stateless_seed(f"lookup {split}", self.data_seed))


def _tiles(digits: Tensor) -> Tensor:
    """uint8 [1 + 6 + P*6, 3, 16, 16]: black, the six markers, digit p on colour c at 7 + p*6 + c."""
    full = torch.tensor(COLOURS, dtype=torch.int64)  # [6, 3]
    square = torch.zeros(len(digits), 6, 3, 16, 16, dtype=torch.int64)
    half = (full // 2)[:, :, None, None]  # [6, 3, 1, 1]
    square[..., 2:14, 2:14] = half
    ink = digits.long()[:, None, None]  # [P, 1, 1, 8, 8]
    square[..., 4:12, 4:12] = half + (255 - half) * ink // 16  # towards white
    markers = torch.zeros(6, 3, 16, 16, dtype=torch.int64)
    markers[..., 2:14, 2:14] = full[:, :, None, None]
    tiles = [torch.zeros(1, 3, 16, 16, dtype=torch.int64), markers, square.flatten(0, 1)]
    return torch.cat(tiles).to(torch.uint8)
