"""Whether what was exported computes what the model does."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sagan_attn.errors import ConfigError, SaganAttnError, first_line
from sagan_attn.export.programs import Runner

__all__ = ["TOLERANCE", "Agreement", "check_random", "check_real", "check_weights", "sizes_to_try"]

TOLERANCE = 1e-3
BATCHES = (1, 2, 7)
SMALLEST = 0.01  # logit that differences are a part of: smaller ones are sums in which larger numbers have cancelled

Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Agreement:
    """How far a model and what was exported of it agree on some images.

    Args:
        images: their number.
        shapes: those of the batches, as "Bx3xHxW".
        logits: largest absolute difference of a logit.
        probabilities: that of a probability.
        largest_logit: the largest absolute logit of the model.
        changed: images whose most probable class is another one.
    """

    images: int
    shapes: list[str]
    logits: float
    probabilities: float
    largest_logit: float
    changed: int


def sizes_to_try(model: nn.Module, image_size: int) -> tuple[list[Size], list[Size]]:
    """Sizes other than the model's own, odd ones and oblongs too: those that it takes, and those that it does not.

    Raises `ConfigError` for a model that takes none of them.
    """
    side = image_size
    taken, refused = [], []
    for size in ((side + 1, side + side // 2), (side + side // 4, side + 3), (2 * side, 2 * side)):
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, *size))
            taken.append(size)
        except Exception as error:  # whatever a model raises on images of a size it is not made for
            refused.append(size)
            reason = first_line(error)
    if not taken:
        raise ConfigError(
            f"the model takes no images of another size than {side} x {side} ({reason}); use --fixed-size"
        )
    return taken, refused


def check_random(
    model: nn.Module, exported: Runner, image_size: int, sizes: Sequence[Size], tolerance: float = TOLERANCE
) -> Agreement:
    """Compare on normally distributed images: several batches of [3, image_size, image_size], and one of each size.

    Raises `SaganAttnError` where the export fails or differs, or the model's logits are not finite.
    """
    shapes = [(batch, image_size, image_size) for batch in BATCHES]
    shapes += [(1 + number % 2, *size) for number, size in enumerate(sizes)]
    random = torch.Generator().manual_seed(0)
    images = (torch.randn(batch, 3, *size, generator=random) for batch, *size in shapes)
    return _compare(model, exported, images, tolerance, "; --fixed-size may do" if sizes else "")


def check_real(model: nn.Module, exported: Runner, images: Tensor, tolerance: float = TOLERANCE) -> Agreement:
    """Compare on images [N, 3, S, S] as the model takes them. Raises `SaganAttnError` as `check_random`."""
    return _compare(model, exported, images.split(16), tolerance)


def check_weights(model: nn.Module, exported: nn.Module) -> None:
    """Raise `SaganAttnError` unless the state dicts of both hold the same bits."""
    own, theirs = model.state_dict(), exported.state_dict()
    if own.keys() != theirs.keys():
        raise SaganAttnError(f"the weights of the export have other names: {sorted(own.keys() ^ theirs.keys())[:3]}")
    for key, tensor in own.items():
        bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, theirs[key])]  # NaN is not NaN
        if tensor.dtype != theirs[key].dtype or not torch.equal(*bits):
            raise SaganAttnError(f"{key} of the export has other numbers than that of the model")


def _compare(
    model: nn.Module, exported: Runner, batches: Iterable[Tensor], tolerance: float, hint: str = ""
) -> Agreement:
    parts = []
    with torch.no_grad():
        for images in batches:
            shape, expected = "x".join(map(str, images.shape)), model(images)
            try:
                logits = exported(images)
            except Exception as error:  # of torch and of ONNX Runtime
                raise SaganAttnError(f"the export fails for images {shape}: {first_line(error)}{hint}") from error
            parts.append(_agreement(expected, logits, shape, tolerance, hint))
    return Agreement(
        sum(part.images for part in parts),
        list(dict.fromkeys(shape for part in parts for shape in part.shapes)),
        max(part.logits for part in parts),
        max(part.probabilities for part in parts),
        max(part.largest_logit for part in parts),
        sum(part.changed for part in parts),
    )


def _agreement(expected: Tensor, logits: Tensor, shape: str, tolerance: float, hint: str) -> Agreement:
    if not expected.isfinite().all():
        raise SaganAttnError(f"the model gives numbers that are not finite for images {shape}")
    if logits.shape != expected.shape or logits.dtype != expected.dtype:
        raise SaganAttnError(
            f"the export gives {logits.dtype} {list(logits.shape)} for images {shape}, the model {expected.dtype} "
            f"{list(expected.shape)}{hint}"
        )
    largest = expected.abs().max().item()
    difference = (logits - expected).abs().max().item()
    probabilities = (logits.softmax(1) - expected.softmax(1)).abs().max().item()
    if not (difference <= tolerance * max(SMALLEST, largest) and probabilities <= tolerance):  # NaN is neither
        raise SaganAttnError(
            f"the export differs from the model by {difference:.3g} in logits of up to {largest:.3g} and by "
            f"{probabilities:.3g} in probabilities for images {shape}; allowed is {tolerance:g}, of the largest "
            f"logit and of probabilities{hint}"
        )
    changed = int((logits.argmax(1) != expected.argmax(1)).sum())
    return Agreement(len(expected), [shape], difference, probabilities, largest, changed)
