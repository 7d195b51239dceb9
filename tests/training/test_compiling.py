"""torch.compile and CUDA graphs from the config."""

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sagan_attn.errors import ConfigError
from sagan_attn.training.compiling import check_compile
from sagan_attn.training.data import AugmentConfig, LookupData, augment
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.mean import ImageMean
from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.network import GraftConfig, build_network


def trainer(**options):
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, max_epochs=1,
        enable_progress_bar=False, **options,
    )  # fmt: skip


def lookup():
    return LookupData(n_train=96, n_val=32, n_test=32, batch_size=32)


def module(**options):
    return ClassifierModule(HostConfig("lookup-cnn"), [GraftConfig("local")], **options)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_every_mode_is_taken(mode):
    assert module(compile=True, compile_mode=mode).compile_mode == mode


@pytest.mark.parametrize(
    ("compile", "mode", "accumulate", "message"),
    [
        (True, "reduce_overhead", 1, r"compile_mode \('reduce_overhead'\) must be one of .*; did you mean reduce-over"),
        (True, "fast", 1, r"compile_mode \('fast'\) must be one of default, .*reduce-overhead, [^;]*$"),
        (False, "max-autotune", 1, r"compile_mode \('max-autotune'\) needs compile: true"),
        (True, "reduce-overhead", 2, r"do not add up gradients over trainer.accumulate_grad_batches \(2\)"),
    ],
)
def test_refusals(compile, mode, accumulate, message):
    with pytest.raises(ConfigError, match=message):
        check_compile(compile, mode, accumulate)


def test_the_trainers_accumulation_is_checked():
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches \(3\)"):
        trainer(accumulate_grad_batches=3).fit(module(compile=True, compile_mode="reduce-overhead"), lookup())
    check_compile(True, "max-autotune-no-cudagraphs", 3)
    check_compile(False, None, 3)


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal"}


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for a GPU, and break a CUDA graph."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        index = name in ("index", "index_put", "index_put_") and any(
            part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1]
        )
        assert name not in WAITS, name
        assert not index, f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def test_no_waiting_is_noticed():
    with NoWaiting():
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(1).item()
        with pytest.raises(AssertionError, match="by a mask"):
            torch.ones(2)[torch.tensor([True, False])]


@pytest.mark.parametrize("block", ["sagan", "nonlocal", "botnet", "context-max"])
def test_augmentation_step_and_loss_never_wait_for_the_device(block):
    network = build_network(HostConfig("resnet9", options={"width": 8}), [GraftConfig("layer2", block)], 10, 3, 32)
    network = network.to(memory_format=torch.channels_last)
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    config, numbers = AugmentConfig(crop_padding=4, flip=True, cutout=8), (0.5, 0.5, 0.5)
    mean = ImageMean()
    generator = torch.Generator().manual_seed(0)
    with NoWaiting():
        for _ in range(2):
            x, y = augment(images, labels, config, 10, numbers, numbers, generator)
            loss = torch.nn.functional.cross_entropy(network(x), y, label_smoothing=0.1)
            loss.backward()
            mean.add(loss, len(y))
        value = mean.mean()
    assert value.isfinite()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own, which differ from version to version
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_run_learns_the_same(mode):
    losses = []
    for options in ({}, {"compile": True, "compile_mode": mode}):
        L.seed_everything(0, verbose=False)
        fit = trainer()
        fit.fit(module(**options), lookup())
        losses.append(fit.callback_metrics["train/loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
