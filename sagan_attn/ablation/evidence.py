"""What a trained cell is asked: its logits, how large the branches are, and what it loses without its attention."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sagan_attn.surgery import branch_share, foreign_keys, grafts_of, uniform_attention
from sagan_attn.surgery.heads import attentions

__all__ = ["Batches", "batches_of", "knockouts", "logits_of", "shares"]

Batches = Sequence[tuple[Tensor, Tensor]]


def batches_of(data: Any, loader: Any, device: torch.device) -> Batches:
    """All batches of a loader as the model takes them; a last one of a single image joins the one before it.

    data: the data module, after a fit and out of training, so that nothing is augmented.
    """
    batches = [data.on_after_batch_transfer((images.to(device), labels.to(device)), 0) for images, labels in loader]
    if len(batches) > 1 and len(batches[-1][1]) == 1:  # which has no other image to take keys from
        *batches, before, last = batches
        batches.append((torch.cat([before[0], last[0]]), torch.cat([before[1], last[1]])))
    return batches


def logits_of(module: Any, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] float32 and labels [N] on the CPU, in eval mode and the trainer's precision."""
    module.eval()
    with torch.no_grad(), module.trainer.precision_plugin.forward_context():
        logits = [module(images).float().cpu() for images, _ in batches]
    return torch.cat(logits), torch.cat([labels.cpu() for _, labels in batches])


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
