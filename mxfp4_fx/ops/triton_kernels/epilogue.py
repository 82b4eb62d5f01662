"""The matmul's epilogue: bias, activation, gammas, the store, and the sum over a token's rows.

Shape letters: T tokens, A experts per token, R routed rows, N output. BM, BN: a program's tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4_fx.ops.triton_kernels.arithmetic import gated, relu2, rounded


@triton.jit
def tile_rows(first_row, stop, BM: tl.constexpr):
    """Return the rows of a tile, and a mask of those below ``stop``; the others repeat the last."""
    row = first_row + tl.arange(0, BM)
    return tl.minimum(row, stop - 1), row < stop


@triton.jit
def put(
    value, first_row, stop, split, scatter_index, y, rows, n_tile, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store ``value`` [BN, BM] into columns of y, in rows [first_row, stop) or in their slots."""
    row, in_rows = tile_rows(first_row, stop, BM)
    if scatter_index is None:
        to = row.to(tl.int64)
    else:
        to = split.to(tl.int64) * rows + tl.load(scatter_index + row)
    n = n_tile * BN + tl.arange(0, BN)
    at = y + to[None, :] * N + n[:, None]
    tl.store(at, rounded(value, y.dtype.element_ty), mask=(n < N)[:, None] & in_rows[None, :])


@triton.jit
def _finish_part(
    acc, bias, first_row, stop, split, scatter_index, gammas, y, rows, n_tile, alpha, limit,
    up_offset, N: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Do :func:`finish` for so few elements that registers hold them and their addresses."""
    IS_GATED: tl.constexpr = ACTIVATION == "swiglu" or ACTIVATION == "geglu_tanh"
    COLUMNS: tl.constexpr = BN // 2 if IS_GATED else BN
    n = n_tile * COLUMNS + tl.arange(0, COLUMNS)
    biased = tl.where(split == 0, N, 0)  # columns that get a bias: only the first split adds it
    if IS_GATED:
        if LAYOUT == "row_major":
            gate, up = acc.reshape(BN // 2, 2, BM).permute(0, 2, 1).split()
        else:  # the rows of a fragment tile are eight gates, then their eight ups
            gate, up = acc.reshape(BN // 16, 2, 8, BM).permute(0, 2, 3, 1).split()
            gate, up = gate.reshape(COLUMNS, BM), up.reshape(COLUMNS, BM)
        if bias is not None:
            has_bias = 2 * n < biased
            gate += tl.load(bias + 2 * n, mask=has_bias, other=0.0).to(tl.float32)[:, None]
            up += tl.load(bias + 2 * n + 1, mask=has_bias, other=0.0).to(tl.float32)[:, None]
        value = gated(gate, up, alpha, limit, up_offset, ACTIVATION)
    else:
        value = acc
        if LAYOUT != "row_major":
            value = acc.reshape(BN // 16, 2, 8, BM).permute(0, 2, 1, 3).reshape(BN, BM)
        if bias is not None:
            value += tl.load(bias + n, mask=n < biased, other=0.0).to(tl.float32)[:, None]
        if ACTIVATION == "relu2":
            value = relu2(value)
    if gammas is not None:
        row, _in_rows = tile_rows(first_row, stop, BM)
        value *= tl.load(gammas + row)[None, :]
    put(
        value, first_row, stop, split, scatter_index, y, rows, n_tile, N // 2 if IS_GATED else N,
        BM, COLUMNS,
    )  # fmt: skip


@triton.jit
def finish(
    acc, bias, first_row, stop, split, scatter_index, gammas, y, rows, n_tile, alpha, limit,
    up_offset, N: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Apply bias, activation and gammas to ``acc`` [BN, BM], then :func:`put` it.

    ``bias`` points to the expert's bias.
    """
    if BN * BM > 16384:
        first, second = acc.reshape(BN, 2, BM // 2).permute(0, 2, 1).split()
        _finish_part(
            first, bias, first_row, stop, split, scatter_index, gammas, y, rows, n_tile, alpha,
            limit, up_offset, N, LAYOUT, ACTIVATION, BM // 2, BN,
        )  # fmt: skip
        _finish_part(
            second, bias, first_row + BM // 2, stop, split, scatter_index, gammas, y, rows, n_tile,
            alpha, limit, up_offset, N, LAYOUT, ACTIVATION, BM // 2, BN,
        )  # fmt: skip
    else:
        _finish_part(
            acc, bias, first_row, stop, split, scatter_index, gammas, y, rows, n_tile, alpha, limit,
            up_offset, N, LAYOUT, ACTIVATION, BM, BN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    parts, y, tokens, N: tl.constexpr, A: tl.constexpr, SPLITS: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute ``y[t] = sum over a of (sum over s of parts[s, t A + a])``, in this order.

    parts: [SPLITS, T A, N] float32; y: [T, N]. Grid: (T / BT, N / BN), rounded up.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (t < tokens)[:, None] & (n < N)[None, :]
    total = tl.zeros((BT, BN), tl.float32)
    for a in range(A):
        slot = parts + (t * A + a)[:, None] * N + n[None, :]
        row = tl.load(slot, mask=mask, other=0.0)
        for s in range(1, SPLITS):
            row += tl.load(slot + s * tokens.to(tl.int64) * A * N, mask=mask, other=0.0)
        total += row
    tl.store(y + t[:, None] * N + n[None, :], rounded(total, y.dtype.element_ty), mask=mask)
