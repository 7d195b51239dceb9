import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets import VisionDataset

from sagan_attn.errors import DataError
from sagan_attn.training.data import AugmentConfig, CIFARData, TorchvisionData


class Letters(VisionDataset):
    """A stand-in for a torchvision data set, whose pictures are made in memory."""

    labels_as: str = "labels"

    def __init__(self, root, split="train", size=10, item=Image.fromarray, bad_label=None):
        super().__init__(root)
        if split not in ("train", "test"):
            raise ValueError(f"unknown split {split}")
        rng = np.random.default_rng(split == "train")
        self.pictures = rng.integers(0, 256, (30, size, size, 3), dtype=np.uint8)
        self.item = item
        self.own = np.arange(30) % 5
        if bad_label is not None:
            self.own = [bad_label] * 30
        if self.labels_as:
            setattr(self, self.labels_as, self.own)

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return self.item(self.pictures[index]), self.own[index]


class HiddenLabels(Letters):
    labels_as = ""


class NoSplit(VisionDataset):
    def __init__(self, root):
        super().__init__(root)


HERE = __name__


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """Ten-image files in CIFAR-10's own format, and torchvision told to accept them."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        entry = {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    return tmp_path


def test_cifar(cifar_root):
    data = CIFARData(root=str(cifar_root), batch_size=5, cache_bytes=1 << 20)
    data.prepare_data()
    data.setup()
    assert data.describe()["sizes"] == {"train": 45, "val": 5, "test": 10}
    assert data.classes == list("abcdefghij")
    assert data.augment == AugmentConfig(crop_padding=4, flip=True)
    assert data.preprocess.mean == (0.4914, 0.4822, 0.4465)
    images, labels = next(iter(data.test_dataloader()))
    raw = pickle.loads((cifar_root / "cifar-10-batches-py/test_batch").read_bytes())["data"]
    assert torch.equal(images, torch.from_numpy(raw[:5]).view(5, 3, 32, 32))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    streamed = CIFARData(root=str(cifar_root), batch_size=5, cache_bytes=0)
    streamed.setup("test")
    assert torch.equal(next(iter(streamed.test_dataloader()))[0], images)
    small = CIFARData(root=str(cifar_root), image_size=16)
    small.setup("fit")
    assert small._sources["train"].images.shape == (45, 3, 16, 16)


def test_cifar_names():
    assert CIFARData("cifar100").default_mean == (0.5071, 0.4865, 0.4409)
    with pytest.raises(DataError, match=r"name \('cifar11'\) must be cifar10 or cifar100"):
        CIFARData("cifar11")  # type: ignore[arg-type]


def no_network(*args, **kwargs):
    raise URLError("Temporary failure in name resolution")


@pytest.mark.parametrize(
    ("module", "data"),
    [
        ("cifar", lambda root: CIFARData(root=root)),
        ("svhn", lambda root: TorchvisionData("torchvision.datasets.SVHN", root=root)),
    ],
)
def test_without_a_network_the_message_says_where_the_files_go(tmp_path, monkeypatch, module, data):
    loader = getattr(torchvision.datasets, module)
    name = "download_url" if module == "svhn" else "download_and_extract_archive"
    monkeypatch.setattr(loader, name, no_network)
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", no_network)
    message = r"could not be downloaded \(URLError.*expected in .*files.*copy them there"
    with pytest.raises(DataError, match=message):
        data(str(tmp_path / "files")).prepare_data()
    with pytest.raises(DataError, match=r"was not found \(RuntimeError.*expected in .*files"):
        data(str(tmp_path / "files")).setup("fit")


@pytest.mark.parametrize("name", ["Letters", "HiddenLabels"])
def test_any_data_set(name):
    data = TorchvisionData(f"{HERE}.{name}", val_fraction=0.2, batch_size=8)
    data.prepare_data()
    data.setup("test")
    assert data.classes == list("01234")
    assert data.preprocess.image_size == 10
    assert not data.augment.flip
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (8, 3, 10, 10)
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    data.setup("fit")
    assert data.describe()["sizes"] == {"test": 30, "train": 24, "val": 6}


def test_statistics_and_arguments_can_be_given():
    data = TorchvisionData(
        f"{HERE}.Letters", mean=(0.1, 0.2, 0.3), std=(1, 1, 1),
        train_args={"split": "train", "size": 20}, test_args={"split": "test", "size": 30},
    )  # fmt: skip
    data.setup()
    assert data.preprocess.mean == (0.1, 0.2, 0.3)
    assert data._sources["test"].images.shape == (30, 3, 20, 20)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("SVHN", "must be the full path of a class"),
        ("torchvision.datasets.SVNH", "cannot be imported .*no attribute 'SVNH'"),
        ("no_such_module.X", "cannot be imported .*no_such_module"),
        ("os.system", "is not a torchvision VisionDataset"),
        (f"{HERE}.NoSplit", "NoSplit has no `train` and no `split` argument: give train_args and test_args"),
    ],
)
def test_class_paths_are_checked(path, message):
    with pytest.raises(DataError, match=message):
        TorchvisionData(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "tarin"}, "Letters refuses the arguments .*tarin"),
        ({"colour": 3}, "Letters refuses the arguments .*colour"),
        ({"item": np.asarray}, "item 0 of .* is a ndarray, not a PIL image"),
        ({"bad_label": 0.5}, "label 0 of .* is 0.5, not a class number"),
        ({"bad_label": -1}, "label 0 of .* is -1, not a class number"),
    ],
)
def test_data_sets_that_do_not_fit(arguments, message):
    data = TorchvisionData(f"{HERE}.Letters", train_args=arguments, val_fraction=0.5)
    with pytest.raises(DataError, match=message):
        data.setup("fit")


def test_a_label_beyond_the_classes():
    data = TorchvisionData(f"{HERE}.Letters", test_args={"split": "test", "bad_label": 5})
    with pytest.raises(DataError, match="label 5 among its test images but only 5 classes"):
        data.setup("test")
