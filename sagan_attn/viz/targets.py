"""Which attentions of a model are meant: those of its grafts, and modules that can be read beside them."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sagan_attn.blocks.base import MapAttention
from sagan_attn.errors import GraftError
from sagan_attn.surgery import Graft, grafts_of
from sagan_attn.viz.adapters import adapter_of

__all__ = ["At", "Target", "targets_of"]

At = str | Graft | Sequence[str | Graft] | None


@dataclass(frozen=True, eq=False)
class Target:
    """One attention.

    Args:
        path: of the attention in the model.
        site: of its graft; the path where it is in none.
        words: what it can be called by beside its path.
        root: the graft's block, or the module that was asked for; it or a module in it gets the map.
        attention: a `MapAttention`, or a module of another library.
    """

    path: str
    site: str
    words: tuple[str, ...]
    root: nn.Module
    attention: nn.Module


def targets_of(model: nn.Module, at: At) -> list[Target]:
    """The attentions that `at` means, each once; see `record_attention`.

    Raises:
        GraftError: there is none, or one that `at` names has no weights or is not there.
    """
    grafts = grafts_of(model)
    if at is None:
        found = [target for graft in grafts for target in _in_graft(graft)]
        if not grafts:
            found = _in_module("", model)
        if not found:
            kinds = ", ".join(sorted({type(graft.block).__name__ for graft in grafts}))
            what = f"its grafts ({kinds}) have none" if grafts else "it has no grafts, and no attention of its own"
            raise GraftError(f"{type(model).__name__} has no attention weights to record: {what}")
        return _each_once(found)
    asked = [at] if isinstance(at, (str, Graft)) else list(at)
    if not asked:
        raise GraftError("at is empty: name at least one graft, or pass None for all")
    return _each_once([target for one in asked for target in _named(model, grafts, one)])


def _named(model: nn.Module, grafts: Sequence[Graft], one: str | Graft) -> list[Target]:
    if isinstance(one, Graft):
        chosen = [graft for graft in grafts if graft.block is one.block]
        if not chosen:
            raise GraftError(f"graft {one.name!r} at {one.site!r} is not in this model")
    else:
        chosen = [graft for graft in grafts if one in (graft.site, graft.name, graft.path)]
    if chosen:
        found = [target for graft in chosen for target in _in_graft(graft)]
        if not found:
            first = chosen[0]
            kind = type(first.block).__name__
            there = _where(model, grafts)
            raise GraftError(f"graft {first.name!r} at {first.site!r} is a {kind}: no attention weights; {there}")
        return found
    inside = [target for graft in grafts for target in _in_graft(graft) if target.path == one]
    modules = dict(model.named_modules())
    if not inside and one in modules:
        root = modules[str(one)]
        inside = _in_module(str(one), root)
        if not inside:
            kind = type(root).__name__
            raise GraftError(f"{one!r} is a {kind}: no attention weights; {_where(model, grafts)}")
    if not inside:
        others = [name for name, module in modules.items() if _readable(module)]
        known = list(dict.fromkeys([*(word for g in grafts for word in (g.site, g.name, g.path)), *others]))
        near = difflib.get_close_matches(str(one), known, n=5, cutoff=0.5) or known[:5]
        raise GraftError(f"no attention is called {one!r}; near names: {', '.join(near) or 'none'}")
    return inside


def _where(model: nn.Module, grafts: Sequence[Graft]) -> str:
    """Says where there is attention: the sites of grafts, and the paths of other modules."""
    grafted = [target for graft in grafts for target in _in_graft(graft)]
    paths = {target.path for target in grafted}
    others = [target.path for target in _in_module("", model) if target.path not in paths]
    names = list(dict.fromkeys([*(target.site for target in grafted), *others]))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"there are some at {', '.join(names[:8])}{more}" if names else "and there are none in the model"


def _in_graft(graft: Graft) -> list[Target]:
    modules = graft.block.named_modules(prefix=graft.path)
    words = (graft.site, graft.name, graft.path)
    return [Target(path, graft.site, words, graft.block, module) for path, module in modules if _readable(module)]


def _in_module(name: str, root: nn.Module) -> list[Target]:
    modules = root.named_modules(prefix=name)
    return [Target(path, path, (path,), root, module) for path, module in modules if _readable(module)]


def _readable(module: nn.Module) -> bool:
    return isinstance(module, MapAttention) or adapter_of(module) is not None


def _each_once(found: Sequence[Target]) -> list[Target]:
    each: dict[nn.Module, Target] = {}
    for target in found:
        each.setdefault(target.attention, target)
    return list(each.values())
