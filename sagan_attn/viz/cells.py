"""Which pixels of an image the cells of a map stand for."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sagan_attn.errors import GraftError
from sagan_attn.viz.record import AttentionRecord

__all__ = ["RIM", "Axis", "Cells", "Places", "map_places"]

RIM = (
    "A cell is the pixels nearest to the centre of its receptive field; strides move these centres to one side, so "
    "cells at the rim may be smaller or larger than the others."
)


@dataclass(frozen=True)
class Axis:
    """Where the cells of one side of a map lie: the centre of cell i is `first + i * step` pixels from the edge.

    Pixel p covers p to p + 1, so its own centre is p + 0.5.
    """

    first: float
    step: float

    def edges(self, cells: int, pixels: int) -> list[float]:
        """Borders of the cells, cells + 1 numbers from 0 to pixels: half-way between centres, the last at the rim."""
        inner = [min(max(self.first + (i + 0.5) * self.step, 0.0), float(pixels)) for i in range(cells - 1)]
        return [0.0, *inner, float(pixels)]


@dataclass(frozen=True)
class Cells:
    """Borders of the cells of a map in pixels of the image: those of its rows, top down, and of its columns."""

    rows: tuple[float, ...]
    columns: tuple[float, ...]

    @property
    def size(self) -> tuple[int, int]:
        return len(self.rows) - 1, len(self.columns) - 1

    @property
    def even(self) -> bool:
        """Whether the cells are all of one height and one width."""
        return all(
            math.isclose(high - low, edges[1] - edges[0], rel_tol=1e-6)
            for edges in (self.rows, self.columns)
            for low, high in pairwise(edges)
        )

    def at(self, x: float, y: float) -> int:
        """The position row * W + column of the cell that a point of the image lies in.

        Raises:
            GraftError: a point outside of the cells.
        """
        places = []
        for name, value, edges in (("y", y, self.rows), ("x", x, self.columns)):
            if not edges[0] <= value <= edges[-1]:
                raise GraftError(
                    f"query {name} = {value:g} lies outside of the image, whose {name} go from {edges[0]:g} to "
                    f"{edges[-1]:g} pixels"
                )
            places.append(sum(value >= edge for edge in edges[1:-1]))
        return places[0] * self.size[1] + places[1]

    def centres(self) -> Tensor:
        """Centres (y, x) of the cells in pixels, [N, 2]."""
        rows, columns = (torch.tensor(edges, dtype=torch.float64) for edges in (self.rows, self.columns))
        middles = torch.meshgrid((rows[1:] + rows[:-1]) / 2, (columns[1:] + columns[:-1]) / 2, indexing="ij")
        return torch.stack(middles, dim=-1).flatten(0, 1)

    def pooled(self, pool: int, size: tuple[int, int]) -> "Cells":
        """The cells of that size made of windows of pool x pool of these; what no window covers belongs to none."""
        rows, columns = (
            tuple(edges[min(i * pool, len(edges) - 1)] for i in range(count + 1))
            for edges, count in zip((self.rows, self.columns), size, strict=True)
        )
        return Cells(rows, columns)


class Places:
    """Where the cells of maps of any size lie in images of one size."""

    def __init__(self, height: int, width: int, axes: tuple[Mapping[int, Axis], Mapping[int, Axis]]) -> None:
        self.image_size = (height, width)
        self._axes = axes

    def cells(self, size: tuple[int, int]) -> Cells:
        """The cells of a map of that height and width."""
        sides: list[tuple[float, ...]] = []
        for cells, pixels, axis in zip(size, self.image_size, self._axes, strict=True):
            even = Axis(pixels / cells / 2, pixels / cells)  # nothing known: stretched over the image
            sides.append(tuple(axis.get(cells, even).edges(cells, pixels)))
        return Cells(sides[0], sides[1])

    def of(self, record: AttentionRecord) -> tuple[Cells, Cells]:
        """The cells of a record's queries and of its keys.

        Raises:
            GraftError: the attention is not one between positions of maps.
        """
        if record.query_size is None or record.key_size is None:
            raise GraftError(f"{record.path!r} attends to a sequence, whose positions have no place in the image")
        cells = self.cells(record.query_size)
        if record.pool > 1:
            return cells, cells.pooled(record.pool, record.key_size)
        return cells, self.cells(record.key_size)


@contextmanager
def map_places(model: nn.Module) -> Iterator[list[Places]]:
    """Inside, each forward pass of the model on images [B, C, H, W] adds one `Places` to the list.

    Followed through convolutions and poolings from the image on: a cell is where the pixels lie that its window
    covers, which for a stride of 2 with padding, or an odd side, is not where a map stretched over the image would
    put it. The first module that makes maps of a height or width decides for all of that side. Sides that no such
    module makes (patches cut out, resized maps) are stretched.
    """
    found: list[Places] = []
    axes: tuple[dict[int, Axis], dict[int, Axis]] = ({}, {})

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = next((part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)), None)
        if images is None or images.dim() != 4:
            raise GraftError("places are known for images [B, C, H, W] as the first input of the model alone")
        for axis, side in zip(axes, images.shape[2:], strict=True):
            axis.clear()
            axis[side] = Axis(0.5, 1.0)
        found.append(Places(images.shape[2], images.shape[3], ({}, {})))

    def follow(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (found and args and isinstance(output, Tensor) and output.dim() == args[0].dim() == 4):
            return
        for side, axis in enumerate(axes):
            before, after = args[0].shape[2 + side], output.shape[2 + side]
            if before in axis and after not in axis:
                axis[after] = _after(axis[before], module, side, before, after)

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        height, width = found[-1].image_size
        found[-1] = Places(height, width, (dict(axes[0]), dict(axes[1])))

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, WINDOWED):
                stack.callback(module.register_forward_hook(follow).remove)
        stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(end).remove)
        yield found


WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)


def _after(axis: Axis, module: Any, side: int, before: int, after: int) -> Axis:
    """The cells that a convolution or pooling makes of those before it."""
    kernel, stride, dilation = (_pair(getattr(module, name, 1), side) for name in ("kernel_size", "stride", "dilation"))
    reach = dilation * (kernel - 1)
    padding = getattr(module, "padding", 0)
    padding = reach // 2 if padding == "same" else 0 if isinstance(padding, str) else _pair(padding, side)
    if (before + 2 * padding - reach - 1) // stride + 1 < after and not getattr(module, "ceil_mode", False):
        padding = max((after - 1) * stride + reach + 1 - before, 0) // 2  # padded by its forward, as TensorFlow does
    return Axis(axis.first + (reach / 2 - padding) * axis.step, axis.step * stride)


def _pair(value: Any, side: int) -> int:
    return int(value[side] if isinstance(value, (tuple, list)) else value)
