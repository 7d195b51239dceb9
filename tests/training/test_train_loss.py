"""train/loss: summed on the device, logged once an epoch, and the same through interruptions and processes."""

import lightning as L
import pytest
import torch

from sagan_attn.training.data import LookupData
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.mean import ImageMean
from sagan_attn.training.module import ClassifierModule


def data(**options):
    # 5 batches: four of 32 and one of 12
    return LookupData(**{"n_train": 140, "n_val": 32, "n_test": 32, "batch_size": 32, "drop_last": False, **options})


def trainer(path, **options):
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": 3,
    }  # fmt: skip
    return L.Trainer(default_root_dir=str(path), **(quiet | options))


class Logs(L.Callback):
    """train/loss of every epoch, in the order of their ends."""

    def __init__(self):
        self.values: dict[int, float] = {}

    def on_train_epoch_start(self, trainer, pl_module):
        self._keep(trainer, trainer.current_epoch - 1)

    def on_train_end(self, trainer, pl_module):
        self._keep(trainer, trainer.max_epochs - 1)

    def _keep(self, trainer, epoch):
        if "train/loss" in trainer.callback_metrics:
            self.values[epoch] = trainer.callback_metrics["train/loss"].item()


class Both(ClassifierModule):
    """Logs the loss of every step through Lightning as well."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("lightning", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]), sync_dist=True)
        return loss


def module(kind=ClassifierModule):
    L.seed_everything(5, verbose=False)
    return kind(HostConfig("lookup-cnn"))


def test_a_mean_counts_by_images():
    mean = ImageMean()
    assert mean.mean() is None
    for loss, images in ((1.0, 3), (5.0, 1)):
        mean.add(torch.tensor(loss, requires_grad=True), images)
    assert mean.mean() == torch.tensor(2.0)
    assert not mean.mean().requires_grad
    other = ImageMean()
    other.restore(mean.total(torch.device("cpu")))
    other.add(torch.tensor(6.0), 4)
    assert other.mean() == torch.tensor(4.0)
    other.reset()
    assert other.mean() is None
    assert other.total(torch.device("cpu")).tolist() == [0, 0]


def test_a_mean_does_not_lose_small_losses():
    mean = ImageMean()
    for _ in range(1000):
        mean.add(torch.tensor(1e-4), 1)
    mean.add(torch.tensor(1e4), 1)
    for _ in range(1000):
        mean.add(torch.tensor(1e-4), 1)
    expected = (1e4 + 2000 * torch.tensor(1e-4).double()) / 2001
    assert mean.mean().item() == pytest.approx(expected.item(), rel=1e-7)  # in float32 sums: 2e-5 off


def test_it_is_what_lightning_would_log(tmp_path):
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(module(Both), data())
    logged = fit.callback_metrics
    assert logged["train/loss"].item() == pytest.approx(logged["lightning"].item(), rel=1e-6)
    assert logged["train/loss"].dtype == torch.float32


@pytest.mark.slow
def test_it_is_what_lightning_would_log_over_two_processes(tmp_path):
    fit = trainer(tmp_path, max_epochs=1, strategy="ddp_spawn", devices=2)
    fit.fit(module(Both), data(n_train=150))
    logged = fit.callback_metrics
    assert logged["train/loss"].item() == pytest.approx(logged["lightning"].item(), rel=1e-6)


def test_a_step_logs_nothing(tmp_path, monkeypatch):
    hooks = []
    log = ClassifierModule.log

    def watched(self, *arguments, **options):
        hooks.append(self._current_fx_name)
        return log(self, *arguments, **options)

    monkeypatch.setattr(ClassifierModule, "log", watched)
    trainer(tmp_path, max_epochs=1).fit(module(), data())
    assert set(hooks) == {"validation_step", "on_train_epoch_end"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "batches"),
    [("on_train_batch_end", 8), ("on_train_batch_end", 10), ("on_validation_end", 10), ("on_train_epoch_end", 10)],
)
def test_a_resumed_epoch_has_the_mean_over_all_its_images(tmp_path, hook, batches):
    class StopAt(L.Callback):
        def stop(self, fit, *arguments):
            if fit.fit_loop.epoch_loop.total_batch_idx + 1 == batches:
                fit.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyError("crash")

    crash = StopAt()
    setattr(crash, hook, crash.stop)
    whole, resumed = Logs(), Logs()
    trainer(tmp_path, callbacks=[whole]).fit(module(), data())
    with pytest.raises(KeyError, match="crash"):
        trainer(tmp_path, callbacks=[crash]).fit(module(), data())
    trainer(tmp_path, callbacks=[resumed]).fit(module(), data(), ckpt_path=tmp_path / "stopped.ckpt")
    assert set(whole.values) == {0, 1, 2}
    assert 2 in resumed.values
    for epoch, value in resumed.values.items():
        if epoch >= 1:
            assert value == pytest.approx(whole.values[epoch], rel=1e-6)


def test_an_epoch_starts_from_nothing_after_one_that_was_broken_off(tmp_path):
    class Break(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise KeyError("crash")

    classifier = module()
    with pytest.raises(KeyError, match="crash"):
        trainer(tmp_path, callbacks=[Break()]).fit(classifier, data())
    assert classifier.train_loss.images == 32
    seen = []
    end = Logs()
    end.on_validation_start = lambda fit, model: seen.append(model.train_loss.images)
    trainer(tmp_path, max_epochs=1, callbacks=[end]).fit(classifier, data())
    assert seen == [140]
