"""The tiles of the kernels: a small table, not tuned on a GPU yet.

Chosen so that the accumulators and scores of a program stay in registers (255 a thread) and its tiles in the shared
memory of a multiprocessor; `benchmarks/kernel_ptx.py` compiles all of them without a GPU and writes what each takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

__all__ = ["LARGE_ROOM", "TABLES", "WIDENED", "Tiles", "choose", "padded"]

LARGE_ROOM, ROOM = 220 * 1024, 160 * 1024  # shared memory of a program on an H100, and on an A100


@dataclass(frozen=True)
class Tiles:
    """Queries, keys and value columns a program works on at a time, its warps, and how far ahead it loads.

    widest: queries and keys up to so many features. large: for GPUs with as much shared memory as an H100, whose
    products also read their operands from there instead of from registers.
    """

    queries: int
    keys: int
    values: int
    warps: int
    stages: int
    widest: int = 128
    large: bool = False

    def arguments(self, d: int) -> dict[str, Any]:
        """Those of a kernel, for queries and keys d wide."""
        blocks = {"BLOCK_N": self.queries, "BLOCK_M": self.keys, "BLOCK_Q": padded(d), "BLOCK_V": self.values}
        # Fused multiply-adds are what Triton did by default until it began to warn about it.
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def turned(self) -> "Tiles":
        """With as many keys as queries, and the other way round: from O = P V to dV = P^T dO."""
        return replace(self, queries=self.keys, keys=self.queries)


Table = Mapping[int, Sequence[Tiles]]  # by bytes of the widest input

# Each slice of the value columns has the scores computed anew. float32 has no tensor cores without tf32.
FORWARD: Table = {
    2: (
        Tiles(128, 64, 16, 4, 3),
        Tiles(128, 64, 32, 4, 3),
        Tiles(128, 64, 64, 4, 3),
        Tiles(128, 64, 128, 8, 3),
        Tiles(128, 64, 256, 8, 3),
    ),
    4: (
        Tiles(64, 32, 16, 8, 1, widest=64),
        Tiles(64, 32, 32, 8, 1, widest=64),
        Tiles(64, 32, 64, 8, 1, widest=64),
        Tiles(32, 32, 32, 8, 1),
    ),
}
# Values wider than the widest tile go through it in parts, and dV has a launch of its own.
BACKWARD: Table = {
    2: (
        Tiles(64, 128, 16, 8, 2),
        Tiles(64, 128, 32, 8, 2),
        Tiles(64, 128, 64, 8, 2),
        Tiles(64, 128, 128, 8, 2, widest=64),
        Tiles(64, 64, 256, 8, 2, widest=64, large=True),
    ),
    4: (Tiles(32, 32, 16, 8, 1), Tiles(32, 32, 32, 8, 1)),
}
OF_QUERIES: Table = {2: (Tiles(64, 64, 64, 4, 2),), 4: (Tiles(32, 32, 32, 8, 1),)}


TABLES = {"forward": FORWARD, "backward": BACKWARD, "of queries": OF_QUERIES}
# Without as much as an H100 has, where float32 copies of float16 queries, keys and dS leave too little to those above.
WIDENED = {"backward": Tiles(64, 64, 64, 8, 1), "of queries": Tiles(64, 32, 64, 4, 1)}


@cache  # at each launch
def choose(table: str, itemsize: int, d: int, size: int, room: int, widened: bool = False) -> Tiles:
    """Those with the fewest multiplications for queries d and values `size` wide, that fit into so much room.

    widened: the backward pass holds float32 copies, because the queries are float16.
    """
    if widened and itemsize == 2 and room < LARGE_ROOM and (table == "of queries" or (table == "backward" and d > 32)):
        return WIDENED[table]

    def cost(tiles: Tiles) -> tuple[int, int]:
        slices = -(-size // tiles.values)
        return slices * (padded(d) + tiles.values), slices

    fitting = [x for x in TABLES[table][itemsize] if padded(d) <= x.widest and (not x.large or room >= LARGE_ROOM)]
    best = min(fitting, key=cost)
    return best if room >= ROOM else replace(best, stages=1)


def padded(size: int) -> int:
    """The next power of 2 from 16 on, which tiles have to be."""
    return max(16, 1 << (size - 1).bit_length())
