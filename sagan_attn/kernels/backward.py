"""The backward pass, from the log-sum-exp of the scores and the row sums of dO * O alone.

After FlashAttention 2 (Dao 2023, arXiv:2307.08691): with P the weights, dV = P^T dO, dP = dO V^T,
dS = P * (dP - rowsum(dO * O)), dQ = dS K, dK = dS^T Q. dV and dP carry the wide dimension, dQ and dK the narrow one.
"""

import triton
import triton.language as tl

from sagan_attn.kernels.tiles import kept, limited, place, tile


@triton.jit
def row_sums(GRAD, OUT, DELTA, grad_strides, out_strides, heads, N, D, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """DELTA [B*h*N], the sums of GRAD * OUT over the features."""
    i, z, b, h = place(tl.program_id(0), tl.cdiv(N, BLOCK_N), heads)
    n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    GRAD += b * grad_strides[0] + h * grad_strides[1]
    OUT += b * out_strides[0] + h * out_strides[1]
    delta = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = (n < N)[:, None] & (columns < D)[None, :]
        grad = tl.load(GRAD + tile(grad_strides, n, columns), mask=inside, other=0.0).to(tl.float32)
        delta += tl.sum(grad * tl.load(OUT + tile(out_strides, n, columns), mask=inside, other=0.0).to(tl.float32), 1)
    tl.store(DELTA + z.to(tl.int64) * N + n, delta, mask=n < N)


@triton.jit
def of_keys(
    Q, K, V, GRAD, LSE, DELTA, DQ, DK, DV, MASK, LENS, ROWS, COLUMNS, SEED,
    q_strides, k_strides, v_strides, grad_strides, dq_strides, dk_strides, dv_strides, mask_strides, lens_strides,
    heads, N, M, d, D, scale, factor, height, width, dropped, grown,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr, ADD: tl.constexpr, RAISED: tl.constexpr, WIDEN: tl.constexpr,
    EACH: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """DV and DK of some keys, which go through all queries, and what they add to DQ. Those that are None are left out.

    With DK, V is needed over its whole width: for WHOLE at once, BLOCK_V being no less, else in parts. Without DK, a
    program owns a slice of DV, in columns.

    Args:
        scale: of scores as powers of 2; factor: of the scores themselves.
        ADD: to DQ, float32 and 0 at first, because there are several blocks of keys. The order of the sums, and with
            it the last bits, differ from run to run.
        RAISED: a factor that keeps small weights within what float16 holds.
        WIDEN: dS stays float32, which float16 may not hold, in products of precision NARROW.
    """
    slices = 1
    if DK is None:
        slices = tl.cdiv(D, BLOCK_V)
    i, z, b, h = place(tl.program_id(0), tl.cdiv(M, BLOCK_M) * slices, heads)
    m = i // slices * BLOCK_M + tl.arange(0, BLOCK_M)
    features, columns = tl.arange(0, BLOCK_Q), i % slices * BLOCK_V + tl.arange(0, BLOCK_V)
    queries = tl.arange(0, BLOCK_N)
    k_inside = (m < M)[:, None] & (features < d)[None, :]
    v_inside = (m < M)[:, None] & (columns < D)[None, :]
    k = tl.load(K + b * k_strides[0] + h * k_strides[1] + tile(k_strides, m, features), mask=k_inside, other=0.0)
    V += b * v_strides[0] + h * v_strides[1]
    Q += b * q_strides[0] + h * q_strides[1] + tile(q_strides, queries, features)
    GRAD += b * grad_strides[0] + h * grad_strides[1]
    LSE += z.to(tl.int64) * N
    DELTA += z.to(tl.int64) * N
    if DQ is not None:
        DQ += b * dq_strides[0] + h * dq_strides[1] + tile(dq_strides, queries, features)
    if DK is not None:
        dk = tl.zeros([BLOCK_M, BLOCK_Q], tl.float32)
        if WHOLE:
            v = tl.load(V + tile(v_strides, m, columns), mask=v_inside, other=0.0)
    if DV is not None:
        dv = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + queries
        q_inside = (n < N)[:, None] & (features < d)[None, :]
        q = tl.load(Q + tl.cast(start, tl.int64) * q_strides[2], mask=q_inside, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # [BLOCK_M, BLOCK_N]
        s = limited(
            s, n[None, :], m[:, None], z, b, h, N, M,
            MASK, mask_strides, LENS, lens_strides, ROWS, COLUMNS, height, width, EACH,
        )  # fmt: skip
        p = tl.exp2(s - tl.load(LSE + n, mask=n < N, other=float("inf"))[None, :])
        if SEED is not None:
            stays = kept(s, SEED, n[None, :], m[:, None], z, dropped)
        if DV is not None or WHOLE:
            g = tl.load(
                GRAD + tile(grad_strides, n, columns), mask=(n < N)[:, None] & (columns < D)[None, :], other=0.0
            )
        if DV is not None:
            used = p * RAISED
            if SEED is not None:
                used = tl.where(stays, used, 0.0)  # grown at the end: here float16 might not hold them
            dv = tl.dot(tl.cast(used, g.dtype), g, dv, input_precision=PRECISION)
        if DK is not None:
            if WHOLE:
                dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
            else:
                dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for left in range(0, D, BLOCK_V):
                    part = left + tl.arange(0, BLOCK_V)
                    v = tl.load(V + tile(v_strides, m, part), mask=(m < M)[:, None] & (part < D)[None, :], other=0.0)
                    g = tl.load(
                        GRAD + tile(grad_strides, n, part), mask=(n < N)[:, None] & (part < D)[None, :], other=0.0
                    )
                    dp = tl.dot(v, tl.trans(g), dp, input_precision=PRECISION)
            if SEED is not None:
                dp = tl.where(stays, dp * grown, 0.0)
            ds = p * (dp - tl.load(DELTA + n, mask=n < N, other=0.0)[None, :])
            if not WIDEN:
                ds = tl.cast(ds, q.dtype)
            dk = tl.dot(ds, q.to(ds.dtype), dk, input_precision=NARROW)
            if DQ is not None:
                dq = tl.dot(tl.trans(ds), k.to(ds.dtype), input_precision=NARROW) * factor
                at = DQ + tl.cast(start, tl.int64) * dq_strides[2]
                if ADD:
                    tl.atomic_add(at, dq, mask=q_inside, sem="relaxed")
                else:
                    tl.store(at, dq.to(DQ.dtype.element_ty), mask=q_inside)
    if DK is not None:
        DK += b * dk_strides[0] + h * dk_strides[1] + tile(dk_strides, m, features)
        tl.store(DK, (dk * factor).to(DK.dtype.element_ty), mask=k_inside)
    if DV is not None:
        if SEED is not None:
            dv = dv * grown
        DV += b * dv_strides[0] + h * dv_strides[1] + tile(dv_strides, m, columns)
        tl.store(DV, tl.cast(dv / RAISED, DV.dtype.element_ty), mask=v_inside)


@triton.jit
def of_queries(
    Q, K, V, GRAD, LSE, DELTA, DQ, DROWS, DCOLUMNS, MASK, LENS, ROWS, COLUMNS, SEED,
    q_strides, k_strides, v_strides, grad_strides, dq_strides, mask_strides, lens_strides,
    heads, N, M, d, D, scale, factor, height, width, dropped, grown,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, WHOLE: tl.constexpr, WIDEN: tl.constexpr,
    EACH: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """DQ of some queries, which go through all keys, with DROWS and DCOLUMNS [B*h*N, height or width] of the position.

    The dearer way to DQ, because dP is computed once more, and the one whose sums have one order.
    """
    i, z, b, h = place(tl.program_id(0), tl.cdiv(N, BLOCK_N), heads)
    n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    features, columns, keys = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_M)
    q_inside = (n < N)[:, None] & (features < d)[None, :]
    q = tl.load(Q + b * q_strides[0] + h * q_strides[1] + tile(q_strides, n, features), mask=q_inside, other=0.0)
    K += b * k_strides[0] + h * k_strides[1] + tile(k_strides, keys, features)
    V += b * v_strides[0] + h * v_strides[1]
    GRAD += b * grad_strides[0] + h * grad_strides[1]
    lse = tl.load(LSE + z.to(tl.int64) * N + n, mask=n < N, other=float("inf"))
    delta = tl.load(DELTA + z.to(tl.int64) * N + n, mask=n < N, other=0.0)
    if WHOLE:
        g = tl.load(GRAD + tile(grad_strides, n, columns), mask=(n < N)[:, None] & (columns < D)[None, :], other=0.0)
    dq = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    if DROWS is not None:
        drows = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        dcolumns = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
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
        p = tl.exp2(s - lse[:, None])
        if WHOLE:
            v = tl.load(V + tile(v_strides, m, columns), mask=(m < M)[:, None] & (columns < D)[None, :], other=0.0)
            dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        else:
            dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for left in range(0, D, BLOCK_V):
                part = left + columns
                g = tl.load(GRAD + tile(grad_strides, n, part), mask=(n < N)[:, None] & (part < D)[None, :], other=0.0)
                v = tl.load(V + tile(v_strides, m, part), mask=(m < M)[:, None] & (part < D)[None, :], other=0.0)
                dp = tl.dot(g, tl.trans(v), dp, input_precision=PRECISION)
        if SEED is not None:
            dp = tl.where(kept(s, SEED, n[:, None], m[None, :], z, dropped), dp * grown, 0.0)
        ds = p * (dp - delta[:, None])
        if not WIDEN:
            ds = tl.cast(ds, k.dtype)
        dq = tl.dot(ds, k.to(ds.dtype), dq, input_precision=NARROW)
        if DROWS is not None:  # sums over the keys of a row, or of a column, as products with 0 and 1
            row = tl.where((m // width)[:, None] == tl.arange(0, BLOCK_H)[None, :], 1.0, 0.0)
            column = tl.where((m % width)[:, None] == tl.arange(0, BLOCK_W)[None, :], 1.0, 0.0)
            drows = tl.dot(ds, row.to(ds.dtype), drows, input_precision=NARROW)
            dcolumns = tl.dot(ds, column.to(ds.dtype), dcolumns, input_precision=NARROW)
    DQ += b * dq_strides[0] + h * dq_strides[1] + tile(dq_strides, n, features)
    tl.store(DQ, (dq * factor).to(DQ.dtype.element_ty), mask=q_inside)
    if DROWS is not None:
        at = (z.to(tl.int64) * N + n)[:, None]
        rows, columns = tl.arange(0, BLOCK_H)[None, :], tl.arange(0, BLOCK_W)[None, :]
        tl.store(DROWS + at * height + rows, drows, mask=(n < N)[:, None] & (rows < height))
        tl.store(DCOLUMNS + at * width + columns, dcolumns, mask=(n < N)[:, None] & (columns < width))
