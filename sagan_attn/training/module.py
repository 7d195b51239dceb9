"""The LightningModule: a classifier with grafts."""

import warnings
from dataclasses import replace
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from sagan_attn.errors import CheckpointError, ConfigError
from sagan_attn.surgery import Grafts, grafts_of
from sagan_attn.training.compiling import check_compile
from sagan_attn.training.freezing import host_norms_to_eval, host_parameters
from sagan_attn.training.hosts import HostConfig
from sagan_attn.training.mean import ImageMean
from sagan_attn.training.network import GraftConfig, build_network
from sagan_attn.training.optim import OptimizerConfig, ScheduleConfig, clip_by_norm, create_optimizer, create_schedule

__all__ = ["ClassifierModule"]

GAMMA_MOVED = 1e-3


class ClassifierModule(L.LightningModule):
    """A host with grafts, trained as an image classifier by cross-entropy.

    The network is built when training starts, from the data module's classes and image size. Logged each epoch:
    train/loss, val/loss, val/accuracy, lr/<group>, gamma/<graft>. Batches are (images [B, C, H, W], labels [B] of
    class numbers or [B, classes] of probabilities).

    Args:
        host: the CNN.
        grafts: what is grafted into it, in this order.
        optimizer: optimizer and learning rates.
        schedule: learning rate over time.
        num_classes: None for the data's; a number must agree with them.
        label_smoothing: share of the target spread over all classes.
        freeze_host: train the grafts and the head alone; the host's batch norms stay in eval mode.
        unfreeze_epoch: with freeze_host, from this epoch on (counted from 0) the host trains too, at
            optimizer.host_lr_scale times the rate, and its batch norms with it; None for never.
        channels_last: keep maps in channels-last memory format, the faster one for convolutions on most devices.
        compile: compile the network with torch.compile.
        compile_mode: of torch.compile: "default", "reduce-overhead" (CUDA graphs), "max-autotune" (with them too) or
            "max-autotune-no-cudagraphs"; None for its default.

    Raises:
        ConfigError: options that contradict the data or each other.
    """

    network: nn.Module

    def __init__(
        self,
        host: HostConfig,
        grafts: list[GraftConfig] | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  (frozen)
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008  (frozen)
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        freeze_host: bool = False,
        unfreeze_epoch: int | None = None,
        channels_last: bool = True,
        compile: bool = False,
        compile_mode: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing ({label_smoothing}) must lie in [0, 1)")
        if unfreeze_epoch is not None and (unfreeze_epoch < 1 or not freeze_host):
            raise ConfigError(f"unfreeze_epoch ({unfreeze_epoch}) must be at least 1, and goes with freeze_host: true")
        check_compile(compile, compile_mode)
        self.host = host
        self.graft_configs = list(grafts or [])
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.freeze_host = freeze_host
        self.unfreeze_epoch = unfreeze_epoch
        self._host_rests = freeze_host
        self._resting: list[nn.Parameter] = []
        self.channels_last = channels_last
        self.compile_network = compile
        self.compile_mode = compile_mode
        self._first_gammas: dict[str, float] = {}
        self.train_loss = ImageMean()
        self.test_outputs: list[tuple[Tensor, Tensor]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes here which hook is under way, some forty times a step; a module's own way takes far longer
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def configure_model(self) -> None:
        if hasattr(self, "network"):
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.num_classes not in (None, data.num_classes):
            raise ConfigError(
                f"model.num_classes ({self.num_classes}) does not match the data, which have {data.num_classes} "
                "classes: leave it out to take theirs"
            )
        host = self.host
        if self.trainer.state.fn != "fit" or self.trainer.ckpt_path:
            host = replace(host, pretrained=False, weights=None)  # the checkpoint brings all weights
        network = build_network(
            host, self.graft_configs, data.num_classes, data.in_channels, data.preprocess.image_size
        )
        self.setup_network(network, data.num_classes)

    def setup_network(self, network: nn.Module, num_classes: int) -> None:
        """Take a built network: freeze, lay out in memory and compile it as asked."""
        if self.freeze_host:
            self._resting = host_parameters(network)
            if self.unfreeze_epoch is None:
                for parameter in self._resting:
                    parameter.requires_grad_(False)
        if self.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile_network:
            network.compile(mode=self.compile_mode)
        self.network = network
        self.train(self.training)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    @property
    def resting(self) -> list[nn.Parameter]:
        """The host's parameters, as long as they wait for `unfreeze_epoch`."""
        return self._resting if self._host_rests and self.unfreeze_epoch is not None else []

    @property
    def grafts(self) -> Grafts:
        """The grafts in the network."""
        return grafts_of(self.network)

    def train(self, mode: bool = True) -> "ClassifierModule":
        super().train(mode)
        if mode and self._host_rests and hasattr(self, "network"):
            host_norms_to_eval(self.network)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits = self.network(images)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"host {self.host.name!r} gives a {type(logits).__name__} in training, not logits: switch its "
                "auxiliary heads off in host.options"
            )
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images).float(), labels, label_smoothing=self.label_smoothing)
        if batch_idx == 0:  # not in on_train_epoch_start: Lightning leaves it out when a run goes on
            self.train_loss.reset()
        self.train_loss.add(loss, len(images))  # logged once an epoch
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images).float()
        self.val_accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log("val/loss", loss, batch_size=len(images), sync_dist=True)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images).float()
        self.test_accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log("test/loss", loss, batch_size=len(images))
        self.log("test/accuracy", self.test_accuracy)
        self.test_outputs.append((logits.cpu(), labels.cpu()))
        return loss

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Probabilities [B, classes]."""
        return self(batch[0]).float().softmax(dim=1)

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer(self.network, self.optimizer_config)
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ConfigError("trainer.max_epochs must be given, at least 1: the learning rate is planned over it")
        if self.unfreeze_epoch is not None and self.unfreeze_epoch >= epochs:
            raise ConfigError(
                f"unfreeze_epoch ({self.unfreeze_epoch}) must lie below trainer.max_epochs ({epochs}); leave it out to "
                "keep the host frozen"
            )
        check_compile(self.compile_network, self.compile_mode, self.trainer.accumulate_grad_batches)
        steps = int(self.trainer.estimated_stepping_batches)
        if steps < 1:
            raise ConfigError("there is nothing to train: the trainer's limits leave 0 training batches")
        config = self.schedule_config
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            config = replace(config, warmup_epochs=0)  # its one epoch leaves no room for a warm-up
        schedule = create_schedule(optimizer, config, epochs, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip_by_norm(optimizer, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if hasattr(scheduler, "step_update"):  # timm's schedulers are told the update instead of counting
            scheduler.step_update(num_updates=self.global_step)
        else:
            scheduler.step()

    def on_fit_start(self) -> None:
        if self.freeze_host:  # Lightning warns of modules in eval mode, which here are as they should be
            warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
        self._first_gammas = {name: gamma.item() for name, gamma in self.grafts.gammas().items()}

    def _rest_host(self) -> None:
        """Freeze or unfreeze the host, by the epoch.

        The optimizer has its parameters from the start, and leaves alone those without gradients. DDP wants gradients
        of the same parameters throughout: there they are made, and dropped.
        """
        if self.unfreeze_epoch is None:
            return
        self._host_rests = self.current_epoch < self.unfreeze_epoch
        for parameter in self._resting:
            parameter.requires_grad_(not self._host_rests or isinstance(self.trainer.strategy, ParallelStrategy))
        self.train()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._host_rests:
            for parameter in self._resting:
                parameter.grad = None

    def on_train_epoch_start(self) -> None:
        self._rest_host()

    def on_train_start(self) -> None:
        self._rest_host()  # a run that goes on in mid-epoch does not start the epoch
        # configure_optimizers had the loader made before the checkpoint was read: where it stopped is told to it here
        self.trainer.fit_loop._load_combined_loader_states()

    def on_train_epoch_end(self) -> None:
        loss, images = self.train_loss.mean(), self.train_loss.images
        if loss is not None:  # batch_size: processes count by their images
            self.log("train/loss", loss.to(self.device), prog_bar=True, batch_size=images, sync_dist=True)
        self.train_loss.reset()
        gammas = {name: gamma.item() for name, gamma in self.grafts.gammas().items()}
        for name, gamma in gammas.items():
            self.log(f"gamma/{name.removesuffix('.gamma')}", gamma, rank_zero_only=True)
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            self.log(f"lr/{group['name']}", group["lr"], rank_zero_only=True)
        moved = [not abs(gamma - self._first_gammas[name]) <= GAMMA_MOVED for name, gamma in gammas.items()]  # NaN has
        if self.current_epoch == 0 and moved and not any(moved):
            warnings.warn(
                f"no gamma has moved by more than {GAMMA_MOVED:g} in the first epoch: the grafts are as good as unused "
                "so far. Raise optimizer.gamma_lr_scale (now "
                f"{self.optimizer_config.gamma_lr_scale:g}), train longer, or graft at another site",
                stacklevel=2,
            )

    def on_test_start(self) -> None:
        if self.trainer.world_size > 1:
            raise ConfigError(
                f"testing on {self.trainer.world_size} processes would count some images twice: use trainer.devices: 1"
            )
        self.test_outputs = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        total = self.train_loss.total(self.device)
        checkpoint["train_loss"] = self.trainer.strategy.reduce(total, reduce_op="sum").cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fit(self.state_dict(), checkpoint.get("state_dict", {}), "the checkpoint")
        self.train_loss.reset()
        if "train_loss" in checkpoint:  # of all processes, which see as many images each
            self.train_loss.restore(checkpoint["train_loss"] / self.trainer.world_size)


def check_fit(own: dict[str, Tensor], state: dict[str, Tensor], what: str) -> None:
    """Raise `CheckpointError`, naming keys, unless `state` has just the keys and shapes of `own`."""
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is not in the model" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{what} does not fit the model: {'; '.join(problems[:3])}{more}")
