"""Changing what grafted attention looks at, for as long as a `with` lasts: does the model use it?"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.base import Intervention, MapAttention, Scored
from sagan_attn.errors import GraftError
from sagan_attn.surgery.graft import grafts_of

__all__ = ["foreign_keys", "uniform_attention"]


def uniform_attention(model: nn.Module) -> AbstractContextManager[int]:
    """Inside, every query of the grafted attention spreads its weight evenly over its keys.

    The sum of a query's weights stays what it was: 1 after a softmax, the mean of its scores where the block takes
    means (the "dot_product" and "concatenation" modes of `NonLocal2d`). Masked keys keep a weight of 0, and where
    there is one key alone nothing changes. So the values are still read, by an average that is the same for all
    queries: what the model loses is what it knew about where to look.

    The context's value is the number of attentions, each counted once; a decoder has two. Compiled models notice and
    compile once more. Nothing of the model is left changed, also after an error. Nested interventions do not add up:
    the inner one counts. A copy of the model made inside has none.

    Raises:
        GraftError: a model without grafted attention that this library knows.
    """
    return _intervening(model, _spread)


def foreign_keys(model: nn.Module) -> AbstractContextManager[int]:
    """Inside, the queries of an image meet the keys of the next image in the batch, the last one's those of the first.

    Values are the image's own, and so are masks and the part of the scores that relative positions make: a query
    still reads its own image, but at the places where another image has what it looks for. See `uniform_attention`
    for the rest. After a softmax nothing changes where there is one key alone.

    Raises:
        GraftError: a model without grafted attention that this library knows; in forward, a batch of one image.
    """
    return _intervening(model, _next_image)


@contextmanager
def _intervening(model: nn.Module, intervention: Intervention) -> Iterator[int]:
    modules = (module for graft in grafts_of(model) for module in graft.block.modules())
    found = list(dict.fromkeys(module for module in modules if isinstance(module, MapAttention)))
    if not found:
        raise GraftError(f"{type(model).__name__} has no grafted attention to intervene in")
    before = [attention.intervention for attention in found]
    try:
        for attention in found:
            attention.intervention = intervention
        yield len(found)
    finally:
        for attention, own in zip(found, before, strict=True):
            attention.intervention = own


def _spread(query: Tensor, key: Tensor, how: dict[str, Any]) -> Scored:
    """Queries and keys of one feature whose scores are the same for all keys of a query, and how."""
    even = {name: how[name] for name in ("mask", "normalize") if name in how}
    if how.get("normalize") != "mean":
        return query.new_zeros(*query.shape[:3], 1), key.new_zeros(*key.shape[:3], 1), even
    ones = key.new_ones(*key.shape[:3], 1)
    return functional.attend(query, key, ones, **how), ones, even  # the sum of each query's weights, as its score


def _next_image(query: Tensor, key: Tensor, how: dict[str, Any]) -> Scored:
    if len(key) == 1:
        raise GraftError("keys of another image need a batch of two images or more, not of one")
    return query, torch.roll(key, -1, 0), how
