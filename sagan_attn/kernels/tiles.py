"""What the kernels share: where a tile lies in memory, which scores count, and which weights are dropped.

In all kernels n are queries and m keys, N and M of them; names in capitals are pointers, strides are those of
[B, h, rows, features], and each program belongs to one map, that of a sample and a head.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # scores are powers of 2, which a GPU has an instruction for


@triton.jit
def place(block, blocks, heads):
    """Block, map, sample and head of a program: neighbours read the same map, which stays in the cache."""
    z = block // blocks
    return block % blocks, z, (z // heads).to(tl.int64), (z % heads).to(tl.int64)


@triton.jit
def tile(strides, rows, features):
    """Offsets of a tile, 64 bits wide: B*h*N*D may exceed 2**31."""
    return rows[:, None].to(tl.int64) * strides[2] + features[None, :].to(tl.int64) * strides[3]


@triton.jit
def limited(
    s, n, m, z, b, h, N, M,
    MASK, mask_strides, LENS, lens_strides, ROWS, COLUMNS, height, width, EACH: tl.constexpr,
):  # fmt: skip
    """Scores s with the position added, -inf where a query may not attend to a key; n and m broadcast to s.

    ROWS and COLUMNS [B*h*N, height or width]: what the row and the column of the key add to a score.
    EACH: the mask differs from query to query.
    """
    real = m < M
    if ROWS is not None:
        query, inside = z.to(tl.int64) * N + n, real & (n < N)
        s += tl.load(ROWS + query * height + m // width, mask=inside, other=0.0) * LOG2_E
        s += tl.load(COLUMNS + query * width + m % width, mask=inside, other=0.0) * LOG2_E
    allowed = real
    if MASK is not None:
        at = MASK + b * mask_strides[0] + h * mask_strides[1] + m.to(tl.int64) * mask_strides[3]
        if EACH:
            allowed = allowed & (tl.load(at + n.to(tl.int64) * mask_strides[2], mask=real & (n < N), other=0) != 0)
        else:
            allowed = allowed & (tl.load(at, mask=real, other=0) != 0)
    if LENS is not None:
        allowed = allowed & (m < tl.load(LENS + b * lens_strides[0] + n * lens_strides[1], mask=n < N, other=0))
    return tl.where(allowed, s, float("-inf"))


@triton.jit
def kept(s, SEED, n, m, z, dropped):
    """Which weights of the shape of s are not dropped; dropped is their share in 2**31.

    A number for each weight by its own place (Philox, Salmon et al. 2011), so the tiles of the two passes may differ.
    """
    none = tl.zeros(s.shape, tl.int32)
    random, _, _, _ = tl.philox(tl.load(SEED), none + n, none + m, none + z, none)
    return (random >> 1).to(tl.int32) >= dropped
