"""Out of memory: which graft, what score map, and what would take less."""

import copy
import functools
import math
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sagan_attn.blocks.base import MapAttention
from sagan_attn.blocks.nonlocal_ import NonLocal2d
from sagan_attn.blocks.sagan import SelfAttention2d
from sagan_attn.functional.paths import chosen_path, obstacle_to
from sagan_attn.surgery import Graft, grafts_of, sites
from sagan_attn.surgery.probe import quiet

__all__ = ["OutOfMemoryNote", "is_out_of_memory", "out_of_memory_words"]

# What torch says in errors that have no class of their own: its allocator on the CPU, CUDA's calls, and its libraries'.
SAID = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
BEGINNING = "out of memory"
STAGES = {"fit": "training", "validate": "validation", "test": "the test", "predict": "prediction"}
LARGE = 0.1  # a graft is worth naming from this share of what the host's maps take


class OutOfMemoryNote(L.Callback):
    """Adds a note to an error of a lack of memory: the graft with the largest score map, and what would take less."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if not is_out_of_memory(exception):
            return
        try:
            exception.add_note(_explanation(trainer, pl_module, exception))
        except Exception as error:  # a host may do anything on tensors without numbers; the first error is what counts
            exception.add_note(f"{_asked(exception)}; what takes the most was not found out ({error})")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of the machine or of a GPU."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in SAID))


def out_of_memory_words(error: BaseException) -> str:
    """One line on an error of a lack of memory: the note of `OutOfMemoryNote`, if it has one."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(BEGINNING)]
    return " ".join((notes[-1] if notes else f"{_asked(error)}: a smaller data.batch_size takes less").split())


@dataclass(frozen=True)
class ScoreMap:
    """One attention of a graft, on the maps of a batch.

    Args:
        graft: it is of.
        attention: the block, or a part of it.
        size: height and width of the map.
        scores: their shape [B, h, N, M].
        numbers: how many take part in making them: as many, or d times as many for additive scores.
        path: by which they are computed.
    """

    graft: Graft
    attention: MapAttention
    size: tuple[int, int]
    scores: tuple[int, int, int, int]
    numbers: int
    path: str

    @property
    def bytes(self) -> int:
        """Of the weights in float32, were they held as a whole."""
        return 4 * self.numbers

    @property
    def held(self) -> bool:
        return self.path == "materialised"


def _explanation(trainer: Any, module: Any, error: BaseException) -> str:
    network, data = getattr(module, "network", None), trainer.datamodule
    start = f"{_asked(error)} in {STAGES[trainer.state.fn]}"
    if "DataLoader worker" in str(error):
        return (
            f"{start}, in a process that loads images: fewer data.num_workers (now {data.num_workers}) or a smaller "
            f"data.batch_size (now {data.batch_size}) take less"
        )
    if network is None:
        if any(frame.f_code.co_name == "configure_model" for frame, _ in traceback.walk_tb(error.__traceback__)):
            return f"{start}, while the model was built: a smaller host or smaller images take less"
        return f"{start}, before there was a model: a smaller data.cache_bytes (now {data.cache_bytes:,}) takes less"
    batch, size = data.batch_size, data.preprocess.image_size
    fitting, device = trainer.state.fn == "fit", trainer.strategy.root_device
    images = torch.empty(batch, data.in_channels, size, size, device="meta")
    half = "16" in str(trainer.precision)
    twin = _without_numbers(network)
    found, host = _survey(twin, images, fitting, half, device)
    if at := _met_in(network, error):
        start += f", met in {at!r}"
    found.sort(key=lambda one: (one.held, one.bytes), reverse=True)
    there = [one for one in found if f"{at}.".startswith(f"{one.graft.path}.")]
    less = _smaller_batch(batch, trainer.accumulate_grad_batches if fitting else None)
    for one in (*there[:1], *found[:1]):
        if one.held and one.bytes >= LARGE * host:
            more = ", and as much again for the gradients" if fitting else ""
            which = "the largest score map is" if one is found[0] else "the score map there is"
            options = [*_options_of_block(one), *less, *_other_site(twin, images, one)]
            return f"{start}: {which} {_words(one)} take {_size(one.bytes)}{more}. Cheaper: {'; '.join(options)}"
    if not found:
        start += ": no graft has a score map"
    else:
        take = "take" if found[0].held else "would take"
        how = "" if found[0].held else f", and path {found[0].path!r} never holds them as a whole"
        words = f"the largest score map is {_words(found[0])} {take} {_size(found[0].bytes)}{how}"
        start += f": no graft is large: {words}"
    if not half:
        less.append("trainer.precision: bf16-mixed, which halves the host's maps")
    less.append(f"data.image_size below {size}, or a host with fewer channels")
    return f"{start}. The host's own maps take about {_size(host)} for a batch of {batch}. Cheaper: {'; '.join(less)}"


def _without_numbers(network: nn.Module) -> nn.Module:
    """A copy on the device "meta", which takes no memory for its tensors, not compiled."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(network, memo)


def _survey(
    twin: nn.Module, images: Tensor, fitting: bool, half: bool, device: torch.device
) -> tuple[list[ScoreMap], int]:
    """Score maps of all grafted attention in one forward pass, and about how many bytes the host's maps take.

    In training those of all modules are kept, otherwise those of one module at a time.
    """
    found: list[ScoreMap] = []
    sizes: list[int] = []

    def attention_of(graft: Graft, attention: MapAttention, map_size: list[tuple[int, int]]) -> Any:
        def note(query: Tensor, key: Tensor, how: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
            b, heads, n, d = query.shape
            scores = (b, heads, n, key.shape[2])
            numbers = math.prod(scores) * (d if how.get("score") == "additive" else 1)
            value = attention.value.weight.shape[0] // heads
            path = _path(attention, scores, d, value, how, fitting, device)
            found.append(ScoreMap(graft, attention, map_size[-1], scores, numbers, path))
            return query, key, how

        return note

    def measure(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            given = sum(x.numel() for x in args if isinstance(x, Tensor))
            sizes.append((output.numel() + (0 if fitting else given)) * (2 if half else 4))

    grafted = {part for graft in grafts_of(twin) for part in graft.point.modules()}
    for graft in grafts_of(twin):
        seen: list[tuple[int, int]] = []
        graft.block.register_forward_pre_hook(functools.partial(_note_size, seen))
        for part in graft.block.modules():
            if isinstance(part, MapAttention):
                part.intervention = attention_of(graft, part, seen)
    for part in twin.modules():
        if part not in grafted and not any(child not in grafted for child in part.children()):
            part.register_forward_hook(measure, prepend=True)
    with quiet(twin):
        twin(images)
    return found, sum(sizes) if fitting else max(sizes, default=0)


def _note_size(seen: list[tuple[int, int]], block: nn.Module, args: tuple[Tensor, ...]) -> None:
    height, width = args[0].shape[2:]
    seen.append((height, width))


def _path(
    attention: MapAttention,
    scores: tuple[int, int, int, int],
    d: int,
    value: int,
    how: Mapping[str, Any],
    fitting: bool,
    device: torch.device,
) -> str:
    """The path that attention of these sizes takes on a device; found with tensors of one number."""
    if attention.path != "auto":
        return attention.path
    b, heads, n, m = scores
    one = torch.empty(1, 1, 1, 1, device=device)
    dropout = attention.dropout if fitting else 0.0
    with torch.set_grad_enabled(fitting):
        query, key, values = (one.expand(b, heads, rows, width) for rows, width in ((n, d), (m, d), (m, value)))
        return chosen_path(query, key, values, dropout, {name: x for name, x in how.items() if name != "scale"})


def _words(one: ScoreMap) -> str:
    (b, heads, n, m), (height, width) = one.scores, one.size
    of_heads = "" if heads == 1 else f" x {heads} heads"
    return (
        f"of graft {one.graft.name!r} at {one.graft.site!r}, on maps of {height} x {width}: "
        f"the weights of {n:,} queries x {m:,} keys{of_heads} x {b} images"
    )


def _options_of_block(one: ScoreMap) -> list[str]:
    """What a block's own options could save; each says whether it is still the same block."""
    attention = one.attention
    how = {"score": attention.score, "normalize": attention.normalize, "position": attention.height_rel}
    path = "chunked" if obstacle_to("factored", attention.dropout, how) else "auto"
    options = [f"options {{path: {path}}} of the graft, which gives the same numbers and never holds the map"]
    if isinstance(attention, (SelfAttention2d, NonLocal2d)) and attention.height_rel is None:
        options.append(f"options {{pool: {2 * attention.pool}}}, another block with a quarter of the keys")
    return options


def _smaller_batch(batch: int, accumulated: int | None) -> list[str]:
    if batch == 1:
        return []
    smaller = batch // 2
    same = (
        f" with trainer.accumulate_grad_batches: {2 * accumulated} for the same update, up to batch norms"
        if accumulated
        else ""
    )
    return [f"data.batch_size: {smaller} instead of {batch}{same}"]


def _other_site(twin: nn.Module, images: Tensor, one: ScoreMap) -> list[str]:
    """The next place whose map takes at most a quarter, for a graft of a registered block."""
    spec = one.graft.point.specs.get(one.graft.name)
    if spec is None or spec.block is None:
        return []
    found = [site for site in sites(twin, images[:1]) if site.positions * 2 <= math.prod(one.size)]
    if not found:
        return []
    most = max(site.positions for site in found)
    best = min((site for site in reversed(found) if site.positions == most), key=lambda site: site.name.count("."))
    share = (math.prod(one.size) / most) ** 2
    return [f"at: {best.name}, whose maps of {best.height} x {best.width} take 1/{share:.0f} of it"]


def _met_in(network: nn.Module, error: BaseException) -> str:
    """The innermost module whose forward raised the error; "" if none did."""
    names = {module: name for name, module in network.named_modules() if name}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            found = names.get(module, found)
    return found


def _asked(error: BaseException) -> str:
    """ "out of memory", and for how much was asked if the error says so."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+) (\w+)", str(error))
    if asked is None:
        return BEGINNING
    number, unit = asked.groups()
    return f"{BEGINNING} (asked for {_size(int(number)) if unit == 'bytes' else f'{number} {unit}'})"


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
