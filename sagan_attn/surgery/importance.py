"""Which heads of grafted blocks matter."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_attn.blocks.base import MapAttention
from sagan_attn.errors import GraftError
from sagan_attn.surgery.heads import attentions
from sagan_attn.surgery.probe import quiet

__all__ = ["Method", "head_importance"]

Method = Literal["gradient", "leave_one_out"]
Loss = Callable[[Any, Any], Tensor]


def head_importance(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Any]],
    method: Method = "gradient",
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """How much the loss depends on each head of each graft.

    The model runs in eval mode; mode, gradients and random state are as before afterwards, and no hook stays.
    "gradient" needs one forward and backward pass a batch, "leave_one_out" one forward pass for each head and one
    more.

    Source: Michel et al., Are Sixteen Heads Really Better than One?, 2019 (arXiv:1905.10650): importance is the mean
    over samples of |dL/d xi|, where xi = 1 is a factor on the head's output, divided by the l2 norm over the heads of
    its layer.

    Args:
        model: a grafted model, not compiled. While a gate is 0 its heads do nothing, and their importance is 0.
        batches: images [B, C, H, W] and labels, both moved to the model's device.
        method: "gradient", as above; "leave_one_out", by how much the mean loss grows without the head, which is
            below 0 where the model is better without it.
        loss: (output of the model, labels) -> one loss a sample, [B]; None for the cross-entropy of logits.

    Returns:
        Path of each attention -> importance of its heads, float32 [h], on the CPU. The paths go into `prune_heads`.

    Raises:
        GraftError: an unknown method, a model without grafted attention, one whose attention does not run, no
            batches, or a loss that is not one number a sample.
    """
    if method not in get_args(Method):
        raise GraftError(f"method ({method!r}) must be {' or '.join(map(repr, get_args(Method)))}")
    found = attentions(model)
    if not found:
        raise GraftError(f"{type(model).__name__} has no grafted attention, and so no heads")
    measure = _gradients if method == "gradient" else _increases
    device = next((p.device for p in model.parameters()), None)
    sums = {path: torch.zeros(attention.heads, dtype=torch.float64) for path, attention in found.items()}
    samples = 0
    with quiet(model), _Masks(found).applied() as masks:
        for images, labels in batches:
            images = images.to(device)
            labels = labels.to(device) if isinstance(labels, Tensor) else labels
            masks.reset(images)

            def losses(images: Tensor = images, labels: Any = labels) -> Tensor:
                return _losses(loss or _cross_entropy, model(images), labels, len(images))

            for path, of_batch in measure(masks, losses).items():
                sums[path] += of_batch.double().cpu()
            samples += len(images)
    if not samples:
        raise GraftError("batches is empty: nothing was measured (an iterator that was used up?)")
    means = {path: total / samples for path, total in sums.items()}
    if method == "gradient":
        means = {path: F.normalize(mean, dim=0) for path, mean in means.items()}
    return {path: mean.float() for path, mean in means.items()}


class _Masks:
    """A factor for each sample and head of each attention, on the values of the head.

    Weights of attention do not depend on values, and a head's output is linear in its own; pooling by the maximum
    keeps factors from 0 on. So this is a factor on the head's output, and works without an output convolution too.
    """

    def __init__(self, attentions: dict[str, MapAttention]) -> None:
        self.attentions = attentions
        self.factors: dict[str, Tensor] = {}
        self.ran: set[str] = set()

    def reset(self, images: Tensor) -> None:
        """Factors of 1 for these images, in the precision of the weights."""
        for path, attention in self.attentions.items():
            weight = attention.value.weight
            self.factors[path] = torch.ones(len(images), attention.heads, dtype=weight.dtype, device=weight.device)

    @contextmanager
    def applied(self) -> Iterator["_Masks"]:
        """Inside, forward passes of the attentions use the factors."""
        handles = []
        try:
            for path, attention in self.attentions.items():
                handles.append(attention.value.register_forward_hook(self._hook(path)))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def check_ran(self) -> None:
        """Raise `GraftError` for attentions that no forward pass has used."""
        idle = [path for path in self.attentions if path not in self.ran]
        if idle:
            raise GraftError(
                f"attention of {', '.join(idle)} did not run: the graft is disabled, its module never fires, or the "
                "model is compiled (pass the one that was compiled)"
            )

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def scale(module: nn.Module, args: Any, value: Tensor) -> Tensor:
            self.ran.add(path)
            factors = self.factors[path]
            if len(value) != len(factors):
                raise GraftError(
                    f"{path!r} gets {len(value)} maps for {len(factors)} images: which is whose is unknown"
                )
            by_channel = factors.repeat_interleave(value.shape[1] // factors.shape[1], dim=1)  # [B, h*D]
            return value * by_channel[:, :, None, None].to(value.dtype)

        return scale


def _gradients(masks: _Masks, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Sum over samples of the size of the loss's gradient by each head's factor."""
    with torch.enable_grad():
        for factors in masks.factors.values():
            factors.requires_grad_()
        total = losses().sum()  # each sample has factors of its own, so the gradients are those of single samples
    masks.check_ran()
    gradients = torch.autograd.grad(total, list(masks.factors.values()), materialize_grads=True)
    return {path: gradient.abs().sum(0) for path, gradient in zip(masks.factors, gradients, strict=True)}


def _increases(masks: _Masks, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Sum over samples of what the loss grows by without each head."""
    before = losses().double().sum()
    masks.check_ran()
    increases = {}
    for path, factors in masks.factors.items():
        grown = []
        for head in range(factors.shape[1]):
            factors[:, head] = 0
            grown.append(losses().double().sum() - before)
            factors[:, head] = 1
        increases[path] = torch.stack(grown)
    return increases


def _cross_entropy(logits: Any, labels: Any) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _losses(loss: Loss, output: Any, labels: Any, samples: int) -> Tensor:
    losses = loss(output, labels)
    if not isinstance(losses, Tensor) or losses.shape != (samples,):
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise GraftError(f"loss gave {found} for {samples} images; it must give one number each (reduction='none')")
    return losses
