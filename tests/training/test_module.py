"""The LightningModule: what is trained, frozen, logged and warned about."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import SingleDeviceStrategy

from sagan_attn.errors import CheckpointError, ConfigError
from sagan_attn.training.data import AugmentConfig, LookupData
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.module import ClassifierModule, check_fit
from sagan_attn.training.network import GraftConfig
from sagan_attn.training.optim import OptimizerConfig, ScheduleConfig

SAGAN = [GraftConfig("local")]


def data(**options):
    return LookupData(**{"n_train": 128, "n_val": 32, "n_test": 32, "batch_size": 32, **options})


def trainer(**options):
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return L.Trainer(**{**defaults, "enable_model_summary": False, "enable_checkpointing": False, **options})


def module(grafts=SAGAN, **options):
    return ClassifierModule(HostConfig("lookup-cnn"), list(grafts), **options)


class Keep(L.Callback):
    """A copy of the network before the first step."""

    def on_train_start(self, trainer, pl_module):
        self.network = copy.deepcopy(pl_module.network)


def test_a_fresh_graft_does_not_change_what_the_host_starts_from():
    outputs = []
    for grafts in ([], SAGAN, [GraftConfig("local", "context-max")]):
        L.seed_everything(3, verbose=False)
        keep = Keep()
        trainer(callbacks=[keep], limit_train_batches=1).fit(module(grafts), data())
        image = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        outputs.append(keep.network.eval()(image.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_one_step_is_that_of_plain_torch():
    L.seed_everything(1, verbose=False)
    keep, images = Keep(), data(batch_size=128)
    classifier = module(optimizer=OptimizerConfig("momentum", lr=0.1, weight_decay=0.0, momentum=0.0))
    trainer(callbacks=[keep]).fit(classifier, images)
    network = keep.network.train()
    batch, labels = next(iter(images.train_dataloader()))
    x = images.preprocess.normalize(batch).contiguous(memory_format=torch.channels_last)
    F.cross_entropy(network(x), labels).backward()
    stepped = dict(classifier.network.named_parameters())
    for name, parameter in network.named_parameters():
        rate = 1.0 if name.endswith("gamma") else 0.1
        expected = parameter.detach() - rate * parameter.grad
        torch.testing.assert_close(stepped[name].detach(), expected, rtol=1e-4, atol=1e-5)


def test_freeze_host_trains_grafts_and_head_alone():
    classifier = module(freeze_host=True, optimizer=OptimizerConfig(lr=0.01))
    L.seed_everything(0, verbose=False)
    keep = Keep()
    trainer(callbacks=[keep], max_epochs=2).fit(classifier, data())
    before = keep.network.state_dict()
    moved = {k for k, v in classifier.network.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if ".grafts." in k or k.startswith("head.")}
    classifier.train()
    assert not classifier.network.local.norm.training
    assert classifier.network.local.act.grafts.sagan.training


class States(L.Callback):
    """The network's numbers at the start and after each epoch, and the rates."""

    def __init__(self):
        self.states, self.rates = [], []

    def on_train_start(self, trainer, pl_module):
        self.states.append(copy.deepcopy(pl_module.network.state_dict()))
        self.rates = {group["name"]: group["initial_lr"] for group in trainer.optimizers[0].param_groups}

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append(copy.deepcopy(pl_module.network.state_dict()))


@pytest.mark.parametrize("parallel", [False, True])
def test_the_host_is_unfrozen_at_its_epoch(parallel, monkeypatch):
    """Under DDP, of one process too, gradients are made throughout, and dropped."""
    if parallel:
        monkeypatch.setattr("sagan_attn.training.module.ParallelStrategy", SingleDeviceStrategy)
    kit = OptimizerConfig(lr=0.01, host_lr_scale=0.1, head_lr_scale=2.0)
    classifier = module(freeze_host=True, unfreeze_epoch=2, optimizer=kit)
    states = States()
    trainer(callbacks=[states], max_epochs=3).fit(classifier, data())
    assert (states.rates["host"], states.rates["head"]) == pytest.approx((1e-3, 2e-2))
    kept = [
        {key for key, value in after.items() if torch.equal(value, before[key])}
        for before, after in zip(states.states, states.states[1:], strict=False)
    ]
    host = {key for key in states.states[0] if ".grafts." not in key and not key.startswith("head.")}
    assert host <= kept[0]
    assert host <= kept[1]
    assert not host & kept[2]  # batch norms' statistics, too
    assert classifier.network.local.norm.training


def test_a_step_after_unfreezing_is_that_of_a_fresh_optimizer():
    """AdamW's first step moves each number by the rate, whenever it comes, but for its decay."""
    kit = OptimizerConfig(lr=0.01, host_lr_scale=0.1, weight_decay=0.0)
    classifier = module([], freeze_host=True, unfreeze_epoch=1, optimizer=kit, schedule=ScheduleConfig("linear"))
    states = States()
    trainer(callbacks=[states], max_epochs=2, limit_train_batches=1).fit(classifier, data())
    before, after = (one["local.conv.weight"] for one in states.states[1:])
    moved = (after - before).abs()
    assert moved.max() == pytest.approx(0.5 * 1e-3, rel=1e-3)  # the schedule is half way down
    assert moved.median() == pytest.approx(0.5 * 1e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unfreeze_epoch": 1}, "goes with freeze_host: true"),
        ({"unfreeze_epoch": 0, "freeze_host": True}, r"unfreeze_epoch \(0\) must be at least 1"),
        ({"unfreeze_epoch": 1, "freeze_host": True}, r"unfreeze_epoch \(1\) must lie below trainer.max_epochs \(1\)"),
    ],
)
def test_epochs_at_which_nothing_is_unfrozen(options, message):
    with pytest.raises(ConfigError, match=message):
        trainer().fit(module(**options), data())


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_ema_and_cutmix_train():
    ema = L.pytorch.callbacks.EMAWeightAveraging(decay=0.5)
    classifier = module(label_smoothing=0.1)
    images = data(augment=AugmentConfig(crop_padding=2, flip=True, cutmix=1.0, mixup=0.2))
    trainer(callbacks=[ema], max_epochs=2).fit(classifier, images)
    assert all(p.isfinite().all() for p in classifier.network.parameters())


def test_a_gamma_that_does_not_move_is_warned_about():
    kit = OptimizerConfig(lr=1e-6)
    with pytest.warns(
        UserWarning, match=r"no gamma has moved by more than 0.001.*Raise optimizer.gamma_lr_scale \(now 10"
    ):
        trainer().fit(module(optimizer=kit), data())
    trainer().fit(module(optimizer=OptimizerConfig(lr=1e-2)), data())  # warnings are errors


@pytest.mark.parametrize("name", ["cosine", pytest.param("onecycle", marks=pytest.mark.slow)])
def test_rates_and_gammas_are_logged(name):
    classifier = module(schedule=ScheduleConfig(name))
    fit = trainer(max_epochs=2)
    fit.fit(classifier, data())
    logged = fit.callback_metrics
    graft = classifier.grafts[0]
    assert logged[f"gamma/{graft.path}"] == graft.block.gamma.item() != 0
    assert {"lr/host", "lr/head", "lr/grafts", "lr/grafts/gamma", "train/loss", "val/loss", "val/accuracy"} <= set(
        logged
    )
    assert logged["lr/grafts/gamma"] == pytest.approx(10 * logged["lr/grafts"])


def test_accuracy_is_over_images_not_over_classes():
    classifier, images = module(), data(n_test=50)
    fit = trainer()
    fit.fit(classifier, images)
    (metrics,) = fit.test(classifier, images, verbose=False)
    test = images.test_slots()
    predicted = classifier.network.eval()(images.preprocess.normalize(test.images)).argmax(dim=1)
    assert metrics["test/accuracy"] == pytest.approx((predicted == test.labels).float().mean().item())


def test_bf16_mixed_trains_on_a_cpu():
    classifier = module()
    trainer(precision="bf16-mixed", limit_train_batches=2).fit(classifier, data())
    assert classifier.network.head.weight.dtype == torch.float32


@pytest.mark.slow
def test_compile_gives_the_same_keys():
    classifier = module(compile=True)
    trainer(limit_train_batches=2).fit(classifier, data())
    assert "network.local.act.grafts.sagan.gamma" in classifier.state_dict()
    assert classifier.network._compiled_call_impl is not None


def test_refusals():
    with pytest.raises(ConfigError, match=r"num_classes \(7\) does not match the data, which have 10"):
        trainer().fit(module(num_classes=7), data())
    with pytest.raises(ConfigError, match=r"label_smoothing \(1\) must lie"):
        module(label_smoothing=1)
    with pytest.raises(ConfigError, match=r"compile_mode .* needs compile"):
        module(compile_mode="max-autotune")
    with pytest.raises(ConfigError, match="0 training batches"):
        trainer(limit_train_batches=0).fit(module(), data())
    with pytest.raises(ConfigError, match=r"max_epochs must be given"):
        trainer(max_epochs=-1, max_steps=3).fit(module(), data())


def test_check_fit_names_the_keys():
    own = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"b is missing; c is not in the model; a is \(3,\) instead of \(2,\)"):
        check_fit(own, {"a": torch.zeros(3), "c": torch.zeros(1)}, "it")
