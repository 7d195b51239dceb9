"""The progress bar: seldom, with the running loss, and whole at the end."""

import time

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar

from sagan_attn.training.cli import SaganCLI
from sagan_attn.training.data import LookupData
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.progress import SecondBar


@pytest.fixture
def clock(monkeypatch):
    """Time that only moves when a test moves it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def updates(monkeypatch):
    """(batch number, metrics) of each update of the training bar."""
    seen = []

    def on_train_batch_end(bar, trainer, pl_module, outputs, batch, batch_idx):
        seen.append((batch_idx, bar.get_metrics(trainer, pl_module)))

    monkeypatch.setattr(RichProgressBar, "on_train_batch_end", on_train_batch_end)
    return seen


def fit(bar, *callbacks, batches=8):
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, max_epochs=1,
        num_sanity_val_steps=0, callbacks=[bar, *callbacks],
    )  # fmt: skip
    trainer.fit(ClassifierModule(HostConfig("lookup-cnn")), LookupData(n_train=8 * batches, n_val=16, batch_size=8))


class Tick(L.Callback):
    """A batch takes so many seconds."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.losses = clock, seconds, []

    def on_train_batch_start(self, *arguments):
        self.clock[0] += self.seconds

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


@pytest.mark.slow
def test_once_a_second_and_at_the_end(clock, updates):
    fit(SecondBar(), Tick(clock, 0.3))
    assert [batch for batch, _ in updates] == [0, 4, 7]


@pytest.mark.slow
def test_slow_batches_are_all_shown(clock, updates):
    fit(SecondBar(), Tick(clock, 1.5))
    assert [batch for batch, _ in updates] == list(range(8))


def test_it_shows_the_mean_loss_so_far(clock, updates):
    bar = SecondBar()
    tick = Tick(clock, 1.5)
    fit(bar, tick)
    means = [sum(tick.losses[: n + 1]) / (n + 1) for n in range(8)]
    assert [metrics["train/loss"] for _, metrics in updates] == pytest.approx(means, rel=1e-5)


def test_a_disabled_bar_does_nothing(clock, updates):
    class Disable(L.Callback):
        def on_train_start(self, trainer, pl_module):
            bar.disable()

    bar = SecondBar()
    fit(bar, Disable(), Tick(clock, 1.5))
    assert updates == []


def test_it_is_the_default(tmp_path):
    from small_runs import SMALL

    arguments = [a for a in SMALL if "progress_bar" not in a]
    cli = SaganCLI(["fit", *arguments, "--trainer.fast_dev_run=true", "--run_dir", str(tmp_path / "run")])
    assert isinstance(cli.trainer.progress_bar_callback, SecondBar)
