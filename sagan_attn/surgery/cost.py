"""What a block costs at a place, and what it may cost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sagan_attn.errors import BlockError, GraftError
from sagan_attn.surgery.build import BlockLike, build_block, try_block
from sagan_attn.surgery.probe import Firing, probe, quiet

__all__ = ["Budget", "Cost", "cost_of", "flops_share", "probe_flops"]


@dataclass(frozen=True)
class Cost:
    """What a block costs in a forward pass.

    Args:
        parameters: their number.
        flops: a multiply-add counts as 2.
        map_bytes: of its float32 attention weights on the largest of its maps, were they materialised; None for a
            block without attention weights.
    """

    parameters: int
    flops: int
    map_bytes: int | None


@dataclass(frozen=True)
class Budget:
    """What one block may cost; None for any cost.

    Raises:
        GraftError: a limit that is no positive number.
    """

    max_flops_share: float | None = None
    max_map_bytes: float | None = None

    def __post_init__(self) -> None:
        for name, limit in vars(self).items():
            number = isinstance(limit, (int, float)) and not isinstance(limit, bool) and limit > 0
            if limit is not None and not number:
                raise GraftError(f"{name} ({limit!r}) must be a number above 0, or None for no limit")

    def excess(self, flops: int, flops_share: float, map_bytes: int | None) -> str:
        """What is too much, in words; "" for a cost within the budget."""
        if self.max_flops_share is not None and flops_share > self.max_flops_share:
            return (
                f"{flops / 1e6:.1f} MFLOPs, {flops_share:.3g} of the model's: more than max_flops_share "
                f"({self.max_flops_share:g})"
            )
        if self.max_map_bytes is not None and (map_bytes or 0) > self.max_map_bytes:
            return f"{map_bytes:,} bytes of attention weights: more than max_map_bytes ({self.max_map_bytes:g})"
        return ""


def cost_of(
    block: BlockLike, channels: int, sizes: Sequence[tuple[int, int, int]], options: Mapping[str, Any]
) -> Cost | BlockError:
    """What a block costs on maps of those batches, heights and widths; what it says if it refuses them."""
    try:
        module = build_block(block, channels, options, seed=0, device=torch.device("meta"))
        with quiet(module), _FlopCount() as count:
            for batch, height, width in sizes:
                try_block(module, torch.empty(batch, channels, height, width, device="meta"))
    except BlockError as error:
        return error
    shape_of: Callable[[int, int], Sequence[int]] | None = getattr(module, "attention_shape", None)
    map_bytes = None
    if shape_of is not None:
        map_bytes = max(4 * batch * math.prod(shape_of(h, w)) for batch, h, w in sizes)
    return Cost(sum(p.numel() for p in module.parameters()), count.total, map_bytes)


def probe_flops(
    model: nn.Module, example_input: Any, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Firing], int]:
    """`probe`, and the FLOPs of that forward pass; a multiply-add counts as 2."""
    with _FlopCount() as count:
        firings = probe(model, example_input, modules)
    return firings, count.total


def flops_share(cost: Cost, host_flops: int) -> float:
    """FLOPs of a block over those of its host; infinite for a host without any."""
    return cost.flops / host_flops if host_flops else math.inf


class _FlopCount(TorchDispatchMode):
    """FLOPs by torch's formulas, operator by operator, while it is active: `total`.

    torch's own `FlopCounterMode` follows the modules as well, and fails on an expanded parameter among their inputs
    (timm's pit); with torch 2.8 it leaves out attention on the CPU.
    """

    def __init__(self) -> None:
        from torch.utils import flop_counter  # imports Triton where there is one, which is slow

        super().__init__()
        self.total = 0
        self._formulas: dict[Any, Callable[..., int]] = {
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
            **flop_counter.flop_registry,
        }

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output
