"""graft, ungraft, is_grafted, grafts_of."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sagan_attn.errors import GraftError
from sagan_attn.surgery import point as points_
from sagan_attn.surgery.build import BlockLike
from sagan_attn.surgery.cost import Budget
from sagan_attn.surgery.grafts import Graft, Grafts
from sagan_attn.surgery.place import check_model
from sagan_attn.surgery.plan import AtMapping, Insertion, make_plan
from sagan_attn.surgery.select import At
from sagan_attn.surgery.undo import all_or_nothing

__all__ = ["graft", "grafts_of", "is_grafted", "ungraft"]


def graft(
    model: nn.Module,
    at: "At | AtMapping",
    block: BlockLike = "sagan",
    *,
    name: str | None = None,
    gate: bool | None = None,
    example_input: Any = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    max_flops_share: float | None = None,
    max_map_bytes: float | None = None,
) -> Grafts:
    """Insert a block after each module that `at` names, in place, without changing what the model computes.

    Right after the call the output is bit-identical to that before, in train and eval mode, as long as the new
    branch is finite; every state-dict key of the model keeps its name, order and value; `ungraft` undoes it. The
    block takes device, dtype and mode of its place. Build the optimizer, compile and wrap for DDP after grafting.

    Args:
        model: the host.
        at: module name; glob ("layer*.0": no part crosses a dot, "**" stands for any number of parts); compiled
            regex (whole name); "stage:-1", "stride:16", "resolution:14" or "resolution:14x7", the last place of that
            stage, stride or map size (`sagan_attn.surgery.where`); a list of these; or a mapping from these to a
            block or to {"block": ..., "name": ..., "gate": ..., option: value, ...}. For the output of a stage name
            the stage.
        block: registered name, class or factory (channels) -> Module.
        name: of the graft at its place; the block's own by default.
        gate: True wraps the block as x + gamma * (block(x) - x) with gamma 0; False puts it in as it is; None, the
            default, too, but refuses a class or factory whose block does not start as the identity.
        example_input: an input the model takes: a tensor or list of images (passed as the only argument), a tuple
            (positional arguments) or a dict (keyword arguments). The model is run on it once to see which modules
            fire and with what maps. None for timm's input size, or 224 x 224 with the first convolution's channels.
        seed: decides the initial weights, together with site and name alone; the global random state is untouched.
        options: of the block, by name.
        max_flops_share: refuse a block with more than this share of the model's FLOPs in a forward pass of the
            example.
        max_map_bytes: refuse a block whose float32 attention weights take more bytes than this, as in `Site`.

    Returns:
        The new grafts, in the order of `at`.

    Raises:
        GraftError: nothing matches; the model does not take example_input; the module never fires, fires with several
            channel counts, or puts out something else than one map; the model is compiled or wrapped; the name is
            taken; a block costs more than it may. Nothing was changed.
        BlockError: an unknown block, an unknown option, or a value the block refuses. Nothing was changed.
    """
    plan = make_plan(
        model,
        at,
        block,
        name=name,
        gate=gate,
        example_input=example_input,
        seed=seed,
        options=options,
        budget=Budget(max_flops_share, max_map_bytes),
    )
    return carry_out(plan)


def carry_out(plan: Sequence[Insertion]) -> Grafts:
    """Make the insertions of a plan, all or none. Compiled code is dropped, so that it is compiled anew."""
    grafts = []
    with all_or_nothing(step.anchor for step in plan):
        for step in plan:
            points_.insert(step.anchor, step.layout, step.name, step.site, step.block, step.spec)
            path = f"{step.anchor_name}.{points_.CHILD}.{step.name}"
            grafts.append(Graft(step.name, step.site, step.block, path, step.anchor))
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code has no guard on new hooks, and would run without the grafts
        return Grafts(grafts)


def ungraft(model: nn.Module, names: str | Sequence[str] | None = None) -> None:
    """Take grafts out of the model; with the last one keys, their order, tensors and hooks are as before the first.

    Args:
        model: the host.
        names: which grafts, by name, site or path, each standing for all grafts it fits; None for every graft.

    Raises:
        GraftError: a model without grafts, or a name that fits none of them. Nothing was removed.
    """
    check_model(model)
    grafts = grafts_of(model)
    if not grafts:
        raise GraftError(f"{type(model).__name__} has no grafts to remove")
    if names is not None:
        grafts = _named(grafts, [names] if isinstance(names, str) else names)
    grafts.remove()


def _named(grafts: Grafts, names: Sequence[str]) -> Grafts:
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise GraftError(f"names ({names!r:.100}) must be a name, site or path of a graft, or a list of them")
    if not names:
        raise GraftError("names is an empty list: name at least one graft")
    for name in names:
        if not any(name in words_of(graft) for graft in grafts):
            raise GraftError(f"no graft has the name or site {name!r}; near names: {near_names(name, grafts)}")
    return Grafts([graft for graft in grafts if any(name in words_of(graft) for name in names)])


def words_of(graft: Graft) -> tuple[str, str, str]:
    """What a graft can be called by: its name, its site and its path."""
    return graft.name, graft.site, graft.path


def near_names(name: str, grafts: Grafts) -> str:
    """Words for grafts that are like a wrong one, for messages."""
    known = list(dict.fromkeys(word for graft in grafts for word in words_of(graft)))
    return ", ".join(difflib.get_close_matches(str(name), known, n=5, cutoff=0.5) or known[:5])


def is_grafted(model: nn.Module) -> bool:
    """Whether the model has any grafts."""
    return bool(points_.points(model))


def grafts_of(model: nn.Module) -> Grafts:
    """All grafts of the model, in the order of its modules; also of a copied, unpickled or wrapped one."""
    return Grafts(
        [
            Graft(name, point.sites[name], block, f"{anchor_name}.{points_.CHILD}.{name}".lstrip("."), anchor)
            for anchor_name, (anchor, point) in points_.points(model).items()
            for name, block in point.named_children()
        ]
    )
