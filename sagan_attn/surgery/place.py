"""Whether a module can take a graft at all, whatever its maps are."""

import sys

import torch
from torch import nn

from sagan_attn.errors import GraftError
from sagan_attn.surgery.point import CHILD, GraftPoint

__all__ = ["check_anchor", "check_open"]


def check_anchor(model: nn.Module, name: str) -> None:
    """Raise `GraftError` if the module of that name cannot hold a graft, or lies in one that would ignore it."""
    anchor = model.get_submodule(name)
    if hasattr(anchor, CHILD) and not isinstance(anchor._modules.get(CHILD), GraftPoint):
        raise GraftError(f"module {name!r} has an attribute {CHILD!r} of its own, the name grafts are kept under")
    if isinstance(anchor, (nn.ModuleDict, nn.ModuleList)):
        raise GraftError(
            f"module {name!r} is a {type(anchor).__name__}, a container that may call each of its children, a graft "
            "too, and collect what they put out; choose the module that contains it or the one after it"
        )
    parts = name.split(".")
    for length in range(len(parts) + 1):
        check_open(model, ".".join(parts[:length]))


def check_open(model: nn.Module, name: str) -> None:
    """Raise `GraftError` if the module of that name, "" for the model, is compiled or wrapped."""
    module = model.get_submodule(name)
    if _is_compiled(module):
        raise GraftError(f"{name or 'the model'!r} is compiled and would ignore a graft: graft first, then compile")
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise GraftError(
            f"{name or 'the model'!r} is wrapped in {type(module).__name__}, which would not train a graft: graft "
            "first, then wrap"
        )


def _is_compiled(module: nn.Module) -> bool:
    if module._compiled_call_impl is not None or isinstance(module, torch.jit.ScriptModule):
        return True
    dynamo = sys.modules.get("torch._dynamo")  # not imported: nothing can be compiled, and importing it is slow
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
