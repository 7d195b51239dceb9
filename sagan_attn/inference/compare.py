"""Two tested runs on the same images: who is right where, and what each costs."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sagan_attn.bench.timing import Budget, Call, interleaved
from sagan_attn.errors import CheckpointError
from sagan_attn.evaluation.pairs import Pairing, pair
from sagan_attn.evaluation.scores import Scores, scores_of
from sagan_attn.surgery import grafts_of
from sagan_attn.surgery.cost import probe_flops
from sagan_attn.training.run import Run, RunPaths
from sagan_attn.training.test_results import StoredLogits, read_test_results

__all__ = ["Change", "Comparison", "RunCost", "compare_runs", "costs_of"]


@dataclass(frozen=True)
class Change:
    """An image that one of two models alone gets right.

    Args:
        index: in the test split.
        label, a, b: true class and what the models say, as numbers.
        probability_a, probability_b: that the models give the true class.
    """

    index: int
    label: int
    a: int
    b: int
    probability_a: float
    probability_b: float

    @property
    def gained(self) -> bool:
        """Whether b is the one that is right."""
        return self.b == self.label


@dataclass(frozen=True)
class Comparison:
    """Of run a with run b. `changes`: those with the largest change of the true class's probability first."""

    pairing: Pairing
    scores: tuple[Scores, Scores]
    changes: list[Change]


@dataclass(frozen=True)
class RunCost:
    """What a model costs.

    Args:
        parameters, graft_parameters: all, and those of grafts.
        flops: of a forward pass of one image; a multiply-add counts as 2.
        milliseconds: of that, median; None if not timed. slowest, fastest: its largest and smallest reading.
    """

    parameters: int
    graft_parameters: int
    flops: int
    milliseconds: float | None
    fastest: float | None
    slowest: float | None


def compare_runs(a: Path, b: Path) -> Comparison:
    """Compare what `test` left in two run folders.

    Raises:
        CheckpointError: a run that was not tested, or runs tested on different data.
    """
    if a.resolve() == b.resolve():
        raise CheckpointError(f"{a} and {b} are the same run: name two")
    results = [read_test_results(RunPaths(folder)) for folder in (a, b)]
    for folder, one in zip((a, b), results, strict=True):
        if one.test_data is None:
            raise CheckpointError(
                f"{folder} was tested by an earlier version, which did not note the data: run "
                f"`python train.py test --config {folder / 'config.yaml'}` again"
            )
    first, second = results
    if first.test_data != second.test_data:
        raise CheckpointError(f"{a} and {b} were tested on different data: {_difference(first, second)}")
    predicted = [one.logits.argmax(dim=1) for one in results]
    return Comparison(
        pair(predicted[0], predicted[1], first.labels),
        (scores_of(first.logits, first.labels), scores_of(second.logits, second.labels)),
        _changes(results, predicted),
    )


def costs_of(runs: Sequence[Run], timed: bool) -> list[RunCost]:
    """The cost of each model on an image of its own size, on the CPU; timed in turn."""
    images = [torch.rand(1, 3, run.transform.image_size, run.transform.image_size) for run in runs]
    seconds: dict[str, list[float]] = {}
    if timed:
        with torch.inference_mode():
            calls = {str(n): _call(run.model, image) for n, (run, image) in enumerate(zip(runs, images, strict=True))}
            seconds = interleaved(calls, Budget(seconds=0.5 * len(runs)), torch.device("cpu"))
    found = []
    for number, (run, image) in enumerate(zip(runs, images, strict=True)):
        readings = [1000 * one for one in seconds.get(str(number), [])]
        found.append(
            RunCost(
                parameters=sum(p.numel() for p in run.model.parameters()),
                graft_parameters=sum(p.numel() for p in grafts_of(run.model).parameters()),
                flops=probe_flops(run.model, image, {})[1],
                milliseconds=statistics.median(readings) if readings else None,
                fastest=min(readings, default=None),
                slowest=max(readings, default=None),
            )
        )
    return found


def _call(model: nn.Module, image: Tensor) -> Call:
    return lambda: model(image)


def _changes(results: Sequence[StoredLogits], predicted: Sequence[Tensor]) -> list[Change]:
    labels = results[0].labels
    right = [one == labels for one in predicted]
    shares = [one.logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1) for one in results]
    changed = (right[0] != right[1]).nonzero().squeeze(1).tolist()
    found = [
        Change(index, *(int(one[index]) for one in (labels, *predicted)), *(float(one[index]) for one in shares))
        for index in changed
    ]
    return sorted(found, key=lambda one: -abs(one.probability_b - one.probability_a))


def _difference(a: StoredLogits, b: StoredLogits) -> str:
    if len(a.labels) != len(b.labels):
        return f"{len(a.labels):,} and {len(b.labels):,} images"
    if a.logits.shape[1] != b.logits.shape[1]:
        return f"{a.logits.shape[1]} and {b.logits.shape[1]} classes"
    if not torch.equal(a.labels, b.labels):
        return f"{int((a.labels != b.labels).sum()):,} of {len(a.labels):,} labels differ"
    return "the images or the names of the classes are not the same"
