"""Runs of one seed differ in what is grafted and in nothing else: first weights, order, augmentation, and the host's
steps as long as a gate is closed."""

import copy

import lightning as L
import pytest
import torch

from sagan_attn.training.data import AugmentConfig, LookupData
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.network import GraftConfig
from sagan_attn.training.optim import OptimizerConfig, ScheduleConfig

NAMES = ["sagan", "conv", "identity", "biggan", "nonlocal"]
GATED = ["sagan", "conv", "identity", "biggan", "context-max", "se", "gc"]  # by a gamma
HOSTS = {
    "lookup-cnn": (HostConfig("lookup-cnn", options={"width": 16}), "local"),
    "resnet20": (HostConfig("resnet20", options={"width": 8, "blocks": [1, 1, 1]}), "layer2"),
}
CASES = [
    ("lookup-cnn", tuple(NAMES)),
    ("resnet20", ("sagan",)),
    pytest.param("resnet20", tuple(NAMES), marks=pytest.mark.slow),
]
SHUT = [
    ("lookup-cnn", tuple(GATED)),
    pytest.param("resnet20", tuple(GATED), marks=pytest.mark.slow),
]
AUGMENT = AugmentConfig(crop_padding=2, flip=True, cutout=4, mixup=0.2)


class Watched(ClassifierModule):
    """Notes its batches and first weights; with `shut`, all gammas stay at 0."""

    shut = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen: list[torch.Tensor] = []
        self.accuracies: list[float] = []

    def setup_network(self, network, num_classes):
        super().setup_network(network, num_classes)
        for gamma in self.grafts.gammas().values() if self.shut else ():
            gamma.requires_grad_(False)
        self.first = copy.deepcopy(self.network.state_dict())

    def training_step(self, batch, batch_idx):
        self.seen += [tensor.clone() for tensor in batch]
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.accuracies.append(self.val_accuracy.compute().item())


class Shut(Watched):
    shut = True


def run(kind: type[Watched], host: str, block: str | None, seed: int = 3, data_seed: int = 0, **options) -> Watched:
    """One short run, of 2 epochs of 3 steps."""
    config, site = HOSTS[host]
    data = LookupData(n_train=48, n_val=32, n_test=8, batch_size=16, seed=data_seed, order_seed=seed, augment=AUGMENT)
    L.seed_everything(seed, verbose=False)
    grafts = [] if block is None else [GraftConfig(site, block)]
    kit = OptimizerConfig("sgd", lr=0.05, weight_decay=5e-4)
    module = kind(config, grafts, kit, ScheduleConfig("onecycle"))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=2, enable_checkpointing=False, **quiet, **options).fit(module, data)
    return module


def of_host(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if ".grafts." not in name}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(("host", "names"), CASES)
def test_one_seed_has_the_same_first_weights_order_and_augmentation(host: str, names: tuple[str, ...]):
    alone = run(Watched, host, None)
    assert len(alone.seen) == 2 * 2 * 3
    for name in names:
        grafted = run(Watched, host, name)
        assert len(grafted.first) > len(alone.first)
        assert_same(of_host(grafted.first), alone.first)
        for one, other in zip(grafted.seen, alone.seen, strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
def test_other_seeds_differ():
    first, second = (run(Watched, "lookup-cnn", "sagan", seed=seed) for seed in (3, 4))
    assert not torch.equal(first.first["local.conv.weight"], second.first["local.conv.weight"])
    query = "local.act.grafts.sagan.query.weight"
    assert not torch.equal(first.first[query], second.first[query])
    assert not torch.equal(first.seen[0], second.seen[0])
    of_validation = [one.trainer.datamodule._sources["val"].images for one in (first, second)]
    assert torch.equal(*of_validation)


@pytest.mark.filterwarnings("ignore:no gamma has moved")  # as is meant
@pytest.mark.parametrize("clip", [pytest.param(None, id="", marks=pytest.mark.slow), pytest.param(0.05, id="clipped")])
@pytest.mark.parametrize(("host", "names"), SHUT)
def test_with_a_gamma_fixed_at_0_the_host_trains_as_alone(host: str, names: tuple[str, ...], clip: float | None):
    alone = run(Watched, host, None, gradient_clip_val=clip)
    for name in names:
        grafted = run(Shut, host, name, gradient_clip_val=clip)
        (gamma,) = grafted.grafts.gammas().values()
        assert gamma.item() == 0
        assert_same(of_host(grafted.network.state_dict()), alone.network.state_dict())
        assert grafted.accuracies == alone.accuracies
    assert any(not torch.equal(value, alone.first[name]) for name, value in alone.network.state_dict().items())
