import json

import jsonargparse
import lightning as L
import pytest
import torch
from torch import nn

from sagan_attn.errors import DataError
from sagan_attn.training.data import (
    AugmentConfig,
    CIFARData,
    FolderData,
    ImageData,
    LookupData,
    Preprocess,
    TorchvisionData,
    augment,
    batch_seed,
)
from sagan_attn.training.data.seeds import stateless_seed

pytestmark = [
    # a held set needs no workers, whatever Lightning advises
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning uses what torch has deprecated
]


def lookup(**options) -> LookupData:
    return LookupData(**({"n_train": 48, "n_val": 8, "n_test": 16, "batch_size": 8} | options))


class Recorder(L.LightningModule):
    """Learns a little, and writes down every training batch as the network sees it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 10))
        self.seen: list[tuple[int, int, torch.Tensor]] = []
        self.evaluated: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append((self.current_epoch, batch_idx, images.detach().clone()))
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(batch[0].clone())

    def test_step(self, batch, batch_idx):
        self.evaluated.append(batch[0].clone())

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def trainer(path, **options) -> L.Trainer:
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 1, "max_epochs": 1,
    }  # fmt: skip
    return L.Trainer(default_root_dir=str(path), **(quiet | options))


@pytest.fixture
def global_rng_untouched():
    """The trainer and the modules of these tests may draw; tests of the loaders ask for the check themselves."""


@pytest.fixture
def guarded():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("guarded")
def test_setup_is_lazy_and_happens_once(monkeypatch):
    data = lookup()
    asked = []
    original = LookupData.pictures
    monkeypatch.setattr(LookupData, "pictures", lambda self, split: asked.append(split) or original(self, split))
    data.prepare_data()
    data.setup("fit")
    data.setup("validate")
    assert "test" not in asked
    assert asked.count("train") == 1
    data.setup("test")
    data.setup("predict")
    data.setup()
    assert asked.count("test") == 1
    assert asked.count("train") == 1


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_attributes_after_setup(stage):
    data = lookup()
    data.setup(stage)
    assert data.num_classes == len(data.classes) == 10
    assert data.in_channels == 3
    assert data.preprocess.image_size == 48
    assert json.loads(json.dumps(data.describe()))["augment"]["cutout"] == 0


@pytest.mark.usefixtures("guarded")
def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(1, generator=torch.Generator().manual_seed(seed + 10))
        data = lookup(seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        assert sum(len(labels) for _, labels in loader) == 48
        return list(loader.sampler)

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(48))
    orders = {tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9  # no seed's epoch repeats another's


@pytest.mark.usefixtures("guarded")
def test_order_seed_decides_the_order_and_nothing_else():
    def order(epoch: int, **seeds: int | None) -> list[int]:
        data = lookup(limit_train=30, **seeds)
        data.setup("fit")
        parts.append([data._sources[split].images for split in ("train", "val")])
        assert data.describe()["order_seed"] == data.order_seed
        sampler = data.train_dataloader().sampler
        sampler.set_epoch(epoch)
        return list(sampler)

    def expected(seed: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(stateless_seed("order", seed) + epoch)
        return torch.randperm(30, generator=generator).tolist()

    parts: list[list[torch.Tensor]] = []
    for epoch in (0, 1):
        assert order(epoch) == order(epoch, order_seed=None) == order(epoch, order_seed=0) == expected(0, epoch)
        assert order(epoch, order_seed=7) == expected(7, epoch)
    for split in zip(*parts, strict=True):
        assert all(torch.equal(one, split[0]) for one in split)
    assert order(0, seed=3) == order(0, seed=0, order_seed=3)
    assert not torch.equal(parts[-1][1], parts[-2][1])  # but other images to validate on


@pytest.mark.parametrize("data_class", [CIFARData, TorchvisionData, FolderData, LookupData])
def test_every_data_set_has_an_order_seed(data_class, tmp_path):
    named = {TorchvisionData: {"dataset": "torchvision.datasets.SVHN"}, FolderData: {"root": str(tmp_path)}}
    assert data_class(**named.get(data_class, {}), seed=2).order_seed == 2
    assert data_class(**named.get(data_class, {}), seed=2, order_seed=0).order_seed == 0


@pytest.mark.usefixtures("guarded")
def test_the_validation_part_is_disjoint_and_seeded(split_folder):
    def parts(**options) -> dict[str, torch.Tensor]:
        data = FolderData(str(split_folder), val_fraction=0.25, **options)
        data.setup("fit")
        return {name: source.images.flatten(1) for name, source in data._sources.items()}

    first = parts()
    assert len(torch.cat([first["train"], first["val"]]).unique(dim=0)) == 40
    assert len(first["val"]) == 10
    assert torch.equal(parts()["val"], first["val"])
    assert not torch.equal(parts(seed=1)["val"], first["val"])
    assert torch.equal(parts(limit_train=5)["val"], first["val"])


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("workers", [0, 1])
def test_cached_and_streamed_batches_are_identical(split_folder, save_image, workers):
    save_image(split_folder / "train/cat/wide.png", 1, size=(31, 17))

    def batches(**options) -> list[torch.Tensor]:
        data = FolderData(str(split_folder), batch_size=7, image_size=16, **options)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)
        return [
            tensor for part in (loader, data.val_dataloader(), data.test_dataloader()) for b in part for tensor in b
        ]

    cached, streamed = batches(), batches(cache_bytes=0, num_workers=workers)
    assert len(cached) == len(streamed)
    assert all(map(torch.equal, cached, streamed))
    assert cached[0].dtype == torch.uint8
    assert cached[1].dtype == torch.int64


def test_last_batches():
    data = lookup(batch_size=10, n_val=12, drop_last=False)
    data.setup()
    assert [len(labels) for _, labels in data.train_dataloader()] == [10, 10, 10, 10, 8]
    assert [len(labels) for _, labels in data.val_dataloader()] == [10, 2]
    assert [len(labels) for _, labels in data.predict_dataloader()] == [10, 6]
    data.drop_last = True
    assert len(data.train_dataloader()) == 4
    data.batch_size = 49
    with pytest.raises(DataError, match=r"batch_size \(49\) exceeds the 48 training images"):
        data.train_dataloader()


def test_a_pretrained_models_preprocess():
    p = Preprocess(24, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bicubic")
    data = lookup()
    data.use_preprocess(p)
    data.setup("fit")
    assert data.preprocess == p
    explicit = lookup(image_size=32)
    explicit.use_preprocess(p)
    explicit.setup("fit")
    assert explicit.preprocess == Preprocess(32, p.mean, p.std, "bicubic")
    late = lookup()
    late.setup("fit")
    before = late._sources["train"]
    late.use_preprocess(Preprocess(48, p.mean, p.std))
    assert late._sources["train"] is before  # the same pixels
    late.use_preprocess(p)
    assert late._sources["train"].images.shape[2:] == (24, 24)
    assert late.describe()["sizes"] == {"train": 48, "val": 8}
    images, _ = late.on_after_batch_transfer(next(iter(late.train_dataloader())), 0)
    assert torch.equal(images, p.normalize(next(iter(late.train_dataloader()))[0]))


def test_fingerprints():
    base = lookup().fingerprint()
    assert lookup().fingerprint() == base
    assert len({base, *(lookup(**o).fingerprint() for o in ({"seed": 1}, {"data_seed": 1}, {"n_val": 7}))}) == 4
    assert lookup(seed=1).fingerprint("test") == lookup().fingerprint("test")
    assert lookup(cache_bytes=0).fingerprint() == lookup(cache_bytes=0).fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size \(0\) must be a whole number of at least 1"),
        ({"num_workers": -1}, r"num_workers \(-1\)"),
        ({"cache_bytes": -1}, r"cache_bytes \(-1\)"),
        ({"limit_train": 0}, r"limit_train \(0\)"),
        ({"image_size": 0}, r"image_size \(0\)"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(DataError, match=message):
        lookup(**options)
    with pytest.raises(DataError, match=r"val_fraction \(1.0\) must lie in \[0, 1\)"):
        FolderData("x", val_fraction=1.0)


def test_wrong_use_is_named():
    with pytest.raises(DataError, match=r'call setup\("fit"\) first'):
        lookup().train_dataloader()
    with pytest.raises(DataError, match=r'call setup\("test"\) first'):
        lookup().test_dataloader()
    with pytest.raises(DataError, match=r"stage \('train'\) must be fit"):
        lookup().setup("train")
    with pytest.raises(DataError, match=r"crop_padding \(48\) must be smaller"):
        lookup(augment=AugmentConfig(crop_padding=48)).setup("fit")


def parse(*arguments: str) -> ImageData:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data")
    return parser.instantiate(parser.parse_args(list(arguments))).data


def test_jsonargparse_builds_it_and_refuses_unknown_keys():
    path = "sagan_attn.training.data.LookupData"
    data = parse(f"--data={path}", "--data.n_train=30", "--data.augment.cutout=4", "--data.augment.flip=false")
    assert isinstance(data, LookupData)
    assert data._asked_augment == AugmentConfig(crop_padding=4, flip=False, cutout=4)
    with pytest.raises(jsonargparse.ArgumentError, match="n_trian"):
        parse(f"--data={path}", "--data.n_trian=30")
    with pytest.raises(jsonargparse.ArgumentError, match="cutuot"):
        parse(f"--data={path}", "--data.augment.cutuot=4")
    mean = parse("--data=sagan_attn.training.data.FolderData", "--data.root=x", "--data.mean=[0.1, 0.2, 0.3]")
    assert mean._asked["mean"] == (0.1, 0.2, 0.3)


CROPS = AugmentConfig(crop_padding=4, cutout=6, mixup=0.2)


@pytest.mark.parametrize("seeds", [{}, {"seed": 5}, {"order_seed": 5}], ids=str)
def test_a_run_sees_what_seed_epoch_and_batch_say(tmp_path, seeds):
    model, data = Recorder(), lookup(augment=CROPS, **seeds)
    trainer(tmp_path, max_epochs=2, limit_train_batches=3).fit(model, data)
    assert [(epoch, i) for epoch, i, _ in model.seen] == [(e, i) for e in range(2) for i in range(3)]
    loader, p = lookup(augment=CROPS, **seeds), data.preprocess
    loader.setup("fit")
    loader = loader.train_dataloader()
    for epoch, i, seen in model.seen:
        loader.sampler.set_epoch(epoch)
        batch = list(loader)[i]
        generator = torch.Generator().manual_seed(batch_seed(max(seeds.values(), default=0), epoch, i, 0))
        expected, _ = augment(*batch, CROPS, 10, p.mean, p.std, generator)
        assert torch.equal(seen, expected)
    validation = torch.cat(model.evaluated[-1:])
    assert torch.equal(validation, p.normalize(next(iter(data.val_dataloader()))[0]))  # not augmented


def test_test_and_predict_only_normalise(tmp_path):
    model, data = Recorder(), lookup(augment=CROPS)
    runner = trainer(tmp_path)
    runner.test(model, data)
    (images, labels), *_ = runner.predict(model, data)
    expected = data.preprocess.normalize(data.test_slots().images)
    assert torch.equal(torch.cat(model.evaluated), expected)
    assert torch.equal(images, expected[:8])
    assert torch.equal(labels, data.test_slots().labels[:8])


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # which is what was asked
def test_a_run_without_validation(tmp_path):
    model = Recorder()
    trainer(tmp_path, limit_train_batches=2).fit(model, lookup(n_val=0))
    assert len(model.seen) == 2
    assert not model.evaluated


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_batches_come_in_the_trainers_precision(tmp_path, precision):
    model = Recorder()
    trainer(tmp_path, precision=precision, limit_train_batches=1).fit(model, lookup(augment=CROPS))
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float64
    assert model.seen[0][2].dtype == model.evaluated[0].dtype == expected


class StopAt(L.Callback):
    """Writes a checkpoint in one of the trainer's hooks, once `seen` batches are through, and crashes."""

    def __init__(self, hook: str, seen: int):
        self.seen = seen
        setattr(self, hook, self._stop)

    def _stop(self, trainer, module, *args):
        if len(module.seen) == self.seen:
            trainer.save_checkpoint(trainer.default_root_dir + "/stopped.ckpt")
            raise KeyError("crash")


@pytest.mark.parametrize(
    ("hook", "seen", "streamed"),
    [
        pytest.param(
            "on_train_batch_end", 8, False, marks=pytest.mark.slow
        ),  # two batches into the second of three epochs of six
        pytest.param("on_train_batch_end", 8, True, marks=pytest.mark.slow),
        pytest.param("on_train_batch_end", 12, False, marks=pytest.mark.slow),
        pytest.param("on_validation_end", 9, False, marks=pytest.mark.slow),
        ("on_validation_end", 12, False),
        pytest.param("on_train_epoch_end", 12, False, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_goes_on_where_it_stopped(tmp_path, hook, seen, streamed):
    options = {"augment": CROPS} | ({"cache_bytes": 0, "num_workers": 1} if streamed else {})
    schedule = {"max_epochs": 3, "val_check_interval": 3, "num_sanity_val_steps": 0}
    whole, stopped, resumed = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, **schedule).fit(whole, lookup(**options))
    with pytest.raises(KeyError, match="crash"):
        trainer(tmp_path, **schedule, callbacks=[StopAt(hook, seen)]).fit(stopped, lookup(**options))
    path = tmp_path / "stopped.ckpt"
    trainer(tmp_path, **schedule).fit(resumed, lookup(**options), ckpt_path=path)
    assert len(whole.seen) == 18
    for expected, got in zip(whole.seen, stopped.seen + resumed.seen, strict=True):
        assert expected[:2] == got[:2]
        assert torch.equal(expected[2], got[2])


def test_a_resume_in_mid_epoch_needs_the_same_order(tmp_path):
    with pytest.raises(KeyError, match="crash"):
        trainer(tmp_path, callbacks=[StopAt("on_train_batch_end", 2)]).fit(Recorder(), lookup())
    with pytest.raises(DataError, match=r"mid-epoch .*batch_size 8 -> 4"):
        trainer(tmp_path).fit(Recorder(), lookup(batch_size=4), ckpt_path=tmp_path / "stopped.ckpt")
    with pytest.raises(DataError, match=r"mid-epoch .*order_seed \d+ -> \d+"):
        trainer(tmp_path).fit(Recorder(), lookup(order_seed=1), ckpt_path=tmp_path / "stopped.ckpt")
    trainer(tmp_path).fit(resumed := Recorder(), lookup(order_seed=0), ckpt_path=tmp_path / "stopped.ckpt")
    assert [batch_idx for _, batch_idx, _ in resumed.seen] == [2, 3, 4, 5]


def test_the_train_loader_is_whole_inside_hooks(tmp_path):
    counts = []

    class Recount(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            counts.append(sum(len(labels) for _, labels in trainer.train_dataloader))

    trainer(tmp_path, max_epochs=2, callbacks=[Recount()]).fit(Recorder(), lookup())
    assert counts == [48, 48]
