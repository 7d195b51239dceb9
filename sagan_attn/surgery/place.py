"""Whether a module can take a graft at all, whatever its maps are."""

from torch import nn

from sagan_attn.errors import GraftError
from sagan_attn.surgery.point import CHILD, GraftPoint
from sagan_attn.surgery.probe import is_compiled

__all__ = ["check_anchor", "check_model", "check_open"]


def check_model(model: nn.Module) -> None:
    """Raise `GraftError` for what is no model."""
    if not isinstance(model, nn.Module):
        raise GraftError(f"model must be a torch.nn.Module, not a {type(model).__name__}")


def check_anchor(model: nn.Module, name: str) -> None:
    """Raise `GraftError` if the module of that name cannot hold a graft, or lies in one that would ignore it."""
    anchor = model.get_submodule(name)
    if hasattr(anchor, CHILD) and not isinstance(anchor._modules.get(CHILD), GraftPoint):
        raise GraftError(f"module {name!r} has an attribute {CHILD!r} of its own, the name grafts are kept under")
    if _may_collect(anchor):
        raise GraftError(
            f"module {name!r} is a {type(anchor).__name__}, a container that may call each of its children, a graft "
            "too, and collect what they put out; choose the module that contains it or the one after it"
        )
    parts = name.split(".")
    for length in range(len(parts) + 1):
        check_open(model, ".".join(parts[:length]))


def _may_collect(module: nn.Module) -> bool:
    """Whether the module may go through its children and do something else than hand on what each puts out."""
    if isinstance(module, nn.Sequential):
        forward = type(module).forward
        code = getattr(forward, "__code__", None)
        has_super = code is not None and "__class__" in code.co_freevars  # then they run one after the other
        return forward is not nn.Sequential.forward and not has_super
    return isinstance(module, (nn.ModuleDict, nn.ModuleList))


def check_open(model: nn.Module, name: str) -> None:
    """Raise `GraftError` if the module of that name, "" for the model, is compiled or wrapped, or is none."""
    check_model(model)
    module = model.get_submodule(name)
    if is_compiled(module):
        raise GraftError(f"{name or 'the model'!r} is compiled and would ignore a graft: graft first, then compile")
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise GraftError(
            f"{name or 'the model'!r} is wrapped in {type(module).__name__}, which would not train a graft: graft "
            "first, then wrap"
        )
