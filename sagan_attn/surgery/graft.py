"""graft, ungraft, is_grafted, grafts_of."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sagan_attn.errors import GraftError
from sagan_attn.surgery import point as points_
from sagan_attn.surgery.build import BlockLike
from sagan_attn.surgery.grafts import Graft, Grafts
from sagan_attn.surgery.plan import AtMapping, make_plan
from sagan_attn.surgery.select import At

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
) -> Grafts:
    """Insert a block after each module that `at` names, in place, without changing what the model computes.

    Right after the call the output is bit-identical to that before, in train and eval mode, as long as the new
    branch is finite; every state-dict key of the model keeps its name, order and value; `ungraft` undoes it. The
    block takes device, dtype and mode of its place. Build the optimizer, compile and wrap for DDP after grafting.

    Args:
        model: the host.
        at: module name; glob ("layer*.0": no part crosses a dot, "**" stands for any number of parts); compiled
            regex (whole name); a list of these; or a mapping from these to a block or to
            {"block": ..., "name": ..., "gate": ..., option: value, ...}. For the output of a stage name the stage.
        block: registered name, class or factory (channels) -> Module.
        name: of the graft at its place; the block's own by default.
        gate: True wraps the block as x + gamma * (block(x) - x) with gamma 0; False puts it in as it is; None, the
            default, too, but refuses a class or factory whose block does not start as the identity.
        example_input: an input the model takes: a tensor or list of images (passed as the only argument), a tuple
            (positional arguments) or a dict (keyword arguments). The model is run on it once to see which modules
            fire and with what maps. None for timm's input size, or 224 x 224 with the first convolution's channels.
        seed: decides the initial weights, together with site and name alone; the global random state is untouched.
        options: of the block, by name.

    Returns:
        The new grafts, in the order of `at`.

    Raises:
        GraftError: nothing matches; the module never fires, fires with several channel counts, or puts out
            something else than one map; the model is compiled or wrapped; the name is taken. Nothing was changed.
        BlockError: an unknown block, an unknown option, or a value the block refuses. Nothing was changed.
    """
    plan = make_plan(model, at, block, name=name, gate=gate, example_input=example_input, seed=seed, options=options)
    grafts = []
    for step in plan:
        points_.insert(step.anchor, step.layout, step.name, step.site, step.block)
        path = f"{step.anchor_name}.{points_.CHILD}.{step.name}"
        grafts.append(Graft(step.name, step.site, step.block, path, step.anchor))
    return Grafts(grafts)


def ungraft(model: nn.Module) -> None:
    """Take every graft out of the model: keys, their order, tensors and hooks are as before the first one.

    Raises `GraftError` for a model without grafts.
    """
    grafts = grafts_of(model)
    if not grafts:
        raise GraftError(f"{type(model).__name__} has no grafts to remove")
    grafts.remove()


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
