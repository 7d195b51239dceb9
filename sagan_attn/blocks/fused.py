"""Attention for deployment: its convolutions joined, gates and norms folded into them."""

import copy

import torch
from torch import Tensor, nn

from sagan_attn import functional
from sagan_attn.blocks.base import MapAttention
from sagan_attn.blocks.nonlocal_ import NonLocal2d
from sagan_attn.blocks.pointwise import Pointwise, SpectralPointwise
from sagan_attn.blocks.sagan import SelfAttention2d
from sagan_attn.errors import BlockError

__all__ = ["FusedAttention2d"]

Affine = tuple[Tensor, Tensor | None]  # weight [O, C, 1, 1] and bias [O] of a 1x1 convolution


class FusedAttention2d(MapAttention):
    """What a trained block computes in eval mode, in fewer steps: `x + branch(x)`. For inference alone.

    Exact up to rounding. Spectral norms are divided out; gamma and a batch norm behind `output` become part of the
    last convolution; biases of keys go where a softmax cancels them; and of query, key and value, those that read the
    same map are one convolution, whose result is split. A negative gamma over max-pooled values without an output
    convolution stays a change of sign (`sign`), because a maximum does not commute with it.

    Input and output [B, in_channels, H, W], same dtype and strides; an optional mask, boolean [B, H, W], is True at
    the positions that may be attended to. The map is its own context. Its parameters require no gradients.

    Args:
        block: a `SelfAttention2d`, `NonLocal2d`, `MultiHeadAttention2d` or `CrossAttention2d`; it is not changed.

    Raises:
        BlockError: a context of other channels than the map; a batch norm without running statistics; in forward,
            an input with other channels, a mask that does not fit, or a context.
    """

    def __init__(self, block: MapAttention) -> None:
        if block.context_channels != block.in_channels:
            raise BlockError(f"a block with context_channels ({block.context_channels}) of their own cannot be fused")
        super().__init__(
            block.in_channels,
            heads=block.heads,
            scale=block.scale,
            context_channels=block.context_channels,
            head_size=1,
            score=block.score,
            normalize=block.normalize,
            pool=block.pool,
            pool_first=block.pool_first,
            pool_ceil=block.pool_ceil,
            position="sinusoidal" if block.position == "sinusoidal" else None,
            path=block.path,
            device="meta",  # for its parameters, which are those of the block
        )
        self.position = block.position
        self.score_vector = _frozen(block.score_vector)
        self.height_rel, self.width_rel = _frozen(block.height_rel), _frozen(block.width_rel)
        self.query = self.key = None
        folded, self.sign = _folded(block)
        output = folded.pop("output", None)
        self.output = None if output is None else _convolution([output])
        self.parts: dict[str, dict[str, int]] = {}  # what a convolution reads -> its parts and their channels, in order
        for part, (weight, _) in folded.items():
            self.parts.setdefault(self._read_by(part), {})[part] = len(weight)
        self.projections = nn.ModuleDict(
            {read: _convolution([folded[part] for part in parts]) for read, parts in self.parts.items()}
        )
        self.eval()

    def is_identity(self) -> bool:
        """Whether all numbers that the branch is a product of are exactly 0, and no other one is NaN or infinite.

        Not known without numbers (device "meta").
        """
        if self.output is not None:
            last = list(self.output.parameters())
        else:
            read = self._read_by("value")
            channels = self.parts[read]["value"]  # the last ones
            last = [parameter[-channels:] for parameter in self.projections[read].parameters()]
        if any(numbers.is_meta or numbers.count_nonzero() for numbers in last):
            return False
        return all(bool(numbers.isfinite().all()) for numbers in self.parameters())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.residual(x, self.branch(x, mask=mask))

    def branch(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """What the block adds to x [B, C, H, W]: [B, C, H, W]."""
        if context is not None:
            raise BlockError("a fused block attends to its own map: context must be None")
        self._context_of(x, None)
        query, key, value = self._rows(x, mask)
        query, key, how = self.scored(query, key, self._how(x, x, mask))
        rows = functional.attend(query, key, value, path=self.path, **how)
        branch = functional.merge_heads(rows, x)  # [B, h*D, H, W]
        branch = branch if self.output is None else self.output(branch)
        return -branch if self.sign < 0 else branch

    def query_and_key(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries [B, h, N, d] and keys [B, h, M, d] of a map, which is its own context."""
        query, key, _ = self._rows(x, mask)
        return query, key

    def _rows(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, h, N, d], keys [B, h, M, d] and values [B, h, M, D]."""
        maps = {}
        for read, parts in self.parts.items():
            whole, start = self.projections[read](self._input(read, x, mask)), 0
            for part, channels in parts.items():
                maps[part] = whole[:, start : start + channels]
                start += channels
        query, key, value = (maps.get(part, x) for part in ("query", "key", "value"))
        if not self.pool_first or "key" not in maps:
            key = functional.pool_map(key, self.pool, mask, self.pool_ceil)
        if not self.pool_first:
            value = functional.pool_map(value, self.pool, mask, self.pool_ceil)
        heads = self.heads
        return tuple(functional.split_heads(part, heads) for part in (query, key, value))  # type: ignore[return-value]

    def _read_by(self, part: str) -> str:
        """Which map a part is a convolution of: "map", "pooled", or "placed", the map with sinusoids."""
        if self.position == "sinusoidal" and part != "value":
            return "placed"
        return "pooled" if self.pool_first and self.pool > 1 and part != "query" else "map"

    def _input(self, read: str, x: Tensor, mask: Tensor | None) -> Tensor:
        if read == "placed":
            return functional.add_sinusoids(x)
        return functional.pool_map(x, self.pool, mask, self.pool_ceil) if read == "pooled" else x


def _folded(block: MapAttention) -> tuple[dict[str, Affine], int]:
    """Convolutions of a block in float64, with all that is constant in eval mode, and a sign left for its branch."""
    convs = {"query": block.query, "key": block.key, "value": block.value, "output": block.output}
    folded = {part: _affine(conv) for part, conv in convs.items() if conv is not None}
    if "key" in folded and block.score == "dot" and block.normalize == "softmax":
        weight, bias = folded["key"]
        if bias is not None and bias.isfinite().all():  # the same number in a whole row of scores, unless it is NaN
            folded["key"] = (weight, None)
    sign = 1
    if isinstance(block, SelfAttention2d):
        gamma = block.gamma.detach().double()
        if "output" not in folded and block.pool > 1 and gamma < 0:
            gamma, sign = -gamma, -1
        last = "output" if "output" in folded else "value"
        folded[last] = _scaled(folded[last], gamma)
    if isinstance(block, NonLocal2d) and block.norm is not None:
        folded["output"] = _normed(folded["output"], block.norm)
    return {part: _cast(affine, block.value.weight.dtype) for part, affine in folded.items()}, sign


def _affine(conv: Pointwise) -> Affine:
    weight = conv.weight.detach().double()
    if isinstance(conv, SpectralPointwise):
        weight = functional.spectrally_normalized(weight, conv.weight_u.double(), conv.weight_v.double(), update=False)
    return weight, None if conv.bias is None else conv.bias.detach().double()


def _scaled(affine: Affine, factor: Tensor) -> Affine:
    """A convolution times a number or, channel by channel, times [O]."""
    weight, bias = affine
    return weight * factor[:, None, None, None], None if bias is None else bias * factor


def _normed(affine: Affine, norm: nn.BatchNorm2d) -> Affine:
    if norm.running_mean is None or norm.running_var is None:
        raise BlockError("a batch norm without running statistics cannot be fused: it depends on the batch")
    factor = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.detach().double() - norm.running_mean.double() * factor
    weight, bias = _scaled(affine, factor)
    return weight, shift if bias is None else bias + shift


def _cast(affine: Affine, dtype: torch.dtype) -> Affine:
    weight, bias = affine
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _convolution(affines: list[Affine]) -> Pointwise:
    """One convolution for several of the same map, one behind the other in its channels."""
    weight = torch.cat([weight for weight, _ in affines])
    conv = Pointwise(weight.shape[1], weight.shape[0], bias=False, device="meta")
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if any(bias is not None for _, bias in affines):
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in affines]
        conv.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return conv


def _frozen(parameter: Tensor | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(copy.deepcopy(parameter.detach()), requires_grad=False)
