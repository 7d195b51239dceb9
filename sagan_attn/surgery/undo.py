"""All or nothing: places that get their grafts back as they were when something fails half-way."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from sagan_attn.surgery.point import CHILD, GraftPoint

__all__ = ["all_or_nothing"]


@contextmanager
def all_or_nothing(anchors: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, blocks come and go at the anchors; if an exception leaves it, anchors and points are as before it.

    What is put back are the anchors' children and forward hooks, and all that their points know, in its old order.
    """
    before = [record for anchor in anchors for record in _records(anchor)]
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            for kept, items in before:
                kept.clear()
                kept.update(items)


def _records(anchor: nn.Module) -> list[tuple[dict, dict]]:
    """Each dictionary that grafting changes, and its items now."""
    kept = [anchor._modules, anchor._forward_hooks]
    point = anchor._modules.get(CHILD)
    if isinstance(point, GraftPoint):
        kept += [vars(point), *(value for value in vars(point).values() if isinstance(value, dict))]
    return [(items, dict(items)) for items in kept]
