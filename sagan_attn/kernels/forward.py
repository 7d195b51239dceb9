"""The forward pass: an online softmax for each slice of the value columns.

After FlashAttention 2 (Dao 2023, arXiv:2307.08691), where a program keeps the output of some queries in registers and
goes through all keys. Here queries and keys are narrow, so scores cost little, and values may be too wide for the
registers: a program owns a slice of the value columns and computes the scores for itself.
"""

import triton
import triton.language as tl

from sagan_attn.kernels.tiles import kept, limited, place, tile


@triton.jit
def forward(
    Q, K, V, OUT, LSE, MASK, LENS, ROWS, COLUMNS, SEED,
    q_strides, k_strides, v_strides, out_strides, mask_strides, lens_strides,
    heads, N, M, d, D, scale, height, width, dropped, grown,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_V: tl.constexpr,
    EACH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT [B, h, N, D], and LSE [B*h*N], the log-sum-exp of each query's scores as a power of 2.

    scale: of scores as powers of 2. dropped, grown: share of weights to drop in 2**31, factor on the others.
    """
    slices = tl.cdiv(D, BLOCK_V)
    i, z, b, h = place(tl.program_id(0), tl.cdiv(N, BLOCK_N) * slices, heads)
    n = i // slices * BLOCK_N + tl.arange(0, BLOCK_N)
    features, columns = tl.arange(0, BLOCK_Q), i % slices * BLOCK_V + tl.arange(0, BLOCK_V)
    keys = tl.arange(0, BLOCK_M)
    q = tl.load(
        Q + b * q_strides[0] + h * q_strides[1] + tile(q_strides, n, features),
        mask=(n < N)[:, None] & (features < d)[None, :],
        other=0.0,
    )
    K += b * k_strides[0] + h * k_strides[1] + tile(k_strides, keys, features)
    V += b * v_strides[0] + h * v_strides[1] + tile(v_strides, keys, columns)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    out = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    end = M
    if LENS is not None:
        end = tl.minimum(M, tl.max(tl.load(LENS + b * lens_strides[0] + n * lens_strides[1], mask=n < N, other=0), 0))
    for start in range(0, end, BLOCK_M):
        m = start + keys
        k = tl.load(
            K + tl.cast(start, tl.int64) * k_strides[2],
            mask=(m < M)[:, None] & (features < d)[None, :],
            other=0.0,
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = limited(
            s, n[:, None], m[None, :], z, b, h, N, M,
            MASK, mask_strides, LENS, lens_strides, ROWS, COLUMNS, height, width, EACH,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet: -inf - -inf would be NaN
        p = tl.exp2(s - base[:, None])
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(p, 1)
        top = higher
        if SEED is not None:
            p = tl.where(kept(s, SEED, n[:, None], m[None, :], z, dropped), p * grown, 0.0)
        v = tl.load(
            V + tl.cast(start, tl.int64) * v_strides[2],
            mask=(m < M)[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        out = tl.dot(p.to(v.dtype), v, out * shrunk[:, None], input_precision=PRECISION)
    none = total == 0  # queries without any key
    total = tl.where(none, 1.0, total)
    tl.store(
        OUT + b * out_strides[0] + h * out_strides[1] + tile(out_strides, n, columns),
        (out / total[:, None]).to(OUT.dtype.element_ty),
        mask=(n < N)[:, None] & (columns < D)[None, :],
    )
    if i % slices == 0:
        tl.store(LSE + z.to(tl.int64) * N + n, tl.where(none, 0.0, top + tl.log2(total)), mask=n < N)
