import numpy as np
import pytest
import torch

from sagan_attn.errors import DataError
from sagan_attn.training.data import AugmentConfig, LookupData, make_lookup
from sagan_attn.training.data.lookup import lookup_digits


@pytest.fixture(scope="module")
def pool():
    return lookup_digits(train=True)


def read_picture(image: np.ndarray, digits: dict[bytes, int]) -> tuple[int, int, int, int]:
    """(label, marker slot, target slot, digits seen), from the pixels alone. image: uint8 [3, 48, 48]."""
    markers, squares = [], []
    for slot in range(9):
        row, column = 16 * (slot // 3), 16 * (slot % 3)
        tile = image[:, row : row + 16, column : column + 16].astype(int)
        inner = tile[:, 2:14, 2:14]
        assert tile.sum() == inner.sum()  # a border of black
        colour = tuple(inner[:, 0, 0].tolist())
        if max(colour) == 255:
            assert (inner == inner[:, :1, :1]).all()
            markers.append((slot, tuple(c // 2 for c in colour)))
        elif max(colour) > 0:
            assert max(colour) == 127
            channel = colour.index(0)  # dark in this channel: the ink alone
            ink = inner[channel, 2:10, 2:10]
            squares.append((slot, colour, digits[np.round(ink * 16 / 255).astype(np.uint8).tobytes()]))
    (marker_slot, colour), = markers  # fmt: skip
    assert len({square[1] for square in squares}) == 4
    (target,) = (square for square in squares if square[1] == colour)
    return target[2], marker_slot, target[0], len(squares)


def table(digits: torch.Tensor, labels: torch.Tensor) -> dict[bytes, int]:
    return {digit.numpy().tobytes(): int(label) for digit, label in zip(digits, labels, strict=True)}


def test_the_label_is_the_digit_on_the_markers_colour(pool):
    made = make_lookup(*pool, 200, seed=3)
    assert made.images.shape == (200, 3, 48, 48)
    assert made.images.dtype == torch.uint8
    for i in range(200):
        label, marker, target, seen = read_picture(made.images[i].numpy(), table(*pool))
        assert seen == 4
        assert (label, marker, target) == (made.labels[i], made.marker_slot[i], made.target_slot[i])


def test_classes_slots_and_seeds(pool):
    made = make_lookup(*pool, 4000, seed=0)
    assert made.labels.bincount(minlength=10).min() > 320  # 400 expected
    assert made.marker_slot.bincount(minlength=9).min() > 350  # 444 expected
    assert made.target_slot.bincount(minlength=9).min() > 350
    assert not (made.marker_slot == made.target_slot).any()
    assert all(map(torch.equal, made, make_lookup(*pool, 4000, seed=0)))
    assert not torch.equal(made.images, make_lookup(*pool, 4000, seed=1).images)


def test_train_and_test_share_no_digit():
    train, test = table(*lookup_digits(True)), table(*lookup_digits(False))
    assert len(lookup_digits(True)[1]) == 1400
    assert len(lookup_digits(False)[1]) == 397
    assert not set(train) & set(test)


def test_the_data_module():
    data = LookupData(n_train=300, n_val=50, n_test=40, batch_size=16)
    data.prepare_data()
    data.setup("fit")
    assert (data.num_classes, data.in_channels, data.preprocess.image_size) == (10, 3, 48)
    assert data.augment == AugmentConfig(crop_padding=0, flip=False)
    assert data.describe()["sizes"] == {"train": 300, "val": 50}
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    slots = data.test_slots()
    assert torch.equal(images, slots.images[:16])
    assert torch.equal(labels, slots.labels[:16])
    assert read_picture(images[3].numpy(), table(*lookup_digits(False)))[1] == slots.marker_slot[3]


def test_validation_size_is_exact():
    for n_train, n_val in ((7, 3), (20_000, 2_000), (999, 1), (5, 0)):
        n = n_train + n_val
        assert round(n * LookupData(n_train=n_train, n_val=n_val).val_fraction) == n_val


def test_refusals(pool):
    with pytest.raises(DataError, match=r"n \(0\) must be a whole number of at least 1"):
        make_lookup(*pool, 0, seed=0)
    with pytest.raises(DataError, match="every class, 0 to 9"):
        make_lookup(pool[0][:3], pool[1][:3], 5, seed=0)
    with pytest.raises(DataError, match=r"n_test \(0\) must be a whole number of at least 1"):
        LookupData(n_test=0)
