import itertools
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image

from sagan_attn.errors import DataError
from sagan_attn.training.data import FolderData, Preprocess


def ready(root, stage=None, **options) -> FolderData:
    data = FolderData(str(root), **({"batch_size": 4} | options))
    data.prepare_data()
    data.setup(stage)
    return data


def read_all(data: FolderData) -> None:
    for _ in itertools.chain(data.train_dataloader(), data.val_dataloader()):
        pass


def test_split_layout(split_folder):
    data = ready(split_folder)
    assert data.classes == ["cat", "dog"]
    assert data.num_classes == 2
    assert data.describe()["sizes"] == {"train": 36, "val": 4, "test": 10}
    assert data.preprocess == Preprocess(12)
    images, labels = next(iter(data.test_dataloader()))
    with Image.open(split_folder / "test/cat/001.png") as image:
        assert torch.equal(images[1], Preprocess(12).to_uint8(image))
    assert labels.tolist() == [0, 0, 0, 0]


def test_own_validation_folder(split_folder):
    shutil.copytree(split_folder / "test", split_folder / "val")
    data = ready(split_folder, "fit", limit_train=7)
    assert data.describe()["sizes"] == {"train": 7, "val": 10}


def test_class_layout_splits_off_the_same_test_part_for_every_seed(split_folder):
    root = split_folder / "train"
    first, second = ready(root, seed=0), ready(root, seed=1)
    assert first.describe()["sizes"] == {"train": 28, "val": 4, "test": 8}
    assert first.fingerprint("test") == second.fingerprint("test")
    assert first.fingerprint() != second.fingerprint()
    everything = torch.cat([source.images.flatten(1) for source in first._sources.values()])
    assert len(everything.unique(dim=0)) == 40


def test_nested_hidden_and_other_files(split_folder, save_image):
    save_image(split_folder / "train/cat/deep/er/x.PNG", 5)
    save_image(split_folder / "train/cat/.hidden.png", 6)
    save_image(split_folder / "train/cat/.cache/y.png", 7)
    save_image(split_folder / ".thumbnails/z.png", 8)
    (split_folder / "train/dog/notes.txt").write_text("no image")
    assert sum(ready(split_folder, "fit").describe()["sizes"].values()) == 41


def test_train_may_be_the_name_of_a_class(tmp_path, save_image):
    for name in ("bus", "train"):
        for i in range(10):
            save_image(tmp_path / "vehicles" / name / f"{i}.png", i)
    assert ready(tmp_path / "vehicles").classes == ["bus", "train"]


def test_mixed_sizes_need_an_image_size(split_folder, save_image):
    save_image(split_folder / "train/cat/wide.png", 1, size=(20, 10))
    with pytest.raises(DataError, match=r"not squares of one size \(from \(12, 12\) to \(20, 10\).*give image_size"):
        ready(split_folder)
    assert ready(split_folder, image_size=8)._sources["train"].images.shape == (37, 3, 8, 8)
    data = FolderData(str(split_folder))
    data.use_preprocess(Preprocess(6))
    data.setup("fit")
    assert data.preprocess.image_size == 6


def test_one_size_that_is_no_square(tmp_path, save_image):
    for number in range(3):
        save_image(tmp_path / f"a/{number}.png", 0, size=(20, 10))
    with pytest.raises(DataError, match="all 20 x 10"):
        ready(tmp_path)


@pytest.mark.parametrize("size", [(12, 12), (150, 150)])  # decoded by one thread, and by several
def test_truncated_images_are_named(split_folder, save_image, size):
    for path in sorted(split_folder.rglob("*.png")):
        save_image(path, 1, size)
    path = split_folder / "train/dog/011.png"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cannot read the image .*train/dog/011.png"):
        ready(split_folder, val_fraction=0)
    data = ready(split_folder, val_fraction=0, cache_bytes=0)  # streamed: only when it is decoded
    with pytest.raises(DataError, match=r"cannot read the image .*train/dog/011.png"):
        list(data.train_dataloader())


def test_unreadable_headers_are_named(split_folder):
    (split_folder / "train/dog/011.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cannot read the image .*train/dog/011.png"):
        ready(split_folder)


def empty_class(root):
    (root / "train/emu").mkdir()
    (root / "test/emu").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "the image folder .*pets.* does not exist: check root"),
        (empty_class, "the class folder .*emu holds no images .*fill or remove"),
        (lambda root: (root / "train/cat").rename(root / "train/cow"), r"differ: only in train \['cow'\]"),
        (lambda root: shutil.rmtree(root / "train"), r"holds \['test'\] but no train folder"),
        (lambda root: shutil.rmtree(root / "test"), r"test is missing: .* holds \['train'\]; add the folder"),
        (lambda root: (root / "emu").mkdir(), r"both splits \['test', 'train'\] and other folders \['emu'\]"),
        (lambda root: [shutil.rmtree(p) for p in root.glob("train/*")], "train holds no class folders"),
        (lambda root: [shutil.rmtree(p) for p in root.glob("*")], "pets holds no class folders"),
    ],
)
def test_each_wrong_folder_has_its_message(split_folder, damage, message):
    damage(split_folder)
    with pytest.raises(DataError, match=message):
        ready(split_folder)


def test_fractions_that_leave_nothing(split_folder):
    with pytest.raises(DataError, match=r"test_fraction \(1.0\) must lie in \(0, 1\)"):
        FolderData(str(split_folder), test_fraction=1.0)
    with pytest.raises(DataError, match=r"limit_train \(37\) exceeds the 36 training images"):
        ready(split_folder, limit_train=37)


def test_the_streamed_fingerprint_sees_names_and_sizes(split_folder, save_image):
    before = ready(split_folder, cache_bytes=0).fingerprint()
    assert ready(split_folder, cache_bytes=0).fingerprint() == before
    save_image(split_folder / "train/dog/011.png", 1, (12, 13))
    assert ready(split_folder, cache_bytes=0, image_size=12).fingerprint() != before


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_unreadable_files_are_refused_or_left_out(split_folder, cache_bytes):
    broken = split_folder / "train/cat/003.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    options = {"cache_bytes": cache_bytes, "drop_last": False}
    with pytest.raises(DataError, match=r"cannot read the image .*003.png.*data.unreadable: skip"):
        read_all(ready(split_folder, **options))
    with pytest.warns(UserWarning, match=r"left out 1 files that cannot be read: \S*train/cat/003.png$"):
        data = ready(split_folder, unreadable="skip", **options)
    assert data.describe()["sizes"] == {"train": 35, "val": 4, "test": 10}
    assert data.describe()["left_out"] == [str(broken)]
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 35
    broken.unlink()
    without = ready(split_folder, unreadable="skip", **options)
    assert without.fingerprint() == data.fingerprint()
    assert without.describe()["left_out"] == []


def test_a_class_of_unreadable_files_alone_is_refused(split_folder):
    for file in (split_folder / "train/cat").iterdir():
        file.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="left out 20 files .*, and 10 more"),
        pytest.raises(DataError, match=r"no image in .*train/cat can be read"),
    ):
        ready(split_folder, unreadable="skip")


def test_unreadable_is_one_of_two_words(split_folder):
    with pytest.raises(DataError, match=r"unreadable \('drop'\) must be refuse or skip"):
        FolderData(str(split_folder), unreadable="drop")  # type: ignore[arg-type]


def make_classes(root, save_image, sizes):
    for label, size in enumerate(sizes):
        for i in range(size):
            save_image(root / f"c{label:02}" / f"{i}.png", 100 * label + i)
    return root


def counts(data, split):
    found = Counter(data._sources[split].labels.tolist())
    return [found[label] for label in range(data.num_classes)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_class_gives_its_share(tmp_path, save_image, seed):
    root = make_classes(tmp_path / "pets", save_image, [24] * 8 + [6] * 8 + [3, 4, 5])
    data = ready(root, seed=seed)
    assert counts(data, "test") == [5] * 8 + [1] * 8 + [1, 1, 1]
    assert counts(data, "val") == [2] * 8 + [1] * 8 + [1, 1, 1]
    assert counts(data, "train") == [17] * 8 + [4] * 8 + [1, 2, 3]
    assert data.fingerprint() == ready(root, seed=seed, order_seed=9).fingerprint()
    assert data.fingerprint() != ready(root, seed=seed + 1).fingerprint()
    assert data.fingerprint("test") == ready(root, seed=seed + 1, val_fraction=0).fingerprint("test")
    everything = torch.cat([source.images.flatten(1) for source in data._sources.values()])
    assert len(everything.unique(dim=0)) == 8 * 24 + 8 * 6 + 12
    most = ready(root, test_fraction=0.9, val_fraction=0.9)
    assert min(counts(most, "train") + counts(most, "val") + counts(most, "test")) == 1


def test_the_validation_part_of_a_training_folder_is_of_all_classes(split_folder, save_image):
    make_classes(split_folder / "train", save_image, [2, 7, 30])
    make_classes(split_folder / "test", save_image, [1, 1, 1])
    data = ready(split_folder)
    assert counts(data, "val") == [1, 1, 3, 2, 2]
    assert counts(data, "train") == [1, 6, 27, 18, 18]


def test_small_classes_train_first_and_are_named(tmp_path, save_image):
    root = make_classes(tmp_path / "pets", save_image, [1, 2, 3])
    with pytest.warns(
        UserWarning, match=r"too few images for all parts \(train, test, val, .*\): c00 \(1\), c01 \(2\)$"
    ) as said:
        data = ready(root, drop_last=False)
    assert len(said) == 1
    assert [counts(data, split) for split in ("train", "test", "val")] == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    with pytest.warns(UserWarning, match=r"all parts \(train, test, .*\): c00 \(1\)$"):
        ready(root, val_fraction=0)


def test_classes_of_one_image_leave_nothing(tmp_path, save_image):
    root = make_classes(tmp_path / "pets", save_image, [1, 1])
    message = r"test_fraction .* of the 2 images in .* leaves 0 to test on: no class has a second image"
    with pytest.raises(DataError, match=message):
        ready(root)
    (tmp_path / "split").mkdir()
    shutil.copytree(root, tmp_path / "split/train")
    shutil.copytree(root, tmp_path / "split/test")
    message = r"val_fraction .* of 2 training images leaves 2 to train on and 0"
    with pytest.warns(UserWarning, match=r"\(train, val, "), pytest.raises(DataError, match=message):
        ready(tmp_path / "split")
