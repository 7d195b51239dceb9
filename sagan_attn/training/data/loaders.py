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
    """The collate function of sources that hand over whole batches; a module-level name, so that workers find
    it."""
    return batch


class EpochSampler(DistributedSampler):
    """Shuffles by (seed, epoch) alone and leaves out the batches of this epoch that a resumed run has already
    seen.

    position: answers how many batches of the current epoch are done, asked when the first batch is fetched.
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

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.position() * self.batch_size, None)


class TrainLoader(DataLoader):
    """A DataLoader that starts its workers at the first batch, and tells Lightning that it can resume.

    Lightning makes the iterator before it sets the sampler's epoch and restores its own progress; workers
    that start then would prefetch the wrong epoch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Lightning asks for this when it writes a checkpoint: what the position in the epoch depends on."""
        if not isinstance(self.sampler, EpochSampler):  # Lightning puts its own in for overfit_batches
            return {}
        return {"batches_done": self.sampler.position(), **self._order()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The position itself is restored by Lightning's own progress; here it is checked that it still means
        the same.

        Raises:
            DataError: the checkpoint lies in mid-epoch and another order or batch size would repeat some
            images and
                skip others.
        """
        if not isinstance(self.sampler, EpochSampler) or not state_dict:
            return
        mid_epoch = 0 < state_dict["batches_done"] < state_dict["batches"]
        changed = [key for key, value in self._order().items() if state_dict[key] != value]
        if mid_epoch and changed:
            found = ", ".join(f"{key} {state_dict[key]} -> {self._order()[key]}" for key in changed)
            raise DataError(
                f"the checkpoint was written in mid-epoch and the order of the training images has changed "
                f"({found}): resume with the options of the first run, or from a checkpoint written at an epoch's end"
            )

    def _order(self) -> dict[str, int]:
        sampler = self.sampler
        return {
            "batches": len(self),
            "images": len(sampler.dataset),  # type: ignore[attr-defined]
            "batch_size": sampler.batch_size,  # type: ignore[attr-defined]
            "order_seed": sampler.seed,  # type: ignore[attr-defined]
            "num_replicas": sampler.num_replicas,  # type: ignore[attr-defined]
        }
