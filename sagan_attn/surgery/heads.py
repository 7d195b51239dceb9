"""Taking heads out of grafted blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn

from sagan_attn.blocks.base import MapAttention
from sagan_attn.blocks.fused import FusedAttention2d
from sagan_attn.blocks.pointwise import Pointwise, SpectralPointwise
from sagan_attn.errors import GraftError
from sagan_attn.surgery.graft import grafts_of, near_names, words_of
from sagan_attn.surgery.grafts import Graft, Grafts

__all__ = ["attentions", "prune_heads"]

Heads = Sequence[int] | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Pruning:
    """One attention and the heads it keeps."""

    attention: MapAttention
    kept: tuple[int, ...]


def prune_heads(model: nn.Module, heads: Mapping[str | Graft, Heads]) -> None:
    """Take heads out of grafted blocks, in place: their parameters and their part of the computation are gone.

    The model computes what it did with these heads' outputs at 0, up to rounding, in fewer channels of query, key,
    value (rows) and output (columns). Relative positions are shared by all heads and stay. What is pruned gets new
    parameters without gradients: build the optimizer afterwards.

    Args:
        model: a grafted model.
        heads: graft, or the site, path or name of one -> numbers of the heads to remove, counted from 0. For a block
            with several attentions, as the decoder, a mapping {"attention": [...], "cross": [...]}; the paths that
            `head_importance` gives name each attention itself.

    Raises:
        GraftError: no such graft, or several; a block without heads; a head that does not exist or is named twice, or
            all heads of a block; values that are the output as they are (no `output` convolution); spectral norms,
            which would change with the rows. Nothing was changed.
    """
    if not isinstance(heads, Mapping):
        raise GraftError(f"heads ({heads!r:.100}) must be a mapping from grafts to the numbers of their heads")
    if not heads:
        raise GraftError("heads is empty: name at least one graft and the heads to remove")
    prunings: dict[int, Pruning] = {}
    for key, asked in heads.items():
        for path, attention, numbers in _attentions_of(model, key, asked):
            if id(attention) in prunings:
                raise GraftError(f"{path!r} is named twice: give all of its heads at once")
            _check_prunable(path, attention)
            prunings[id(attention)] = Pruning(attention, _kept(path, attention.heads, numbers))
    weights = [_pruned_parameters(pruning) for pruning in prunings.values()]
    for pruning, new in zip(prunings.values(), weights, strict=True):
        for module, name, parameter in new:
            module._parameters[name] = parameter
        for conv in (pruning.attention.query, pruning.attention.key, pruning.attention.value):
            if conv is not None:
                conv.out_channels = len(conv.weight)
        if pruning.attention.output is not None:
            pruning.attention.output.in_channels = pruning.attention.value.out_channels
        pruning.attention.heads = len(pruning.kept)


def attentions(model: nn.Module) -> dict[str, MapAttention]:
    """Every attention with heads of its own inside the grafts, under its name in the model, each once."""
    found: dict[str, MapAttention] = {}
    for graft in grafts_of(model):
        for path, attention in _attentions_in(graft).items():
            if not any(attention is other for other in found.values()):
                found[path] = attention
    return found


def _attentions_in(graft: Graft) -> dict[str, MapAttention]:
    modules = graft.block.named_modules(prefix=graft.path)
    return {path: m for path, m in modules if isinstance(m, MapAttention) and not isinstance(m, FusedAttention2d)}


def _attentions_of(model: nn.Module, key: str | Graft, asked: Heads) -> list[tuple[str, MapAttention, Sequence[int]]]:
    """Path and attention that each part of one entry means, and the heads asked for."""
    grafts = grafts_of(model)
    if isinstance(key, str) and (own := attentions(model).get(key)) is not None and not isinstance(asked, Mapping):
        return [(key, own, asked)]
    graft = _graft_of(grafts, key)
    found = _attentions_in(graft)
    if not found:
        kind = type(graft.block).__name__
        raise GraftError(f"graft {graft.name!r} at {graft.site!r} is a {kind}: it has no heads to remove")
    parts = {path[len(graft.path) :].lstrip("."): (path, attention) for path, attention in found.items()}
    if not isinstance(asked, Mapping):
        if len(parts) > 1:
            example = ", ".join(f"{part!r}: [...]" for part in parts)
            raise GraftError(f"graft {graft.name!r} at {graft.site!r} has several attentions: pass {{{example}}}")
        ((path, attention),) = found.items()
        return [(path, attention, asked)]
    for part in asked:
        if part not in parts:
            names = ", ".join(map(repr, parts))
            raise GraftError(f"graft {graft.name!r} at {graft.site!r} has no attention {part!r}; it has {names}")
    return [(*parts[part], numbers) for part, numbers in asked.items()]


def _graft_of(grafts: Grafts, key: str | Graft) -> Graft:
    """The one graft that a key means."""
    if isinstance(key, Graft):
        found = [graft for graft in grafts if graft.block is key.block]
    else:
        found = [graft for graft in grafts if key in words_of(graft)]
        exact = [graft for graft in found if graft.path == key]
        found = exact or found
    if len(found) == 1 or (found and all(graft.block is found[0].block for graft in found)):
        return found[0]
    if found:
        raise GraftError(f"{key!r} means several grafts; choose one by its path: {', '.join(g.path for g in found)}")
    if isinstance(key, Graft):
        raise GraftError(f"graft {key.name!r} at {key.site!r} is not in this model")
    raise GraftError(f"no graft has the site or path {key!r}; near names: {near_names(key, grafts)}")


def _check_prunable(path: str, attention: MapAttention) -> None:
    convs = [conv for conv in (attention.query, attention.key, attention.value, attention.output) if conv is not None]
    if attention.output is None:
        raise GraftError(
            f"the heads of {path!r} cannot be removed: it has no output convolution, so their values are channels of "
            "its output. Graft the block with value_reduction=1, which has one"
        )
    if any(isinstance(conv, SpectralPointwise) for conv in convs):
        raise GraftError(
            f"the heads of {path!r} cannot be removed: spectral norms are taken over the weights of all heads, so the "
            "heads that stay would change. Graft the block with spectral_norm=False"
        )
    if any(type(conv) is not Pointwise for conv in convs):
        kinds = ", ".join(type(conv).__name__ for conv in convs)
        raise GraftError(f"the heads of {path!r} cannot be removed: its convolutions ({kinds}) are not plain ones")


def _kept(path: str, count: int, numbers: Sequence[int]) -> tuple[int, ...]:
    """The heads that stay of so many, of which these numbers go."""
    if isinstance(numbers, str) or not isinstance(numbers, Sequence):
        raise GraftError(f"heads of {path!r} ({numbers!r}) must be a list of whole numbers")
    for number in numbers:
        if not isinstance(number, Integral) or isinstance(number, bool) or not 0 <= number < count:
            raise GraftError(f"head {number!r} of {path!r} must be a whole number from 0 to {count - 1}")
    if len(set(numbers)) < len(numbers):
        raise GraftError(f"heads of {path!r} ({list(numbers)}) name one twice")
    if not numbers:
        raise GraftError(f"heads of {path!r} is empty: name at least one head to remove")
    if len(numbers) == count:
        raise GraftError(f"{path!r} has {count} heads, and all would go: take the whole graft out with ungraft instead")
    return tuple(number for number in range(count) if number not in numbers)


def _pruned_parameters(pruning: Pruning) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters that replace those of an attention: whose they are, their names, and they."""
    attention, new = pruning.attention, []
    for conv in (attention.query, attention.key, attention.value):
        if conv is not None:
            new += [(conv, name, _part(p, pruning, 0)) for name, p in conv.named_parameters(recurse=False)]
    if attention.output is not None:
        new.append((attention.output, "weight", _part(attention.output.weight, pruning, 1)))
    if attention.score_vector is not None:
        new.append((attention, "score_vector", _part(attention.score_vector, pruning, 0)))
    return new


def _part(parameter: nn.Parameter, pruning: Pruning, dim: int) -> nn.Parameter:
    """What belongs to the heads that stay, along a dimension in which head lies behind head."""
    index = torch.tensor(pruning.kept, device=parameter.device)
    whole = parameter.detach().unflatten(dim, (pruning.attention.heads, -1))  # [.., h, d, ..]
    return nn.Parameter(whole.index_select(dim, index).flatten(dim, dim + 1), requires_grad=parameter.requires_grad)
