"""Linears with weights in MXFP8, up to three of one input in a launch, and the input's gradient.

A weight's bytes lie in rows, as they are quantized (``layouts.Mxfp8Rows``). As in ``matmul.py`` the
weight tile is the left operand, decoded in the registers from which matrix units read it. A thread
holds 16 neighbouring bytes of a row, which are no neighbours for the matrix units; but a sum has
any order, so the columns of x are read in the order in which the units meet the weights
(``decode.mxfp8_columns``).

Shape letters: R rows of activations, K contraction, N output. BM, BN, BK: a program's tile of R, N
and K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4_fx.ops.triton_kernels.arithmetic import rounded
from mxfp4_fx.ops.triton_kernels.decode import decode_mxfp8, mxfp8_columns
from mxfp4_fx.ops.triton_kernels.matmul import multiply


@triton.jit
def _nth(part, first, second, third):
    """Return what linear ``part`` of a launch has: a pointer or a number; None where none is."""
    if third is not None:
        second = tl.where(part == 2, third, second)
    if second is not None:
        first = tl.where(part == 0, first, second)
    return first


@triton.jit
def _find_tile(rows, N: tl.constexpr, N2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Return this program's linear, row tile and N tile.

    Row tiles vary first, so that programs that run at the same time share weights.
    """
    tiles: tl.constexpr = (N + BN - 1) // BN
    both: tl.constexpr = tiles + (N2 + BN - 1) // BN
    row_tiles = tl.cdiv(rows, BM)
    n_tile = tl.program_id(0) // row_tiles
    part = (n_tile >= tiles).to(tl.int32) + (n_tile >= both).to(tl.int32)
    return part, tl.program_id(0) % row_tiles, n_tile - _nth(part, 0, tiles, both)


@triton.jit(do_not_specialize=["rows"])
def linears_mxfp8_kernel(
    x, codes, codes2, codes3, scales, scales2, scales3, bias, bias2, bias3, y, y2, y3,
    x_stride, rows, N: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, K: tl.constexpr,
    TERMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, UNITS: tl.constexpr, IS_ORDERED: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Compute one tile of ``x @ W^T + bias`` for one of up to three weights.

    With several splits y is [SPLITS, R, N] float32, each split sums its part of K, and
    ``sum_splits_kernel`` adds them. Grid: (row tiles * N tiles of all weights, SPLITS).

    Args:
        x: [R, K] with rows ``x_stride`` apart; bfloat16, float16 or float32.
        codes, scales: uint32 words [N, K/4] and bytes [N, K/32] of each weight.
        bias: [N] of all weights, or None.
        N, N2, N3: of each weight; 0 where there is none.
        TERMS: the number of bfloat16 terms of an activation, as in ``matmul_ogs_kernel``.
        UNITS, PACKED, OPERAND: see ``decode.decode_mxfp8``.
        IS_ORDERED: whether x, of whole 64 columns, has the order of ``decode.mxfp8_columns``.
    """
    STEPS: tl.constexpr = (K + BK * SPLITS - 1) // (BK * SPLITS)
    IS_WHOLE: tl.constexpr = STEPS * SPLITS * BK == K
    part, row_tile, n_tile = _find_tile(rows, N, N2, BM, BN)
    codes, scales = _nth(part, codes, codes2, codes3), _nth(part, scales, scales2, scales3)
    y, columns = _nth(part, y, y2, y3), _nth(part, N, N2, N3)
    split = tl.program_id(1)
    first = split * (STEPS * BK)

    n = n_tile * BN + tl.arange(0, BN)
    row = row_tile * BM + tl.arange(0, BM)
    in_rows = (row < rows)[:, None]
    word = tl.arange(0, BK // 4)[None, :]
    group = tl.arange(0, BK // 16)[None, :] // 2
    column = mxfp8_columns(BK, UNITS)[None, :]
    w_row = tl.minimum(n, columns - 1).to(tl.int64)[:, None]
    words = codes + w_row * (K // 4) + word
    w_scales = scales + w_row * (K // 32) + group
    place = tl.arange(0, BK)[None, :] if IS_ORDERED else column
    tile_x = x + row.to(tl.int64)[:, None] * x_stride + place

    acc = tl.zeros((BN, BM), tl.float32)
    # The compiler's pipeline has no loads as narrow as a row's scales, so a step loads the next's.
    next_scales = tl.load(w_scales + first // 32, mask=group < (K - first) // 32, other=127)
    for k in range(first, first + STEPS * BK, BK):
        tile_scales = next_scales
        ahead = k + BK
        next_scales = tl.load(w_scales + ahead // 32, mask=group < (K - ahead) // 32, other=127)
        if IS_WHOLE:
            tile_words = tl.load(words + k // 4)
            this_x = tl.load(tile_x + k, mask=in_rows, other=0.0)
        else:
            tile_words = tl.load(words + k // 4, mask=word < (K - k) // 4, other=0)
            this_x = tl.load(tile_x + k, mask=in_rows & (column < K - k), other=0.0)
        weight = decode_mxfp8(tile_words, tile_scales, BN, BK, UNITS, PACKED, OPERAND)
        acc = multiply(acc, weight, this_x, TERMS)

    if bias is not None:
        biased = tl.where(split == 0, columns, 0)  # columns that get a bias, once
        here = _nth(part, bias, bias2, bias3) + n
        acc += tl.load(here, mask=n < biased, other=0.0).to(tl.float32)[:, None]
    to = split.to(tl.int64) * rows + row
    at = y + to[None, :] * columns + n[:, None]
    mask = (n < columns)[:, None] & (row < rows)[None, :]
    tl.store(at, rounded(acc, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def sum_splits_kernel(
    parts, parts2, parts3, y, y2, y3, rows, N: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sum parts [SPLITS, R, N] of each linear into y [R, N], in order.

    Grid: (row tiles * N tiles of all linears,).
    """
    part, row_tile, n_tile = _find_tile(rows, N, N2, BM, BN)
    parts, y = _nth(part, parts, parts2, parts3), _nth(part, y, y2, y3)
    columns = _nth(part, N, N2, N3)
    row = (row_tile * BM + tl.arange(0, BM))[:, None]
    n = (n_tile * BN + tl.arange(0, BN))[None, :]
    mask = (row < rows) & (n < columns)
    at = row.to(tl.int64) * columns + n
    total = tl.load(parts + at, mask=mask, other=0.0)
    for split in range(1, SPLITS):
        total += tl.load(parts + split * rows.to(tl.int64) * columns + at, mask=mask, other=0.0)
    tl.store(y + at, rounded(total, y.dtype.element_ty), mask=mask)


@triton.jit
def _add_transposed(
    acc, grad, codes, scales, row, rows, k_tile, N: tl.constexpr, K: tl.constexpr,
    TERMS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Add ``(grad @ W)^T`` to ``acc`` [BK, BM], for ``grad`` [R, N] and one weight."""
    word = (k_tile * (BK // 4) + tl.arange(0, BK // 4))[None, :]
    group = (k_tile * (BK // 32) + tl.arange(0, BK // 16) // 2)[None, :]
    n = tl.arange(0, BN)
    tile_grad = grad + row.to(tl.int64)[:, None] * N + n[None, :]
    in_rows = (row < rows)[:, None]
    for first in range(0, N, BN):
        w_row = (first + n).to(tl.int64)[:, None]
        in_n = w_row < N
        words = tl.load(codes + w_row * (K // 4) + word, mask=in_n & (word < K // 4), other=0)
        tile_scales = tl.load(
            scales + w_row * (K // 32) + group, mask=in_n & (group < K // 32), other=127
        )
        these = tl.load(tile_grad + first, mask=in_rows & ((first + n) < N)[None, :], other=0.0)
        weight = decode_mxfp8(words, tile_scales, BN, BK, "none", PACKED, OPERAND)
        acc = multiply(acc, weight.T, these, TERMS)
    return acc


@triton.jit(do_not_specialize=["rows"])
def linears_mxfp8_backward_kernel(
    grad, grad2, grad3, codes, codes2, codes3, scales, scales2, scales3, y, rows,
    N: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, K: tl.constexpr, TERMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Compute one tile of y [R, K], the sum of ``grad @ W`` over up to three weights.

    Each ``grad`` is [R, N], and its weight's operands are those of ``linears_mxfp8_kernel``. Grid:
    (row tiles * K tiles,).
    """
    row_tiles = tl.cdiv(rows, BM)
    row = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    k_tile = tl.program_id(0) // row_tiles
    acc = tl.zeros((BK, BM), tl.float32)
    acc = _add_transposed(
        acc, grad, codes, scales, row, rows, k_tile, N, K, TERMS, BN, BK, PACKED, OPERAND
    )
    if grad2 is not None:
        acc = _add_transposed(
            acc, grad2, codes2, scales2, row, rows, k_tile, N2, K, TERMS, BN, BK, PACKED, OPERAND
        )
    if grad3 is not None:
        acc = _add_transposed(
            acc, grad3, codes3, scales3, row, rows, k_tile, N3, K, TERMS, BN, BK, PACKED, OPERAND
        )
    k = k_tile * BK + tl.arange(0, BK)
    at = y + row.to(tl.int64)[None, :] * K + k[:, None]
    mask = (k < K)[:, None] & (row < rows)[None, :]
    tl.store(at, rounded(acc, y.dtype.element_ty), mask=mask)
