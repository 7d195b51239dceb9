"""What grafts cost a host: a training step, batch-1 latency, memory, kernels and the largest batch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan_attn.bench.machine import summary
from sagan_attn.bench.memory import largest_batch, peak_bytes
from sagan_attn.bench.timing import Budget, Call, interleaved, ratios
from sagan_attn.surgery import fuse, grafts_of

__all__ = ["Classification", "Detection", "How", "Task", "measure_step"]

GAMMA = 0.1  # of the grafts; at 0 `fuse` would leave them out


class Task(Protocol):
    """Random examples for a kind of model, and its loss on them."""

    def batch(self, count: int, device: torch.device) -> Any:
        """New random images with their targets."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

    def images(self, batch: Any) -> Any:
        """What the model takes in eval mode."""
        ...


@dataclass(frozen=True)
class Classification:
    """Images [B, 3, H, W] and one of so many classes each."""

    size: tuple[int, int]
    num_classes: int
    channels_last: bool = False

    def batch(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        images = torch.randn(count, 3, *self.size, device=device)
        images = images.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        return images, torch.randint(0, self.num_classes, (count,), device=device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def images(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[0]


@dataclass(frozen=True)
class Detection:
    """A list of images [3, H, W], each with 8 boxes, as torchvision's detectors take them."""

    size: tuple[int, int]
    num_classes: int
    boxes: int = 8

    def batch(self, count: int, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        side = torch.tensor([self.size[1], self.size[0]] * 2, device=device)
        targets = []
        for _ in range(count):
            corner = 0.6 * torch.rand(self.boxes, 2, device=device)
            far = corner + 0.05 + 0.3 * torch.rand(self.boxes, 2, device=device)
            labels = torch.randint(1, self.num_classes, (self.boxes,), device=device)
            targets.append({"boxes": torch.cat([corner, far], 1) * side, "labels": labels})
        return list(torch.rand(count, 3, *self.size, device=device)), targets

    def loss(self, model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> Tensor:
        return sum(model(*batch).values(), torch.zeros((), device=batch[0][0].device))

    def images(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> list[Tensor]:
        return batch[0]


@dataclass(frozen=True)
class How:
    """The device, the precision ("fp32", or "bf16" by autocast), the layout, and how often is measured."""

    device: torch.device
    budget: Budget
    precision: str = "fp32"
    channels_last: bool = False
    find_largest_batch: bool = True

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def measure_step(host: nn.Module, grafted: nn.Module, task: Task, batch: int, how: How) -> dict[str, Any]:
    """Milliseconds of a training step (forward, backward, SGD) and of a batch-1 forward pass, and the rest.

    host and grafted start from the same weights; both are changed.
    """
    models = {"host": _ready(host, how), "grafted": _ready(grafted, how)}
    with torch.no_grad():
        for gamma in grafts_of(models["grafted"]).gammas().values():
            gamma.fill_(GAMMA)
    fused = {"fused": fuse(models["grafted"])}
    steps = {name: _trainer(model.train(), task, how) for name, model in models.items()}
    now = [task.batch(batch, how.device)]

    def refresh(count: int = batch) -> None:
        now[0] = task.batch(count, how.device)

    calls: dict[str, Call] = {name: _bound(step, now) for name, step in steps.items()}
    seconds = interleaved(calls, how.budget, how.device, refresh)
    result: dict[str, Any] = {
        "step_ms": {name: summary([1000 * s for s in values]) for name, values in seconds.items()},
        "images_per_second": {name: summary([batch / s for s in values]) for name, values in seconds.items()},
        "grafted_over_host": ratios(seconds, "grafted", "host"),
        "peak_bytes": {name: peak_bytes(call, how.device) for name, call in calls.items()},
        "readings": {name: [1000 * s for s in values] for name, values in seconds.items()},
    }
    if how.device.type == "cuda":
        result["kernels_of_a_step"] = {name: kernels(call) for name, call in calls.items()}

    refresh(1)
    looks = {name: _looker(model.eval(), task, how, now) for name, model in {**models, **fused}.items()}
    seconds = interleaved(looks, how.budget, how.device, lambda: refresh(1))
    result["latency_ms"] = {name: summary([1000 * s for s in values]) for name, values in seconds.items()}
    result["latency_over_host"] = {name: ratios(seconds, name, "host") for name in ("grafted", "fused")}
    if how.device.type == "cuda":
        result["kernels_of_a_forward"] = {name: kernels(call) for name, call in looks.items()}
        if how.find_largest_batch:
            now.clear()
            found = {name: _largest(model.train(), steps[name], task, how) for name, model in models.items()}
            result["largest_batch"] = {name: size for name, (size, _) in found.items()}
            result["larger_batch_fails_with"] = {name: reason for name, (_, reason) in found.items()}
    return result


def _ready(model: nn.Module, how: How) -> nn.Module:
    model = model.to(how.device)
    return model.to(memory_format=torch.channels_last) if how.channels_last else model  # type: ignore[call-overload]


def _trainer(model: nn.Module, task: Task, how: How) -> Callable[[Any], None]:
    # a small rate: the labels are random, and losses that run away would change what a detector has to do
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)

    def step(batch: Any) -> None:
        with how.autocast():
            loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _bound(step: Callable[[Any], None], now: list[Any]) -> Call:
    return lambda: step(now[0])


def _looker(model: nn.Module, task: Task, how: How, now: list[Any]) -> Call:
    def look() -> None:
        with torch.inference_mode(), how.autocast():
            model(task.images(now[0]))

    return look


def kernels(call: Call) -> int:
    """How many kernels a call launches on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    recorder: Any = recorded.profiler
    return sum("LaunchKernel" in event.name() for event in recorder.kineto_results.events())


def _largest(model: nn.Module, step: Callable[[Any], None], task: Task, how: How) -> tuple[int, str]:
    """The largest batch of a training step, and what a larger one fails with: kernels may give up before memory."""
    reason = ""

    def fits(batch: int) -> bool:
        nonlocal reason
        failure = ""
        try:
            step(task.batch(batch, how.device))
            torch.cuda.synchronize(how.device)
        except RuntimeError as error:  # out of memory is one, too
            failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        # outside of the handler, whose traceback keeps the tensors of the step
        reason = failure or reason
        model.zero_grad()
        torch.cuda.empty_cache()
        return not failure

    return largest_batch(fits), reason
