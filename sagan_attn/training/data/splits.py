"""Which training images are trained on and which are kept for validation."""

import torch

from sagan_attn.errors import DataError
from sagan_attn.training.data.seeds import stateless_seed

__all__ = ["seeded_order", "split_indices"]


def seeded_order(n: int, purpose: str, *parts: int) -> list[int]:
    """A permutation of range(n) that depends on the arguments alone."""
    generator = torch.Generator().manual_seed(stateless_seed(purpose, *parts))
    return torch.randperm(n, generator=generator).tolist()


def split_indices(n: int, val_fraction: float, seed: int, limit_train: int | None) -> tuple[list[int], list[int]]:
    """Disjoint (train, val) indices into n training images, each ascending.

    The validation part depends on n, `val_fraction` and `seed` only, so a limited run validates on the same images.

    Raises:
        DataError: a part would be empty, or limit_train exceeds what there is.
    """
    order = seeded_order(n, "split", seed)
    n_val = round(n * val_fraction)
    if (val_fraction and not n_val) or n_val == n:
        raise DataError(
            f"val_fraction ({val_fraction}) of {n} training images leaves {n - n_val} to train on and {n_val} to "
            "validate on: both must be above 0"
        )
    train = order[n_val:]
    if limit_train is not None and limit_train > len(train):
        raise DataError(f"limit_train ({limit_train}) exceeds the {len(train)} training images there are")
    return sorted(train[:limit_train]), sorted(order[:n_val])
