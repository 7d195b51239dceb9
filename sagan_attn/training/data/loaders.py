"""The loader of the training part: its order is a pure function of (seed, epoch), and it can begin in
mid-epoch."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sagan_attn.errors import DataError
from sagan_attn.training.data.seeds import stateless_seed

__all__ = ["EpochSampler", "TrainLoader", "keep_batch"]


def keep_batch(batch: Any) -> Any:
    """The collate function of sources that hand over whole batches; a module-level name, so that workers
    find it."""
    return batch


class EpochSampler(DistributedSampler):
    """Shuffles by (seed, epoch) alone; the first pass after a resume leaves out the batches already seen.

    position: how many batches of the epoch are done; asked when that first pass fetches its first batch.
    """

    def __init__(
        self,
        source: Dataset,
        *,
        batch_size: int,
        seed: int,
        drop_last: bool,
        num_replicas: int,
        rank: int,
        position: Callable[[], int],
    ) -> None:
        # DistributedSampler shuffles by seed + epoch: unhashed, seed 1 would repeat seed 0's epochs one later
        order_seed = stateless_seed("order", seed)
        super().__init__(source, num_replicas, rank, shuffle=True, seed=order_seed, drop_last=drop_last)
        self.batch_size = batch_size
        self.position = position
        self.resumed_from: dict[str, int] | None = None

    def __iter__(self) -> Iterator[int]:
        before, self.resumed_from = self.resumed_from, None
        done = 0 if before is None else self.position()
        if before is not None and done:
            self._check_same_order(before)
        return itertools.islice(super().__iter__(), done * self.batch_size, None)

    def order(self) -> dict[str, int]:
        """What the images of the n-th batch of an epoch depend on."""
        return {
            "images": len(self.dataset),  # type: ignore[arg-type]
            "batch_size": self.batch_size,
            "order_seed": self.seed,
            "num_replicas": self.num_replicas,
        }

    def _check_same_order(self, before: dict[str, int]) -> None:
        changed = [f"{key} {before[key]} -> {value}" for key, value in self.order().items() if before[key] != value]
        if changed:
            raise DataError(
                "the checkpoint was written in mid-epoch and the order of the training images has changed "
                f"({', '.join(changed)}): resume with the options of the first run, or from a checkpoint written at "
                "an epoch's end"
            )


class TrainLoader(DataLoader):
    """A DataLoader that starts its workers at the first batch, and tells Lightning that it can resume.

    Lightning makes the iterator before it sets the sampler's epoch and restores its own progress; workers
    that start then would prefetch the wrong epoch. The position in the epoch is Lightning's to save; saved
    here is what must not change for it to keep its meaning (a DataError when the first batch is fetched).
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        # Lightning puts another sampler in for overfit_batches
        return self.sampler.order() if isinstance(self.sampler, EpochSampler) else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if isinstance(self.sampler, EpochSampler):
            self.sampler.resumed_from = state_dict or None
