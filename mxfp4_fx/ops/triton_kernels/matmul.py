"""The grouped matmul with outer gather and scatter, and the sum over a token's rows.

The weight tile is the left operand: ``acc[n, m] = weight[n, k] x[m, k]^T``. It comes out of
registers, where it was decoded, and the activations out of shared memory.

Shape letters: T tokens, E experts, A experts per token, R routed rows, K contraction, N output.
BM, BN, BK: a program's tile; U: tiles of 64 along K that one step of the loop takes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4_fx.ops.triton_kernels.arithmetic import UNIT, rounded, swiglu, take_term
from mxfp4_fx.ops.triton_kernels.decode import (
    TILE_SCALE_WORDS,
    TILE_WORDS,
    decode_fragments,
    decode_rows,
)


@triton.jit
def _find_tile(expert_offsets, rows, experts, n_tiles, BM: tl.constexpr, GROUPS: tl.constexpr):
    """Which expert this program serves, its rows [start, stop), and its tile of them and of N.

    Programs are dealt to the experts in order, as many as each has tiles, row tiles first: what
    runs at the same time shares weights. Group E holds the rows that no expert here serves. For
    programs beyond the last tile the expert is larger than E.
    """
    pid = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    start = tl.load(expert_offsets + group, mask=group <= experts, other=0)
    stop = tl.load(expert_offsets + group + 1, mask=group < experts, other=0)
    stop = tl.where(group == experts, rows, stop)
    tiles = (stop - start + BM - 1) // BM
    ends = tl.cumsum(tiles * n_tiles, 0)
    is_before = ends <= pid
    expert = tl.sum(is_before.to(tl.int32), 0)
    first_program = tl.max(tl.where(is_before, ends, 0), 0)
    start = tl.sum(tl.where(group == expert, start, 0), 0)
    stop = tl.sum(tl.where(group == expert, stop, 0), 0)
    local = pid - first_program
    row_tiles = tl.maximum((stop - start + BM - 1) // BM, 1)
    return expert, start, stop, local % row_tiles, local // row_tiles


@triton.jit
def _multiply(acc, weight, x, TERMS: tl.constexpr):
    """``acc + weight @ x^T`` with x [BM, BK] taken as a sum of bfloat16 terms, exactly."""
    if TERMS == 1:
        return tl.dot(weight, x.to(UNIT).T, acc, input_precision="ieee")
    rest = x.to(tl.float32)
    for _ in tl.static_range(TERMS):
        term, rest = take_term(rest)
        acc = tl.dot(weight, term.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _multiply_fragments(
    acc, words, scales, x, first, last, K: tl.constexpr, R: tl.constexpr,
    U: tl.constexpr, WGMMA: tl.constexpr, EXACT: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Add the products of K tiles [first, last), a multiple of U, to ``acc``.

    ``words`` [R, 128], ``scales`` [R, 8] and ``x`` [BM, 64] point to K tile 0.
    """
    words += first * TILE_WORDS
    scales += first * TILE_SCALE_WORDS
    x += first * 64
    k = first * 64 + tl.arange(0, 64)[None, :]
    for _ in range(0, (last - first) // U):
        for u in tl.static_range(U):
            tile_words = tl.load(words + u * TILE_WORDS)
            tile_scales = tl.load(scales + u * TILE_SCALE_WORDS)
            if K % 64 == 0:
                tile_x = tl.load(x + u * 64)
            else:
                tile_x = tl.load(x + u * 64, mask=k + u * 64 < K, other=0.0)
            weight = decode_fragments(tile_words, tile_scales, R, WGMMA, EXACT)
            acc = _multiply(acc, weight, tile_x, TERMS)
        words += U * TILE_WORDS
        scales += U * TILE_SCALE_WORDS
        x += U * 64
        k += U * 64
    return acc


@triton.jit
def _multiply_rows(
    acc, codes, scales, x, in_n, first, last, K: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, EXACT: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """As :func:`_multiply_fragments`, in checkpoint order and steps of BK.

    ``codes`` [BN, 1], ``scales`` [BN, 1] and ``x`` [BM, 1] point to column 0 of their rows.
    """
    column = tl.arange(0, BK)[None, :]
    half = tl.arange(0, BK // 2)[None, :]
    group = tl.arange(0, BK // 32)[None, :]
    for step in range(first, last):
        k = step * BK
        tile_codes = tl.load(codes + k // 2 + half, mask=in_n & (k // 2 + half < K // 2), other=0)
        tile_scales = tl.load(
            scales + k // 32 + group, mask=in_n & (k // 32 + group < K // 32), other=127
        )
        tile_x = tl.load(x + k + column, mask=k + column < K, other=0.0)
        if EXACT:
            weight = decode_rows(tile_codes, tile_scales, BN, BK)
            acc = _multiply(acc, weight, tile_x, TERMS)
        elif TERMS == 1:
            acc = tl.dot_scaled(tile_codes, tile_scales, "e2m1", tile_x.T, None, "bf16", acc)
        else:
            rest = tile_x.to(tl.float32)
            for _ in tl.static_range(TERMS):
                term, rest = take_term(rest)
                acc = tl.dot_scaled(
                    tile_codes, tile_scales, "e2m1", term.to(tl.bfloat16).T, None, "bf16", acc
                )
    return acc


@triton.jit
def _has_extreme_scale(scales, in_n, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Whether a scale byte of these rows is 0 or 255, which ``tl.dot_scaled`` decodes wrongly."""
    group = tl.arange(0, BK // 32)[None, :]
    found = tl.zeros((BN, BK // 32), tl.int32)
    for k in range(0, K // 32, BK // 32):
        byte = tl.load(scales + k + group, mask=in_n & (k + group < K // 32), other=127)
        found |= ((byte == 0) | (byte == 255)).to(tl.int32)
    return tl.max(tl.max(found, 1), 0) != 0


@triton.jit(do_not_specialize=["rows"])
def matmul_ogs_kernel(
    x, blocks, scales, bias, expert_offsets, gather_index, scatter_index, gammas, y,
    x_stride, rows, experts, alpha, limit,
    N: tl.constexpr, K: tl.constexpr, LAYOUT: tl.constexpr, SWIGLU: tl.constexpr,
    TERMS: tl.constexpr, GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One tile of ``act(x[gather_index] @ W^T + bias) * gammas``, for one expert.

    Without ``scatter_index`` y is [R, N'] and row r goes to row r. With it y is [SPLITS, R, N'], and
    row r goes to slot ``scatter_index[r]``; each split sums its part of K, and ``combine_kernel``
    adds them up. Grid: (tiles of all experts, SPLITS).

    Args:
        x: [*, K] with rows ``x_stride`` apart; bfloat16, float16 or float32.
        blocks, scales: uint32 words of E experts in fragments, or bytes in checkpoint order.
        bias: [E, N]; expert_offsets: [E + 1]; gather_index, scatter_index, gammas: [R] or None.
        GROUPS: a power of 2 above E. BK: 64 U for fragments.
        TERMS: bfloat16 numbers that make up an activation: 1, 2 (float16) or 3 (float32).
    """
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    expert, start, stop, row_tile, n_tile = _find_tile(
        expert_offsets, rows, experts, n_tiles, BM, GROUPS
    )
    if expert > experts:
        return
    split = tl.program_id(1)
    is_served = expert < experts
    served = tl.minimum(expert, experts - 1).to(tl.int64)

    row = start + row_tile * BM + tl.arange(0, BM)
    in_rows = row < stop
    row = tl.minimum(row, stop - 1)  # reads what is there; the results are not stored
    token = row if gather_index is None else tl.load(gather_index + row)
    x_rows = x + token.to(tl.int64)[:, None] * x_stride

    acc = tl.zeros((BN, BM), tl.float32)
    steps: tl.constexpr = (K + BK - 1) // BK
    per_split: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    first = tl.minimum(split * per_split, steps)
    last = tl.minimum(first + per_split, steps)
    last = tl.where(is_served, last, first)
    if LAYOUT == "row_major":
        n = n_tile * BN + tl.arange(0, BN)
        in_n = (n < N)[:, None]
        w_row = served * N + tl.minimum(n, N - 1)[:, None]
        codes = blocks + w_row * (K // 2)
        w_scales = scales + w_row * (K // 32)
        if _has_extreme_scale(w_scales, in_n, K, BN, BK):
            acc = _multiply_rows(
                acc, codes, w_scales, x_rows, in_n, first, last, K, BN, BK, True, TERMS
            )
        else:
            acc = _multiply_rows(
                acc, codes, w_scales, x_rows, in_n, first, last, K, BN, BK, False, TERMS
            )
    else:
        R: tl.constexpr = BN // 16
        U: tl.constexpr = BK // 64
        K_TILES: tl.constexpr = (K + 63) // 64
        N_TILES: tl.constexpr = (N + 15) // 16
        WGMMA: tl.constexpr = LAYOUT == "wgmma_fragments"
        tile = served * N_TILES + tl.minimum(n_tile * R + tl.arange(0, R), N_TILES - 1)
        words = blocks + tile[:, None] * (K_TILES * TILE_WORDS)
        words += tl.arange(0, TILE_WORDS)[None, :]
        w_scales = scales + tile * ((K_TILES + 1) * TILE_SCALE_WORDS)
        is_wide = tl.load(w_scales + K_TILES * TILE_SCALE_WORDS)
        w_scales = w_scales[:, None] + tl.arange(0, TILE_SCALE_WORDS)[None, :]
        x_tile = x_rows + tl.arange(0, 64)[None, :]
        first, last = first * U, last * U
        if tl.max(is_wide, 0) != 0:
            acc = _multiply_fragments(
                acc, words, w_scales, x_tile, first, last, K, R, 1, WGMMA, True, TERMS
            )
        else:
            acc = _multiply_fragments(
                acc, words, w_scales, x_tile, first, last, K, R, U, WGMMA, False, TERMS
            )

    factor = tl.full((BM,), 1.0, tl.float32) if gammas is None else tl.load(gammas + row)
    if scatter_index is None:
        to = row.to(tl.int64)
    else:
        to = split.to(tl.int64) * rows + tl.load(scatter_index + row)
    biased = tl.where(is_served & (split == 0), N, 0)  # columns that get a bias
    bias += served * N
    if SWIGLU:
        if LAYOUT == "row_major":
            gate, up = acc.reshape(BN // 2, 2, BM).permute(0, 2, 1).split()
        else:  # a tile's rows: eight gates, then their eight ups
            gate, up = acc.reshape(BN // 16, 2, 8, BM).permute(0, 2, 3, 1).split()
            gate, up = gate.reshape(BN // 2, BM), up.reshape(BN // 2, BM)
        n = n_tile * (BN // 2) + tl.arange(0, BN // 2)
        in_n = n < N // 2
        gate += tl.load(bias + 2 * n, mask=2 * n < biased, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias + 2 * n + 1, mask=2 * n < biased, other=0.0).to(tl.float32)[:, None]
        value = swiglu(gate, up, alpha, limit)
        y += to[None, :] * (N // 2)
    else:
        i = tl.arange(0, BN)
        if LAYOUT != "row_major":
            i = i // 16 * 16 + i % 8 * 2 + i // 8 % 2
        n = n_tile * BN + i
        in_n = n < N
        value = acc + tl.load(bias + n, mask=n < biased, other=0.0).to(tl.float32)[:, None]
        y += to[None, :] * N
    value = value * factor[None, :]
    tl.store(y + n[:, None], rounded(value, y.dtype.element_ty), mask=in_n[:, None] & in_rows[None, :])


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    parts, y, tokens, N: tl.constexpr, A: tl.constexpr, SPLITS: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``y[t] = sum over a of (sum over s of parts[s, t A + a])``, in this order.

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
