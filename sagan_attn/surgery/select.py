"""Which modules of a model a user's words mean."""

import difflib
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from sagan_attn.errors import GraftError
from sagan_attn.surgery.point import GraftPoint

__all__ = ["At", "anchor_of", "host_names", "is_plain_sequential", "select"]

At = str | re.Pattern[str] | Sequence["str | re.Pattern[str]"]
MEANINGS = ("stage:", "stride:", "resolution:")


def host_names(model: nn.Module) -> list[str]:
    """Names of the model's modules, without the root and what was grafted; a module under two names has both."""
    names = []
    inside = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, GraftPoint):
            inside += (name + ".",)
        elif name and not name.startswith(inside):
            names.append(name)
    return names


def select(model: nn.Module, at: At, where: Callable[[str], str] | None = None) -> list[str]:
    """The module names that `at` means, in the order of the model for patterns and of the list for lists.

    A plain name is that module alone. In a glob (`*`, `?`, `[...]`) no part crosses a dot: "layer*.0" is the first
    child of each layer; `**` stands for any number of parts. A compiled regex must match the whole name. What begins
    with "stage:", "stride:" or "resolution:" and is no module's name goes to `where`, if there is one.

    Raises:
        GraftError: nothing matched; the message lists near names. Or what `where` raises.
    """
    if isinstance(at, Sequence) and not isinstance(at, (str, bytes)):
        if not at:
            raise GraftError("at is an empty list: name at least one module")
        for part in at:
            if not isinstance(part, (str, re.Pattern)):
                raise GraftError(f"at names {part!r:.100}, which is no module name, glob or compiled regex")
        return list(dict.fromkeys(name for part in at for name in select(model, part, where)))
    names = host_names(model)
    if where is not None and isinstance(at, str) and at.startswith(MEANINGS) and at not in names:
        return [where(at)]
    if isinstance(at, re.Pattern):
        found = [name for name in names if at.fullmatch(name)]
        shown = f"regex {at.pattern!r}"
    elif isinstance(at, str) and any(mark in at for mark in "*?["):
        found = [name for name in names if _matches(name.split("."), at.split("."))]
        shown = f"pattern {at!r}"
    elif isinstance(at, str):
        found = [at] if at in names else []
        shown = f"name {at!r}"
    else:
        raise GraftError(
            f"at ({at!r:.100}) must be a module name, a glob, a compiled regex, a list of them or a mapping"
        )
    if not found:
        word = at if isinstance(at, str) else at.pattern
        near = difflib.get_close_matches(word, names, n=5, cutoff=0.5) or names[:5]
        raise GraftError(f"no module of {type(model).__name__} matches the {shown}; near names: {', '.join(near)}")
    return found


def anchor_of(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Name and module that a hook for site `name` belongs on: the last module inside it that is no plain Sequential.

    Under gradient checkpointing and in feature extractors the children of a Sequential are called without it, so a
    hook on the Sequential itself would be skipped. Its last child puts out what it puts out.
    """
    module = model.get_submodule(name)
    while is_plain_sequential(module):
        inner = [(n, m) for n, m in module.named_children() if not isinstance(m, GraftPoint)]
        if not inner:
            break
        last, module = inner[-1]
        name = f"{name}.{last}" if name else last
    return name, module


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether the module does nothing but call its children one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _matches(name: list[str], pattern: list[str]) -> bool:
    reached = {0}  # how many parts of the name what came so far of the pattern may stand for
    for part in pattern:
        if part == "**":
            reached = set(range(min(reached, default=len(name) + 1), len(name) + 1))
        else:
            reached = {n + 1 for n in reached if n < len(name) and fnmatchcase(name[n], part)}
    return len(name) in reached
