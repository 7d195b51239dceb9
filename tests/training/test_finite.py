"""NaN and infinite numbers are found in the step they show in, and named."""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from small_runs import SMALL
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sagan_attn import graft
from sagan_attn.errors import ConfigError, NonFiniteError
from sagan_attn.training.cli import SaganCLI, main
from sagan_attn.training.diagnosis import culprit
from sagan_attn.training.finite import MOST_IN_A_ROW, SMALLEST_SCALE, FiniteGuard
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.module import ClassifierModule
from sagan_attn.training.optim import OptimizerConfig

GRAFT = "act.grafts.sagan"


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.act(self.bn(self.conv(x))).mean((2, 3))))


def module(block: str = "sagan", **optimizer: Any) -> ClassifierModule:
    torch.manual_seed(0)
    host = Host()
    graft(host, "act", block=block, example_input=torch.zeros(1, 3, 6, 6))
    made = ClassifierModule(HostConfig("tiny"), optimizer=OptimizerConfig(**optimizer), channels_last=False)
    made.setup_network(host, 3)
    return made


def data(batches: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4 * batches, 3, 6, 6, generator=generator)
    return TensorDataset(images, torch.arange(4 * batches) % 3)


class At(L.Callback):
    """Does something to the module when a batch of an epoch starts."""

    def __init__(self, batch: int, act: Callable[[Any], None], epoch: int = 0) -> None:
        self.when, self.act = (epoch, batch), act

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.when:
            self.act(pl_module)


def spoil(name: str, bad: float = math.nan) -> Callable[[Any], None]:
    def act(pl_module: Any) -> None:
        with torch.no_grad():
            pl_module.network.state_dict()[name].view(-1)[0] = bad

    return act


def fit(
    pl_module: Any,
    *callbacks: L.Callback,
    on: TensorDataset | None = None,
    validation: TensorDataset | None = None,
    **options: Any,
) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= (
        {} if any(isinstance(callback, ModelCheckpoint) for callback in callbacks) else {"enable_checkpointing": False}
    )
    quiet["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    quiet["limit_val_batches"] = 0.0 if validation is None else 1.0
    trainer = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{"max_epochs": 1, **quiet, **options})
    loaders = [DataLoader(part or data(), batch_size=4) for part in (on, validation)]
    torch.manual_seed(2)
    trainer.fit(pl_module, *loaders)
    return trainer


def state(pl_module: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pl_module.network.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    "name", [f"{GRAFT}.value.weight", f"{GRAFT}.key.bias", "conv.bias", "bn.weight", "head.weight"]
)
def test_step_batch_and_module_are_named(name: str):
    owner, _, own = name.rpartition(".")
    branch = r", in the branch of graft 'sagan' at 'act'" if GRAFT in name else ""
    message = (
        r"^step 6 \(epoch 1, batch 2\): the loss is nan; the first module with an output that is not finite is "
        rf"'{owner}' \(\w+{branch}\): its input is finite, {own} in it is not\. Lower model.optimizer.lr, .*'stop'$"
    )
    with pytest.raises(NonFiniteError, match=message):
        fit(module(), FiniteGuard(), At(2, spoil(name), epoch=1), max_epochs=2)


def test_what_is_made_between_modules_and_by_grafts_of_finite_parts():
    made = module()
    with torch.no_grad():  # finite queries and keys whose products are not
        made.network.get_parameter(f"{GRAFT}.query.bias").fill_(3e38)
        made.network.get_parameter(f"{GRAFT}.key.bias").fill_(3e38)
    with pytest.raises(
        NonFiniteError, match=rf"is '{GRAFT}' \(SelfAttention2d, in the branch.*: its input is finite\. "
    ):
        fit(made, FiniteGuard())

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.ReLU(), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) / 0)

    network = Between()
    found = culprit(network, lambda: network(torch.tensor([-1.0, 1.0])))
    assert str(found).endswith("is 'two' (Tanh): its input is not either, though no module put that out")
    assert culprit(network, lambda: None) is None
    assert not network.one._forward_hooks
    assert not network.one._forward_pre_hooks


def with_bad(batch: int, *images: int, batches: int = 4) -> TensorDataset:
    dataset = data(batches)
    for image in images:
        dataset.tensors[0][4 * batch + image, 1, 2, 3] = math.inf
    return dataset


def test_images_and_labels_are_named():
    with pytest.raises(
        NonFiniteError, match=r"batch 2\): the loss is nan; images 1, 3 of the 4 in the batch are not fi"
    ):
        fit(module(), FiniteGuard(), on=with_bad(2, 1, 3))
    bounded = module()
    bounded.network.bn = nn.Tanh()  # a loss that is finite all the same  # type: ignore[assignment]
    with pytest.raises(NonFiniteError, match=r"batch 1\): image 0 of the 4 in the batch is not finite\. Mend the data"):
        fit(bounded, FiniteGuard(), on=with_bad(1, 0))
    soft = torch.full((16, 3), 1 / 3)
    soft[5, 1] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"batch 1\): the loss is nan; label 1 of the 4 .* every module's output is f"
    ):
        fit(module(), FiniteGuard(), on=TensorDataset(data().tensors[0], soft))


def bad_gradients(batches: tuple[int, ...], factor: float = math.inf) -> L.Callback:
    """Gradients so many times as large from the output of the network's `bn` on, of losses that are finite."""

    class Bad(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            spoiled = batch_idx in batches

            def look(module: nn.Module, args: Any, output: Tensor) -> None:
                if spoiled and output.requires_grad:
                    output.register_hook(lambda gradient: gradient * factor)

            self.handle = pl_module.network.bn.register_forward_hook(look)

        def on_train_batch_end(self, *_: Any) -> None:
            self.handle.remove()

    return Bad()


def test_gradients_are_named():
    message = (
        r"batch 1\): the loss is finite, its gradients are not; every module.*gradient.* of 'bn.bias' \(4 are not\)"
    )
    with pytest.raises(NonFiniteError, match=message):
        fit(module(), FiniteGuard(), bad_gradients((1,)))


def test_large_gradients_are_no_fault():
    made = module("nonlocal", name="sgd", lr=1e-30)
    fit(made, FiniteGuard(), bad_gradients((1,), factor=1e25))  # whose squares no float32 holds
    assert all(tensor.isfinite().all() for tensor in made.network.state_dict().values())


class States(L.Callback):
    """State of network and optimizer, and sum of the losses, before and after each update."""

    def __init__(self) -> None:
        self.before: list[Any] = []
        self.after: list[Any] = []

    def note(self, trainer: Any, pl_module: Any) -> Any:
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        return state(pl_module), optimizer, pl_module.train_loss.total(pl_module.device)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append(self.note(trainer, pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.after.append(self.note(trainer, pl_module))


@pytest.mark.parametrize(("name", "accumulate"), [("sgd", 2), ("adamw", 1)])
def test_skipped_updates_leave_nothing_behind(name: str, accumulate: int):
    states, made = States(), module("nonlocal", name=name, lr=0.01)
    with pytest.warns(UserWarning, match=r"^epoch 0: updates skipped: 1; the first: step \d \(epoch 0, batch 4\): the"):
        trainer = fit(
            made, FiniteGuard("skip"), states, on=with_bad(4, 2, batches=8), accumulate_grad_batches=accumulate
        )
    assert trainer.global_step == 8 // accumulate
    (before, moments, losses), (after, moments_after, losses_after) = states.before[4], states.after[3 + accumulate]
    assert_equal(before, after)
    assert torch.equal(losses, losses_after)
    assert str(moments) == str(moments_after)
    assert all(tensor.isfinite().all() for tensor in made.network.state_dict().values())
    assert not torch.equal(after["conv.weight"], made.network.state_dict()["conv.weight"])  # it went on
    assert math.isfinite(trainer.callback_metrics["train/loss"])


def test_the_right_batch_among_accumulated_ones():
    with pytest.raises(NonFiniteError, match=r"^step 1 \(epoch 0, batch 3\): the loss is nan; image 0 of"):
        fit(module(), FiniteGuard(), on=with_bad(3, 0, batches=6), accumulate_grad_batches=3)


def test_many_skipped_updates_one_after_the_other_stop_the_run():
    made = module()
    before = state(made)
    dataset = data(MOST_IN_A_ROW + 2)
    dataset.tensors[0][:] = math.nan
    message = rf"^step 0 \(epoch 0, batch 0\): .*; {MOST_IN_A_ROW} updates one after the other had to be skipped$"
    with pytest.raises(NonFiniteError, match=message):
        fit(made, FiniteGuard("skip"), on=dataset)
    assert_equal(before, state(made))


def test_continue_says_it_once_an_epoch():
    made = module()
    with pytest.warns(UserWarning, match="the loss is nan") as said:
        fit(made, FiniteGuard("continue"), At(1, spoil("conv.weight")), max_epochs=2)
    assert [str(one.message)[:28] for one in said if "loss" in str(one.message)] == [
        "step 1 (epoch 0, batch 1): t",
        "step 4 (epoch 1, batch 0): t",
    ]
    assert not all(tensor.isfinite().all() for tensor in made.network.state_dict().values())


def test_a_stopped_run_has_the_state_from_before_the_batch():
    states, made = States(), module()
    with pytest.raises(NonFiniteError):
        fit(made, states, FiniteGuard(), on=with_bad(2, 0))
    assert_equal(states.before[2][0], state(made))


@pytest.mark.parametrize("on_bad", ["stop", "skip", "continue"])
def test_the_run_is_the_same_bit_for_bit(on_bad: Any):
    runs = []
    for callbacks in ([], [FiniteGuard(on_bad)]):
        made = module("biggan", lr=0.01)
        trainer = fit(
            made, *callbacks, max_epochs=2, validation=data(2), accumulate_grad_batches=2, gradient_clip_val=1.0
        )
        runs.append((state(made), trainer.callback_metrics, torch.get_rng_state()))
    assert_equal(runs[0][0], runs[1][0])
    assert_equal(runs[0][1], runs[1][1])
    assert torch.equal(runs[0][2], runs[1][2])


def test_naming_moves_neither_random_state_nor_statistics():
    def run(*callbacks: L.Callback) -> dict[str, Tensor]:
        made = module()
        fit(made, *callbacks, on=with_bad(1, 0, batches=2))
        return state(made) | {"rng": torch.get_rng_state()}

    with pytest.warns(UserWarning, match="image 0"):
        named = run(FiniteGuard("continue"))
    torch.testing.assert_close(run(), named, rtol=0, atol=0, equal_nan=True)


def test_losses_of_validation_are_named():
    made = module()
    callbacks = (FiniteGuard(), At(3, spoil("bn.running_var")))  # which training does not use
    message = r"^validation after step 3 \(epoch 0\), batch 0: the loss is nan; .* 'bn' \(BatchNorm2d\): .* running_var"
    with pytest.raises(NonFiniteError, match=message):
        fit(made, *callbacks, validation=data(2))
    spoil("bn.running_var")(made)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[FiniteGuard("skip")])
    with pytest.warns(UserWarning, match="^validation, batch 0: the loss is nan") as said:
        trainer.validate(made, DataLoader(data(3), batch_size=4), verbose=False)
    assert sum("loss" in str(one.message) for one in said) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_under_a_scaler_is_the_scalers_business(fused: bool):
    def run(*callbacks: L.Callback, scale: float = 2.0**16, on: TensorDataset | None = None) -> Any:
        made, scaler = (
            module(name="sgd", lr=0.01, options={"fused": True} if fused else {}),
            torch.amp.GradScaler("cpu", scale),
        )
        trainer = fit(made, *callbacks, on=on, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        return made, trainer, scaler

    _, trainer, scaler = run(FiniteGuard(), bad_gradients((1, 2)))
    assert trainer.global_step == 4
    assert scaler.get_scale() == 2.0**14
    with pytest.raises(NonFiniteError, match=r"batch 1\): the loss is nan; image 2 of the 4"):
        run(FiniteGuard(), on=with_bad(1, 2))
    message = (
        r"batch 3\): the GradScaler's scale has fallen to .*e-05, because gradients overflow; .* gradient .* 'bn.bias'"
    )
    with pytest.raises(NonFiniteError, match=message):
        run(FiniteGuard(), bad_gradients((1, 2, 3)), scale=SMALLEST_SCALE * 3)
    states = States()
    with pytest.warns(UserWarning, match="updates skipped: 1"):
        made, _, _ = run(FiniteGuard("skip"), states, on=with_bad(2, 1))
    assert_equal(states.before[2][0], states.after[2][0])
    assert all(tensor.isfinite().all() for tensor in made.network.state_dict().values())


@pytest.mark.slow
def test_compiled_networks():
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    made = module()
    made.network.compile(backend=backend)
    made.network(torch.zeros(4, 3, 6, 6))
    compiled = len(graphs)
    spoil(f"{GRAFT}.value.weight")(made)
    found = culprit(made.network, lambda: made.network(torch.zeros(4, 3, 6, 6)))
    assert found is not None
    assert found.name == f"{GRAFT}.value"
    assert len(graphs) == compiled  # nothing is compiled to find that out
    with pytest.raises(NonFiniteError, match=rf"is '{GRAFT}.value' \(Pointwise, in the branch"):
        fit(made, FiniteGuard())
    torch._dynamo.reset()


class Broken(L.Callback):
    """Has the last update of the second epoch break the weights, after a batch in which all was well."""

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 7:
            for group in optimizer.param_groups:
                group["lr"] = math.inf


@pytest.mark.parametrize(
    ("on_bad", "when", "step"), [("stop", "every_n_train_steps", 7), ("skip", "every_n_epochs", 4)]
)
def test_no_checkpoint_is_written_of_weights_that_are_not_finite(on_bad: Any, when: str, step: int, tmp_path: Path):
    saves = ModelCheckpoint(tmp_path, "last", enable_version_counter=False, **{when: 1})  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match=r"^after step 7 \(epoch 1\): not finite any more are network\.\w+"):
        fit(module(name="sgd", lr=0.1), FiniteGuard(on_bad), Broken(), saves, max_epochs=2)
    (path,) = tmp_path.iterdir()
    kept = torch.load(path, weights_only=True)
    assert kept["global_step"] == step
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


def test_masks_of_infinite_numbers_are_no_fault(tmp_path: Path):
    made = module()
    made.network.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    fit(made, FiniteGuard(), ModelCheckpoint(tmp_path))


def test_a_run_with_it_is_one_without_a_number_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """At the command line: one line, exit code 1; a fit has the guard, and a config's own replaces it."""
    diverging = ["fit", *SMALL, "--model.optimizer.lr=1e30", "--model.schedule.warmup_epochs=0"]
    assert main([*diverging, f"--run_dir={tmp_path / 'one'}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: step 1 (epoch 0, batch 1): the loss is nan; the first module with an output")
    assert not list(tmp_path.rglob("*.ckpt"))
    config = tmp_path / "guard.yaml"
    config.write_text(
        "trainer: {callbacks: [{class_path: sagan_attn.training.finite.FiniteGuard, init_args: {on_bad: continue}}]}"
    )
    made: list[Any] = []
    original = SaganCLI.instantiate_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SaganCLI, "instantiate_trainer", lambda cli: made.append(original(cli)) or made[-1])
        patch.setattr(SaganCLI, "fit", lambda *_, **__: None)
        for more in ([], ["--config", str(config)]):
            assert main(["fit", *SMALL, *more, f"--run_dir={tmp_path / str(len(more))}"]) == 0
    found = [[c.on_bad for c in trainer.callbacks if isinstance(c, FiniteGuard)] for trainer in made]
    assert found == [["stop"], ["continue"]]
    with pytest.raises(ConfigError, match=r"on_bad \('never'\) must be one of stop, skip, continue"):
        FiniteGuard("never")  # type: ignore[arg-type]


SCRIPT = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from test_finite import FiniteGuard, data, fit, module, state, with_bad
import lightning as L

class Rank(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 1:
            batch[0][0] = float("nan")

made = module("nonlocal", name="sgd", lr=0.01)
trainer = fit(made, Rank(), FiniteGuard(sys.argv[1]), on=data(8), devices=2, strategy="ddp")
total = torch.stack([tensor.double().sum() for tensor in made.network.parameters()]).sum()
both = trainer.strategy.all_gather(total)
assert both[0] == both[1] and both.isfinite().all(), both
"""


@pytest.mark.slow
@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_two_processes_stop_or_skip_together(on_bad: str, tmp_path: Path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, str(script), on_bad, *paths],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert (done.returncode == 0) == (on_bad == "skip"), done.stderr
    assert "image 0 of the 4 in the batch is not finite" in done.stderr
    assert "another process met a number that is not finite" in done.stderr
