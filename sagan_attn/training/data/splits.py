"""Which training images are trained on and which are kept for validation."""

from collections import Counter
from collections.abc import Sequence

import torch

from sagan_attn.errors import DataError
from sagan_attn.training.data.seeds import stateless_seed

__all__ = ["seeded_order", "split_indices", "stratified_split"]


def seeded_order(n: int, purpose: str, *parts: int) -> list[int]:
    """A permutation of range(n) that depends on the arguments alone."""
    generator = torch.Generator().manual_seed(stateless_seed(purpose, *parts))
    return torch.randperm(n, generator=generator).tolist()


def stratified_split(
    labels: Sequence[int], fraction: float, order: Sequence[int], keep: int
) -> tuple[list[int], list[int]]:
    """Disjoint (split off, rest) indices into `labels`, both in the order of the permutation `order`.

    Of a class of c images round(c * fraction) are split off, but at least one, and so many at most that `keep` (1 or
    more) are left, or one in a class that has no more than `keep`. An image alone in its class stays.
    """
    counts = Counter(labels)
    room = {label: max(count - keep, min(count - 1, 1)) for label, count in counts.items()}
    due = {label: min(max(round(count * fraction), 1), room[label]) for label, count in counts.items()}
    split_off, rest = [], []
    for index in order:
        if due[labels[index]]:
            due[labels[index]] -= 1
            split_off.append(index)
        else:
            rest.append(index)
    return split_off, rest


def split_indices(
    n: int, val_fraction: float, seed: int, limit_train: int | None, labels: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Disjoint (train, val) indices into n training images, each ascending; with `labels` stratified by them.

    The validation part depends on n, `val_fraction`, `seed` and `labels` only, so a limited run validates on the same
    images.

    Raises:
        DataError: a part would be empty, or limit_train exceeds what there is.
    """
    order = seeded_order(n, "split", seed)
    if labels is None or not val_fraction:
        n_val = round(n * val_fraction)
        val, train = order[:n_val], order[n_val:]
    else:
        val, train = stratified_split(labels, val_fraction, order, keep=1)
    if (val_fraction and not val) or not train:
        raise DataError(
            f"val_fraction ({val_fraction}) of {n} training images leaves {len(train)} to train on and {len(val)} to "
            "validate on: both must be above 0"
        )
    if limit_train is not None and limit_train > len(train):
        raise DataError(f"limit_train ({limit_train}) exceeds the {len(train)} training images there are")
    return sorted(train[:limit_train]), sorted(val)
