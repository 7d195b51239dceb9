"""Tiny image folders, made on the spot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _save(path: Path, seed: int, size: tuple[int, int] = (12, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def save_image() -> Callable[..., None]:
    """save_image(path, seed, size=(12, 12)): random RGB pixels, lossless if the name says so."""
    return _save


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    """train/{cat,dog} with 20 images each and test/{cat,dog} with 5 each, 12 x 12."""
    root = tmp_path / "pets"
    for part, count in (("train", 20), ("test", 5)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                _save(root / part / name / f"{i:03}.png", seed=1000 * label + i + 500 * (part == "test"))
    return root


@pytest.fixture(autouse=True)
def global_rng_untouched():
    """Nothing in the data path may read or move a global generator."""
    import random

    import torch

    torch.manual_seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    yield
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()
