"""Recording what grafted attention looks at, while the model runs."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.base import Intervention, MapAttention, Scored, check_positions
from sagan_attn.errors import GraftError
from sagan_attn.surgery import Graft
from sagan_attn.viz.adapters import adapter_of
from sagan_attn.viz.targets import At, Target, targets_of

__all__ = ["AttentionRecord", "Recording", "attention_at", "record_attention"]

Queries = Tensor | Sequence[int] | None
MAX_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """The weights of one call of one attention.

    Args:
        path: of the attention in the model.
        site: where its graft is; the path where it is in no graft.
        call: how many calls of it were recorded before.
        weights: [B, h, Q, M], float32 or float64, before any dropout, without a graph, on the model's device.
        queries: positions of the queries, row * W + column: [Q], or [B, Q] where each image has its own.
        query_size: H and W of the map that the queries are positions of; None for a sequence.
        key_size: rows and columns of the keys, M = rows * columns; None for a sequence.
        pool: side of the window of the map that a key is made of.
    """

    path: str
    site: str
    call: int
    weights: Tensor
    queries: Tensor
    query_size: tuple[int, int] | None
    key_size: tuple[int, int] | None
    pool: int = 1


class Recording(Mapping[str, tuple[AttentionRecord, ...]]):
    """What was recorded: path of each attention -> its calls, in order; also by the site or name of a graft."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self._records: dict[str, list[AttentionRecord]] = {target.path: [] for target in targets}
        self.bytes = 0

    def __getitem__(self, key: str) -> tuple[AttentionRecord, ...]:
        if key in self._records:
            return tuple(self._records[key])
        found = [target.path for target in self._targets if key in target.words]
        if not found:
            raise KeyError(f"nothing at {key!r} was recorded; there are {', '.join(self)}")
        if len(found) > 1:
            raise KeyError(f"{key!r} means several attentions; choose one of {', '.join(found)}")
        return tuple(self._records[found[0]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def only(self, key: str | None = None) -> AttentionRecord:
        """The one record of an attention that ran once; without a key, of the one attention there is.

        Raises:
            GraftError: there is none, or there are several.
        """
        if key is None and len(self) != 1:
            raise GraftError(f"{len(self)} attentions were recorded; choose one of {', '.join(self)}")
        path = next(iter(self)) if key is None else key
        records = self[path]
        if len(records) == 0:
            raise GraftError(f"the attention at {path!r} did not run: it is disabled or its module never fires")
        if len(records) > 1:
            raise GraftError(f"the attention at {path!r} ran {len(records)} times: take one of recording[{path!r}]")
        return records[0]


@contextmanager
def record_attention(
    model: nn.Module, queries: Queries = None, *, at: At = None, max_bytes: int = MAX_BYTES
) -> Iterator[Recording]:
    """Inside, forward passes of the model leave the weights of its attention in the `Recording` that `as` names.

    What the model computes stays the same to the bit, its gradients, memory formats, random state and buffers too:
    blocks of this library go on by the path they chose, and the weights asked for are computed beside it from the
    very queries and keys of the pass, masks and interventions included, and nothing but their rows. Recordings nest.
    What gradient checkpointing computes again in a backward pass is not recorded again. Hooks and all are gone
    afterwards, after an exception as well.

    A compiled model runs eagerly inside, which rounds differently, and compiled again afterwards.

    Modules of other libraries are read by hooks: `nn.MultiheadAttention`, timm's `NonLocalAttn` and `BottleneckAttn`.
    A hook keeps torch's transformer layers from their fast path, in this recording and for that layer alone.

    Args:
        model: any module; wrapped or compiled, too.
        queries: positions row * W + column on the map, [Q], or one set an image [B, Q]; None for all.
        at: grafts, or the site, name or path of one, or of a module with attention in or outside of a graft; or
            several of them. None for every graft that has attention; in a model without, for every other module that
            can be read.
        max_bytes: the most that all weights of this recording may take; asked before each is computed.

    Raises:
        GraftError: nothing has attention weights, or what `at` names has none or is not there (near names are
            listed); in forward, weights beyond `max_bytes`, or an intervention begun inside the recording, which
            would hide from it.
        BlockError: in forward, queries that are no positions of a map.
    """
    if max_bytes < 0:
        raise GraftError(f"max_bytes ({max_bytes}) must be at least 0")
    asked = None if queries is None else torch.as_tensor(queries)
    targets = targets_of(model, at)
    recording = Recording(targets)
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled, and importing it is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for target in targets:
            writer = _Writer(target, recording, asked, max_bytes)
            stack.callback(setattr, writer, "open", False)
            if isinstance(target.attention, MapAttention):
                stack.enter_context(_intervening(target, target.attention, writer))
            else:
                hook = _foreign_hook(writer)
                stack.callback(target.attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield recording


def attention_at(model: nn.Module, graft: Graft, images: Tensor, queries: Tensor) -> Tensor:
    """Weights that a graft's query positions give to all its keys, [B, h, Q, M], for images [B, C, H, W].

    queries: positions on the graft's map in row-major order, [Q] or one set an image [B, Q]. Runs the model once, in
    the mode it is in, without gradients; only the rows asked for are computed.

    Raises:
        GraftError: the block has no attention weights, several attentions, or did not run.
    """
    with record_attention(model, queries, at=graft) as recording, torch.no_grad():
        model(images)
    return recording.only().weights


class _Writer:
    """Puts the calls of one attention into a recording."""

    def __init__(self, target: Target, recording: Recording, queries: Tensor | None, max_bytes: int) -> None:
        self.target = target
        self.recording = recording
        self.queries = queries
        self.max_bytes = max_bytes
        self.open = True  # a copy of the model made inside keeps hooks, which then do nothing
        self.sizes: list[tuple[int, int]] = []  # of the map of the call under way, and of its context

    def write(
        self,
        shape: tuple[int, int, int, int],
        itemsize: int,
        weights: Callable[[Tensor | None], Tensor],
        size: tuple[int, int] | None,
        key_size: tuple[int, int] | None,
        device: torch.device,
        pool: int = 1,
    ) -> None:
        """Check the budget, then compute. shape: B, h, N and M."""
        batch, heads, n, m = shape
        queries = None if self.queries is None else self.queries.to(device)
        if queries is not None:
            check_positions(queries, batch, n)
        count = n if queries is None else queries.shape[-1]
        needed, path = batch * heads * count * m * itemsize, self.target.path
        if self.recording.bytes + needed > self.max_bytes:
            before = f" beside {self.recording.bytes:,} recorded so far" if self.recording.bytes else ""
            raise GraftError(
                f"the weights of {path!r}, [B, h, Q, M] = {[batch, heads, count, m]}, take {needed:,} bytes{before}, "
                f"and max_bytes allows {self.max_bytes:,}: name fewer queries, images or sites, or raise max_bytes"
            )
        with torch.no_grad():
            found = weights(queries).detach()
        self.recording.bytes += needed
        every = torch.arange(n, device=device) if queries is None else queries
        records = self.recording._records[path]
        records.append(AttentionRecord(path, self.target.site, len(records), found, every, size, key_size, pool))


class _Recorder:
    """An intervention that changes nothing: it writes down what goes by."""

    def __init__(self, attention: MapAttention, before: Intervention | None, writer: _Writer) -> None:
        self.attention = attention
        self.before = before
        self.writer = writer

    def __call__(self, query: Tensor, key: Tensor, how: dict[str, Any]) -> Scored:
        if self.before is not None:
            query, key, how = self.before(query, key, how)
        if torch._C._current_graph_task_id() == -1:  # else a checkpoint computes it again, in a backward pass
            self._write(query.detach(), key.detach(), dict(how))
        return query, key, how

    def _write(self, query: Tensor, key: Tensor, how: dict[str, Any]) -> None:
        batch, heads, n, _ = query.shape

        def weights(index: Tensor | None) -> Tensor:
            if index is None:
                return functional.attention_weights(query, key, **how)
            index = index.expand(batch, -1)  # [B, Q]
            rows = query.take_along_dim(index[:, None, :, None], dim=2)
            return functional.attention_weights(rows, key, **{**how, "index": index})

        size = next((size for size in self.writer.sizes[:1] if size[0] * size[1] == n), None)
        itemsize = torch.promote_types(query.dtype, torch.float32).itemsize
        shape = (batch, heads, n, key.shape[2])
        key_size, pool = self._keys(key.shape[2])
        self.writer.write(shape, itemsize, weights, size, key_size, query.device, pool)

    def _keys(self, m: int) -> tuple[tuple[int, int] | None, int]:
        """Rows and columns of the keys: of the context if there is one that they fit, else of the map itself."""
        attention = self.attention
        for height, width in reversed(self.writer.sizes):
            if attention.attention_shape(height, width)[2] == m:
                ceil = attention.pool_ceil or min(height, width) < attention.pool
                rows, columns = ((side + (attention.pool - 1) * ceil) // attention.pool for side in (height, width))
                return (rows, columns), attention.pool
        return None, attention.pool

    def holds(self, intervention: Intervention | None) -> bool:
        """Whether an intervention is this one, or a recorder that passes on to it."""
        while isinstance(intervention, _Recorder):
            if intervention is self:
                return True
            intervention = intervention.before
        return False


@contextmanager
def _intervening(target: Target, attention: MapAttention, writer: _Writer) -> Iterator[None]:
    recorder = _Recorder(attention, attention.intervention, writer)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not writer.open:
            return
        if not recorder.holds(attention.intervention):
            raise GraftError(
                f"an intervention begun inside record_attention hides {target.path!r} from it: begin the recording "
                "inside the intervention"
            )
        maps = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor) and part.dim() == 4]
        writer.sizes = [(part.shape[2], part.shape[3]) for part in maps]

    handles = []
    try:
        around = [m for m in target.root.modules() if any(part is attention for part in m.modules())]
        for module in around:  # the innermost whose forward is called fires last
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        attention.intervention = recorder
        yield
    finally:
        attention.intervention = recorder.before
        for handle in handles:
            handle.remove()


def _foreign_hook(writer: _Writer) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        adapter = adapter_of(module)
        if adapter is None or not writer.open or torch._C._current_graph_task_id() != -1:
            return
        call = adapter(module, args, kwargs)
        x = next(part for part in (*args, *kwargs.values()) if isinstance(part, Tensor))
        itemsize = torch.promote_types(x.dtype, torch.float32).itemsize
        writer.write(call.shape, itemsize, call.weights, call.size, call.size, x.device)

    return note
