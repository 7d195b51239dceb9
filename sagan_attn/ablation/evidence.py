"""What a trained cell is asked: its logits, how large the branches are, and what it loses without its attention."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sagan_attn.surgery import branch_share, foreign_keys, grafts_of, uniform_attention
from sagan_attn.surgery.heads import attentions

__all__ = ["Batches", "accuracy", "knockouts", "logits_of", "shares"]


class Batches:
    """All batches of a loader as the model takes them, again and again; a last one of a single image joins the one
    before it, because it has no other image to take keys from.

    data: the data module, after a fit and out of training, so that nothing is augmented.
    """

    def __init__(self, data: Any, loader: Any, device: torch.device) -> None:
        self.data, self.loader, self.device = data, loader, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        held = None
        for images, labels in self.loader:
            batch = self.data.on_after_batch_transfer((images.to(self.device), labels.to(self.device)), 0)
            if held is not None and len(batch[1]) == 1:
                held = torch.cat([held[0], batch[0]]), torch.cat([held[1], batch[1]])
                continue
            if held is not None:
                yield held
            held = batch
        if held is not None:
            yield held


def logits_of(module: Any, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] float32 and labels [N] on the CPU, in eval mode and the trainer's precision."""
    module.eval()
    with torch.no_grad(), module.trainer.precision_plugin.forward_context():
        found = [(module(images).float().cpu(), labels.cpu()) for images, labels in batches]
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def knockouts(module: Any, batches: Batches) -> dict[str, float]:
    """Accuracy as trained, and with all grafts disabled; with attention in them also with its weights made uniform
    and with the keys of another image. Empty without grafts."""
    network = module.network
    grafts = grafts_of(network)
    if not len(grafts):
        return {}
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "as_trained": nullcontext,
        "disabled": grafts.disabled,
    }
    if attentions(network):
        ways |= {"uniform": lambda: uniform_attention(network), "other_image": lambda: foreign_keys(network)}
    found = {}
    for name, way in ways.items():
        with way():
            found[name] = accuracy(*logits_of(module, batches))
    return found


def shares(module: Any, batches: Batches) -> dict[str, dict[str, float]]:
    """Path of each graft -> the size of its branch against the trunk, averaged over images."""
    if not len(grafts_of(module.network)):
        return {}
    with module.trainer.precision_plugin.forward_context():
        found = branch_share(module.network, batches)
    return {path: {"branch_share": float(share)} for path, share in found.items()}
