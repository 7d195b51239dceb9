"""Numbers that are not finite: found in the step they first show in, and named by step, batch and module."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn

from sagan_attn.errors import ConfigError, NonFiniteError
from sagan_attn.training.diagnosis import all_finite, describe, spoiled_rows
from sagan_attn.training.mean import ImageMean

__all__ = ["MOST_IN_A_ROW", "SMALLEST_SCALE", "FiniteGuard", "OnBad"]

OnBad = Literal["stop", "skip", "continue"]
MOST_IN_A_ROW = 10
SMALLEST_SCALE = 1e-4  # fairseq's `min_loss_scale`: 30 overflows one after the other from torch's first scale, 2**16


class FiniteGuard(L.Callback):
    """Looks at images, loss and gradients before every update, and at the loss of every validation and test batch.

    Where one holds a NaN or an infinite number, the batch is run once more to name the first module that made one,
    and whether it lies in a graft. The look takes one reduction a tensor, and changes no bit of the run. Steps, epochs
    and batches are counted from 0. Every fit has this callback with its default; for another choice, in a config:

        trainer:
          callbacks:
            - class_path: sagan_attn.training.finite.FiniteGuard
              init_args: {on_bad: skip}

    With precision "16-mixed" gradients that overflow are the `GradScaler`'s business: it leaves the step out and
    lowers its scale. A loss that is not finite is an error there too, and so is a scale below `SMALLEST_SCALE`.

    Args:
        on_bad: "stop" the run, with the weights and statistics from before the batch. "skip" the update, and with it
            all batches whose gradients it sums: weights, statistics and the epoch's mean loss are as before them, the
            schedule of the learning rate goes on, and what was skipped is said at the end of the epoch.
            `MOST_IN_A_ROW` updates one after the other stop the run. "continue" as if nothing were, and say so once
            an epoch. With "stop" and "skip" no checkpoint is written of weights that are not finite; the run stops.
            In validation and tests, where there is nothing to skip, "skip" is as "continue".

    Raises:
        ConfigError: another `on_bad`.
        NonFiniteError: in training, validation or a test, as `on_bad` says.
    """

    def __init__(self, on_bad: OnBad = "stop") -> None:
        if on_bad not in get_args(OnBad):
            raise ConfigError(f"on_bad ({on_bad!r}) must be one of {', '.join(get_args(OnBad))}")
        self.on_bad = on_bad
        self.skipped = 0  # updates in this epoch
        self.in_a_row = 0
        self._first = ""  # what was found first in this epoch
        self._spoiled = False  # the update at hand
        self._batch: tuple[Any, int] | None = None
        self._loss: Tensor | None = None
        self._before: _Before | None = None
        self._told: tuple[str, int] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before = None if self.on_bad == "continue" else _Before(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._before = self._batch = self._loss = None

    def on_train_batch_start(self, trainer: Any, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._before is not None and batch_idx % trainer.accumulate_grad_batches == 0:
            self._before.take()
        self._batch = batch, batch_idx

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach()

    def on_after_backward(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if trainer.fit_loop._should_accumulate():  # no update follows, before which there is a look
            self._look(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._look(trainer, pl_module)
        if self._spoiled and self._before is not None:
            self._before.put_back()
            _discard(optimizer, _scaler(trainer))
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row == MOST_IN_A_ROW:
                raise NonFiniteError(f"{self._first}; {MOST_IN_A_ROW} updates one after the other had to be skipped")
        else:
            self.in_a_row = 0
        self._spoiled = False

    def on_train_batch_end(self, *_: Any) -> None:
        self._batch = self._loss = None  # nobody else holds them until the next epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_weights(trainer, dict(pl_module.named_parameters()), {})
        if self.skipped:
            words = f"epoch {trainer.current_epoch}: updates skipped: {self.skipped}; the first: {self._first}"
            warnings.warn(words, stacklevel=2)
        self.skipped, self._first = 0, ""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        own = {name for name, _ in pl_module.named_parameters()}
        state = {name: x for name, x in checkpoint["state_dict"].items() if isinstance(x, Tensor)}
        parameters = {name: state.pop(name) for name in own & state.keys()}
        self._check_weights(trainer, parameters, state)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        stage = "sanity check" if trainer.sanity_checking else "validation"
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            stage += f" after step {trainer.global_step - 1} (epoch {trainer.current_epoch})"
        self._look_at_output(trainer, pl_module, outputs, batch, stage, batch_idx)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._look_at_output(trainer, pl_module, outputs, batch, "test", batch_idx)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "first": self._first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self._first = (state_dict[name] for name in ("skipped", "in_a_row", "first"))

    def _look(self, trainer: Any, pl_module: Any) -> None:
        """Look at the batch at hand, its loss and the gradients so far."""
        if self._batch is None or self._loss is None or self._spoiled:
            return
        (batch, batch_idx), scaler = self._batch, _scaler(trainer)
        watched = [self._loss, *(x for x in batch if x.is_floating_point())]
        gradients = [p.grad for group in trainer.optimizers[0].param_groups for p in group["params"]]
        wrong = _any_spoiled([*watched, *(x for x in gradients if x is not None and scaler is None)])
        own = given = wrong and _any_spoiled(watched)
        if trainer.world_size > 1:  # all stop, or skip, together; gradients are those of all, a loss is not
            flags = torch.tensor([given, wrong], dtype=torch.float32, device=self._loss.device)
            given, wrong = (trainer.strategy.reduce(flags, reduce_op="max") > 0).tolist()
        scale = torch.inf if scaler is None else scaler.get_scale()
        if not wrong and scale >= SMALLEST_SCALE:
            return
        self._spoiled = True
        if self._first and self.on_bad != "stop":  # said once an epoch
            return
        network = getattr(pl_module, "network", pl_module)
        named = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        before = self._before or _Before(pl_module)
        before.put_back()
        words = describe(pl_module, batch, self._loss, named, trainer.precision_plugin.forward_context)
        before.put_back()
        if scale < SMALLEST_SCALE:
            words = f"the GradScaler's scale has fallen to {scale:g}, because gradients overflow; {words}"
        elif given and not own:
            words = "another process met a number that is not finite"
        self._first = f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch_idx}): {words}"
        if self.on_bad == "stop":
            raise NonFiniteError(f"{self._first}. {self._advice(bool(spoiled_rows(batch[0])))}")
        if self.on_bad == "continue":
            warnings.warn(self._first, stacklevel=2)

    def _look_at_output(self, trainer: Any, module: Any, outputs: Any, batch: Any, stage: str, batch_idx: int) -> None:
        told = (stage.partition(" ")[0], trainer.current_epoch)
        if not isinstance(outputs, Tensor) or all_finite(outputs) or told == self._told:
            return
        words = describe(module, batch, outputs, {}, trainer.precision_plugin.forward_context)
        words = f"{stage}, batch {batch_idx}: {words}"
        if self.on_bad == "stop":
            raise NonFiniteError(f"{words}. {self._advice(bool(spoiled_rows(batch[0])))}")
        self._told = told
        warnings.warn(words, stacklevel=2)

    def _check_weights(self, trainer: Any, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Stop a run whose weights are not finite, or whose statistics are NaN (a mask may be infinite)."""
        if self.on_bad == "continue":
            return
        floats = {name: x for name, x in buffers.items() if x.is_floating_point()}
        if not _any_spoiled(list(parameters.values())) and not _norm(list(floats.values())).isnan():
            return
        names = [name for name, x in parameters.items() if not all_finite(x)]
        names += [name for name, x in floats.items() if x.isnan().any()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise NonFiniteError(
            f"after step {trainer.global_step - 1} (epoch {trainer.current_epoch}): not finite any more are "
            f"{', '.join(names[:3])}{more}; no checkpoint is written of them. {self._advice(False)}"
        )

    def _advice(self, data: bool) -> str:
        if data:
            return "Mend the data, or leave such batches out with on_bad: skip of FiniteGuard"
        return (
            "Lower model.optimizer.lr, set trainer.gradient_clip_val, or choose another on_bad of FiniteGuard than "
            f"{self.on_bad!r}"
        )


class _Before:
    """What a training batch changes apart from gradients: buffers, such as running statistics, and the mean loss."""

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        self.buffers = [buffer for buffer in module.buffers() if buffer.numel()]
        self.copies = [torch.empty_like(buffer) for buffer in self.buffers]
        losses = getattr(module, "train_loss", None)
        self.losses = losses if isinstance(losses, ImageMean) else None
        self.take()

    def take(self) -> None:
        _copy(self.buffers, self.copies)
        if self.losses is not None:
            self.total = self.losses.total(self.module.device)

    def put_back(self) -> None:
        _copy(self.copies, self.buffers)
        if self.losses is not None:
            self.losses.restore(self.total)


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if sources:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def _any_spoiled(tensors: list[Tensor]) -> bool:
    """Whether one of the tensors holds a NaN or an infinite number."""
    if _norm(tensors).isfinite():
        return False
    return not _norm(tensors, torch.inf).isfinite()  # numbers may be finite where their squares are not


def _norm(tensors: list[Tensor], order: float = 2.0) -> Tensor:
    """Of all numbers together, []; that of order 2 is read ten times as fast as the largest one on a CPU."""
    return nn.utils.get_total_norm([x.detach() for x in tensors if x.numel()], order)


def _scaler(trainer: Any) -> torch.amp.GradScaler | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _discard(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """Have the update that follows change nothing: parameters without gradients are left alone."""
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        # a fused optimizer, whose gradients the scaler has still to look at: it asks for some, and skips by itself
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.nan)
        return
    optimizer.zero_grad(set_to_none=True)
