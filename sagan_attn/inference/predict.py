"""Classes of image files by a trained model, batch by batch."""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sagan_attn.bench.memory import peak_bytes
from sagan_attn.errors import ConfigError, DataError
from sagan_attn.training.data.preprocess import open_image
from sagan_attn.training.memory import is_out_of_memory
from sagan_attn.training.run import Run

__all__ = ["Prediction", "memory_batch", "predict_images"]

LARGEST_BATCH = 256  # more is not faster
SHARE = 0.5  # of the free memory that a batch may take


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image file.

    Args:
        file: the image.
        top: names and probabilities of the likeliest classes, likeliest first; empty for a broken image.
        image: uint8 [3, S, S], as the model sees it; None for a broken image.
        error: why the image cannot be read; None for one that was.
    """

    file: Path
    top: tuple[tuple[str, float], ...]
    image: Tensor | None
    error: str | None


def predict_images(
    run: Run,
    files: Sequence[Path],
    *,
    top_k: int = 5,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Prediction]:
    """What the model says of each file, in their order; a broken image is answered too, and the rest goes on.

    A batch is decoded by threads while the model is at the one before it. With `batch_size` None a batch takes at most
    half of the free memory, and half as many images wherever that is still too much.

    Raises:
        ConfigError: top_k or batch_size below 1, or an image alone that is too large for the memory.
    """
    for name, value in (("top_k", top_k), ("batch_size", 1 if batch_size is None else batch_size)):
        if value < 1:
            raise ConfigError(f"{name} ({value}) must be at least 1")
    device = torch.device(device)
    return _predictions(run, files, min(top_k, len(run.classes)), batch_size, device)


def memory_batch(run: Run, device: torch.device) -> int:
    """Images of a batch that takes half of the free memory, by what one image takes; at most 256.

    On a GPU the allocator knows; on a CPU it is taken for four times the most that a module is given and gives.
    """
    size = run.transform.image_size
    image = torch.rand(1, 3, size, size, device=device)
    with torch.inference_mode():
        one = peak_bytes(lambda: run.model(image), device) if device.type == "cuda" else _largest_maps(run.model, image)
    return int(max(1, min(LARGEST_BATCH, SHARE * _free_bytes(device) // (one + image.nbytes))))


def _largest_maps(model: nn.Module, image: Tensor) -> int:
    sizes = [image.nbytes]

    def note(module: nn.Module, given: tuple[object, ...], output: object) -> None:
        sizes.append(sum(one.nbytes for one in (*given, output) if isinstance(one, Tensor)))

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return 4 * max(sizes)


def _predictions(
    run: Run, files: Sequence[Path], top_k: int, batch_size: int | None, device: torch.device
) -> Iterator[Prediction]:
    run.model.to(device)
    size = memory_batch(run, device) if batch_size is None else batch_size
    batches = [files[start : start + size] for start in range(0, len(files), size)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        ahead: list[Future[Tensor | str]] = []
        for batch, following in zip([[], *batches], [*batches, []], strict=True):
            decoding, ahead = ahead, [threads.submit(_decode, run, file) for file in following]
            decoded = [future.result() for future in decoding]
            answers = iter(_answers(run, [one for one in decoded if isinstance(one, Tensor)], top_k, batch_size))
            for file, image in zip(batch, decoded, strict=True):
                if isinstance(image, str):
                    yield Prediction(file, (), None, image)
                else:
                    top = next(answers)
                    yield Prediction(file, top, image, None if top else f"the model gives no finite numbers for {file}")


def _decode(run: Run, file: Path) -> Tensor | str:
    """The image as the model takes it, in uint8, or why it cannot be read."""
    try:
        return run.transform.to_uint8(open_image(file))
    except DataError as error:
        return str(error)


def _answers(run: Run, images: list[Tensor], top_k: int, batch_size: int | None) -> list[tuple[tuple[str, float], ...]]:
    """The likeliest classes of each image; none where the model's numbers are not finite."""
    if not images:
        return []
    try:
        device = next(run.model.parameters()).device
        with torch.inference_mode():
            inputs = run.transform.normalize(torch.stack(images).to(device))
            probabilities, order = run.model(inputs).float().softmax(dim=1).cpu().topk(top_k)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if batch_size is not None or len(images) == 1:
            hint = "take a smaller batch_size" if len(images) > 1 else "free some of it"
            raise ConfigError(f"there is not enough memory for {len(images)} images at once: {hint}") from error
    else:
        return [
            tuple((run.classes[index], value) for index, value in zip(indices, values, strict=True))
            if all(map(math.isfinite, values))
            else ()
            for indices, values in zip(order.tolist(), probabilities.tolist(), strict=True)
        ]
    middle = len(images) // 2  # out of the except clause, whose error holds what was computed
    return [answer for half in (images[:middle], images[middle:]) for answer in _answers(run, half, top_k, batch_size)]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
