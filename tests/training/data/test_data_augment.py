import numpy as np
import pytest
import torch

from sagan_attn.errors import DataError
from sagan_attn.training.data import AugmentConfig, augment, batch_seed
from sagan_attn.training.data.augment import crop_flip, cutout_mask

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NOTHING = AugmentConfig(crop_padding=0, flip=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int = 16, size: int = 10) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator(1))


@pytest.mark.parametrize(("size", "padding"), [(10, 4), (10, 0), (5, 4), (1, 0)])
def test_crop_flip_matches_one_image_at_a_time(size, padding):
    x = images(32, size)
    top, left = torch.randint(0, 2 * padding + 1, (2, 32), generator=generator(2))
    flip = torch.rand(32, generator=generator(3)) < 0.5
    out = crop_flip(x, top, left, flip, padding)
    for i in range(32):
        padded = np.pad(x[i].numpy(), ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
        expected = padded[:, top[i] : top[i] + size, left[i] : left[i] + size]
        assert (out[i].numpy() == (expected[:, :, ::-1] if flip[i] else expected)).all()


def test_cutout_mask_matches_slices():
    rows, columns = torch.randint(0, 9, (2, 50), generator=generator(4))
    mask = cutout_mask(9, 4, rows, columns)
    for i, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        expected = torch.ones(9, 9)
        expected[max(row - 2, 0) : row + 2, max(column - 2, 0) : column + 2] = 0
        assert torch.equal(mask[i, 0], expected)


def test_nothing_asked_only_normalises():
    x, y = images(), torch.arange(16)
    out, labels = augment(x, y, NOTHING, 16, MEAN, STD, generator())
    expected = (x.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), expected, atol=1e-6)
    assert torch.equal(labels, y)


def test_statistics_of_flip_crop_and_cutout():
    x = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(4000, 3, 8, 8).contiguous()
    y = torch.zeros(4000, dtype=torch.int64)
    unit = (0.0,) * 3, (1 / 255,) * 3
    flipped, _ = augment(x, y, AugmentConfig(crop_padding=0), 2, *unit, generator())
    share = (flipped[:, 0, 0, 0].round() == 7).float().mean()
    assert abs(share - 0.5) < 0.03
    cropped, _ = augment(x, y, AugmentConfig(crop_padding=2, flip=False), 2, *unit, generator())
    offsets = cropped[:, 0, 4, 4].round().long().bincount(minlength=64).view(8, 8)[2:7, 2:7]
    assert offsets.sum() == 4000  # every crop is one of 5 x 5
    assert offsets.min() > 100  # 160 expected
    cut, _ = augment(x, y, AugmentConfig(crop_padding=0, flip=False, cutout=3), 2, *unit, generator())
    holes = (cut[:, 0].flatten(1)[:, 1:].round() == 0).sum(1)
    assert holes.max() == 9  # pixel 0 is always 0, so it is left out
    assert holes.min() >= 3
    assert len(cut.flatten(1).unique(dim=0)) == 64  # all centres


def test_augment_depends_on_the_generator_alone():
    config = AugmentConfig(crop_padding=2, cutout=3, mixup=0.4, cutmix=1.0)
    x, y = images(), torch.arange(16)
    first = augment(x, y, config, 16, MEAN, STD, generator(5))
    torch.rand(3, generator=generator())
    with torch.random.fork_rng():
        torch.manual_seed(99)
        second = augment(x, y, config, 16, MEAN, STD, generator(5))
    other = augment(x, y, config, 16, MEAN, STD, generator(6))
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("option", [{"mixup": 0.5}, {"cutmix": 0.5}, {"mixup": 0.5, "cutmix": 0.5}])
def test_mixed_labels_are_distributions(option):
    config = AugmentConfig(crop_padding=0, flip=False, **option)
    out, labels = augment(images(), torch.arange(16), config, 20, MEAN, STD, generator())
    assert labels.shape == (16, 20)
    assert labels.dtype == torch.float32
    assert torch.allclose(labels.sum(1), torch.ones(16))
    assert not torch.equal(out, augment(images(), torch.arange(16), NOTHING, 20, MEAN, STD, generator())[0])


def test_both_mixes_take_turns():
    config = AugmentConfig(crop_padding=0, flip=False, mixup=1.0, cutmix=1.0)
    x = images()
    pure = augment(x, torch.arange(16), NOTHING, 16, MEAN, STD, generator())[0]
    kept = []
    for seed in range(20):
        out, _ = augment(x, torch.arange(16), config, 16, MEAN, STD, generator(seed))
        # CutMix only moves pixels, MixUp makes new values
        kept.append(bool(((out == pure) | (out == pure.roll(1, 0))).all()))
    assert set(kept) == {True, False}


def test_empty_batch():
    config = AugmentConfig(crop_padding=2, cutout=3)
    out, labels = augment(images(0), torch.zeros(0, dtype=torch.int64), config, 3, MEAN, STD, generator())
    assert out.shape == (0, 3, 10, 10)
    assert labels.shape == (0,)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"crop_padding": -1}, r"crop_padding \(-1\) must be a whole number of at least 0"),
        ({"cutout": 2.5}, r"cutout \(2.5\) must be a whole number"),
        ({"mixup": -0.1}, r"mixup \(-0.1\) must be a number of at least 0"),
        ({"cutmix": float("nan")}, r"cutmix \(nan\) must be a number"),
        ({"flip": 1}, r"flip \(1\) must be true or false"),
    ],
)
def test_bad_options_are_named(option, message):
    with pytest.raises(DataError, match=message):
        AugmentConfig(**option)


def test_padding_must_leave_a_reflection():
    with pytest.raises(DataError, match=r"crop_padding \(10\) must be smaller than the image size \(10\)"):
        augment(images(), torch.arange(16), AugmentConfig(crop_padding=10), 16, MEAN, STD, generator())


def test_images_must_be_uint8_squares():
    with pytest.raises(DataError, match=r"images must be uint8 \[B, C, S, S\], got torch.float32"):
        augment(images().float(), torch.arange(16), NOTHING, 16, MEAN, STD, generator())


def test_batch_seeds_are_pure_and_distinct():
    seeds = {batch_seed(s, e, b, r) for s in range(4) for e in range(4) for b in range(20) for r in range(2)}
    assert len(seeds) == 4 * 4 * 20 * 2
    assert batch_seed(1, 2, 3, 0) == batch_seed(1, 2, 3, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)
