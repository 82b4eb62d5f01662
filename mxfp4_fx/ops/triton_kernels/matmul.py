"""The grouped matmul with outer gather and scatter.

The weight tile is the left operand: ``acc[n, m] = weight[n, k] x[m, k]^T``. The matrix units read
it from the registers in which it was decoded, and the activations from shared memory.

Shape letters: T tokens, E experts, A experts per token, R routed rows, K contraction, N output.
BM, BN, BK: a program's tile; U: tiles of 64 along K in one step of the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4_fx.ops.triton_kernels.arithmetic import take_term, uniform
from mxfp4_fx.ops.triton_kernels.decode import (
    TILE_SCALE_WORDS,
    TILE_WORDS,
    decode_fragments,
    decode_rows,
)
from mxfp4_fx.ops.triton_kernels.epilogue import finish, put, tile_rows


@triton.jit
def _find_tile(expert_offsets, rows, experts, n_tiles, BM: tl.constexpr, GROUPS: tl.constexpr):
    """Return this program's expert, the expert's rows [start, stop), the row tile and the N tile.

    Each expert in turn gets as many programs as it has tiles. Row tiles vary first, so that
    programs that run at the same time share weights. Group E has the rows of experts that are not
    held here. Programs beyond the last tile get an expert larger than E.
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
def multiply(acc, weight, x, TERMS: tl.constexpr):
    """Return ``acc + weight @ x^T``, with x [BM, BK] split exactly into bfloat16 terms.

    One term is x itself, which the weight's dtype holds.
    """
    if TERMS == 1:
        return tl.dot(weight, x.to(weight.dtype).T, acc, input_precision="ieee")
    rest = x.to(tl.float32)
    for _ in tl.static_range(TERMS):
        term, rest = take_term(rest)
        acc = tl.dot(weight, term.to(weight.dtype).T, acc, input_precision="ieee")
    return acc


@triton.jit
def _fragments(blocks, scales, n_tile, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr):
    """Return pointers to a tile's codes [BN/16, 128] and scales [BN/16, 8], and whether it is wide.

    A tile is wide if one of its scales needs exact decoding. ``blocks`` and ``scales`` point to
    those of the expert.
    """
    K_TILES: tl.constexpr = (K + 63) // 64
    N_TILES: tl.constexpr = (N + 15) // 16
    tile = n_tile * (BN // 16) + tl.arange(0, BN // 16)
    if N % BN:
        tile = tl.minimum(tile, N_TILES - 1)
    words = blocks + tile[:, None] * (K_TILES * TILE_WORDS) + tl.arange(0, TILE_WORDS)[None, :]
    scales += tile * ((K_TILES + 1) * TILE_SCALE_WORDS)
    is_wide = tl.max(tl.load(scales + K_TILES * TILE_SCALE_WORDS), 0) != 0
    return words, scales[:, None] + tl.arange(0, TILE_SCALE_WORDS)[None, :], is_wide


@triton.jit
def _multiply_fragments(
    acc, words, scales, x, in_rows, first, K: tl.constexpr, BN: tl.constexpr,
    STEPS: tl.constexpr, U: tl.constexpr, WGMMA: tl.constexpr, EXACT: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """Add the products of STEPS times U tiles of K to ``acc``, from tile ``first`` on.

    ``words`` [BN/16, 128], ``scales`` [BN/16, 8] and ``x`` [BM, 64] point to tile 0.
    """
    words += first * TILE_WORDS
    scales += first * TILE_SCALE_WORDS
    x += first * 64
    k = first * 64 + tl.arange(0, 64)[None, :]
    mask = in_rows[:, None]  # masked loads cost no bandwidth
    for _ in range(STEPS):
        for u in tl.static_range(U):
            tile_words = tl.load(words + u * TILE_WORDS)
            tile_scales = tl.load(scales + u * TILE_SCALE_WORDS)
            if K % 64 == 0:
                tile_x = tl.load(x + u * 64, mask=mask, other=0.0)
            else:
                tile_x = tl.load(x + u * 64, mask=mask & (k + u * 64 < K), other=0.0)
            weight = decode_fragments(tile_words, tile_scales, BN // 16, WGMMA, EXACT)
            acc = multiply(acc, weight, tile_x, TERMS)
        words += U * TILE_WORDS
        scales += U * TILE_SCALE_WORDS
        x += U * 64
        k += U * 64
    return acc


@triton.jit
def _multiply_rows(
    acc, codes, scales, x, in_rows, in_n, first, K: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STEPS: tl.constexpr, EXACT: tl.constexpr, TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Add the products of STEPS times BK columns to ``acc``, from column BK ``first`` on.

    The weights are in checkpoint order. ``codes`` [BN, 1], ``scales`` [BN, 1] and ``x`` [BM, 1]
    point to column 0 of their rows.
    """
    column = tl.arange(0, BK)[None, :]
    half = tl.arange(0, BK // 2)[None, :]
    group = tl.arange(0, BK // 32)[None, :]
    for step in range(first, first + STEPS):
        k = step * BK
        tile_codes = tl.load(codes + k // 2 + half, mask=in_n & (k // 2 + half < K // 2), other=0)
        tile_scales = tl.load(
            scales + k // 32 + group, mask=in_n & (k // 32 + group < K // 32), other=127
        )
        tile_x = tl.load(x + k + column, mask=in_rows[:, None] & (k + column < K), other=0.0)
        if EXACT:
            weight = decode_rows(tile_codes, tile_scales, BN, BK, OPERAND)
            acc = multiply(acc, weight, tile_x, TERMS)
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
    """Return whether a scale byte of these rows makes weights that are no normal bfloat16 numbers.

    ``tl.dot_scaled`` may decode such bytes wrongly, depending on version and target (triton#11624).
    """
    group = tl.arange(0, BK // 32)[None, :]
    found = tl.zeros((BN, BK // 32), tl.int32)
    for k in range(0, K // 32, BK // 32):
        byte = tl.load(scales + k + group, mask=in_n & (k + group < K // 32), other=127)
        found |= ((byte < 2) | (byte > 252)).to(tl.int32)
    return tl.max(tl.max(found, 1), 0) != 0


@triton.jit
def _exact_fragments(
    blocks, scales, bias, x, first_row, stop, first, split, scatter_index, gammas, y, rows,
    n_tile, alpha, limit, up_offset, N: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr,
    LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, TERMS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Compute a tile of fragments with any scale bytes, 32 rows of the weight at a time.

    Products of 32 rows do not use wgmma. With two loops of wgmma in one kernel, the compiler would
    wait for each instruction before the next.
    """
    PART: tl.constexpr = 32
    _row, in_rows = tile_rows(first_row, stop, BM)
    for part in range(n_tile * (BN // PART), (n_tile + 1) * (BN // PART)):
        words, w_scales, _is_wide = _fragments(blocks, scales, part, N, K, PART)
        acc = _multiply_fragments(
            tl.zeros((PART, BM), tl.float32), words, w_scales, x, in_rows, first, K, PART, STEPS,
            1, LAYOUT == "wgmma_fragments", True, TERMS,
        )  # fmt: skip
        finish(
            acc, bias, first_row, stop, split, scatter_index, gammas, y, rows, part, alpha, limit,
            up_offset, N, LAYOUT, ACTIVATION, BM, PART,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def matmul_ogs_kernel(
    x, blocks, scales, bias, expert_offsets, gather_index, scatter_index, gammas, y,
    x_stride, rows, experts, alpha, limit, up_offset,
    N: tl.constexpr, K: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr,
    TERMS: tl.constexpr, GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SPLITS: tl.constexpr, SCALED: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Compute one tile of ``act(x[gather_index] @ W^T + bias) * gammas``, for one expert.

    Without ``scatter_index`` y is [R, N'] and row r goes to row r. With it y is [SPLITS, R, N'] and
    row r goes to slot ``scatter_index[r]``. Each split sums its part of K, and ``combine_kernel``
    adds the splits. Grid: (tiles of all experts, SPLITS).

    NVIDIA's compiler keeps the main loop's wgmma instructions in flight and its counters in uniform
    registers only if the rest of the kernel permits it; ``tests/test_ahead_of_time.py`` checks
    that. So each rare branch ends with its own return, under a condition that the compiler knows to
    be the same in all threads, and the number of steps is a constant.

    Args:
        x: [*, K] with rows ``x_stride`` apart; bfloat16, float16 or float32.
        blocks, scales: uint32 words of E experts in fragments, or bytes in checkpoint order.
        bias: [E, N] or None.
        expert_offsets: [E + 1].
        gather_index, scatter_index, gammas: [R] or None.
        ACTIVATION: "none" or a key of ``operands.ACTIVATIONS``.
        TERMS: the number of terms of an activation: bfloat16 has 1, float16 2 and float32 3, and in
            products of float32 all have 1.
        GROUPS: a power of 2 above E.
        BK: columns of a step, 64 U for fragments.
        SPLITS: the number of parts of K; it divides the steps.
        SCALED: whether ``tl.dot_scaled`` multiplies weights in checkpoint order if it decodes their
            scales rightly.
        OPERAND: the dtype of the numbers that other products multiply in checkpoint order: bfloat16
            for matrix units, float32 without them.
    """
    IS_FRAGMENTS: tl.constexpr = LAYOUT != "row_major"
    IS_GATED: tl.constexpr = ACTIVATION == "swiglu" or ACTIVATION == "geglu_tanh"
    STEPS: tl.constexpr = (K + BK - 1) // BK // SPLITS
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    expert, start, stop, row_tile, n_tile = _find_tile(
        expert_offsets, rows, experts, n_tiles, BM, GROUPS
    )
    if expert > experts:
        return
    split = tl.program_id(1)
    first_row = start + row_tile * BM
    if uniform(expert == experts, IS_FRAGMENTS):
        COLUMNS: tl.constexpr = BN // 2 if IS_GATED else BN
        put(
            tl.zeros((COLUMNS, BM), tl.float32), first_row, stop, split, scatter_index, y, rows,
            n_tile, N // 2 if IS_GATED else N, BM, COLUMNS,
        )  # fmt: skip
        return
    expert = expert.to(tl.int64)
    if bias is not None:
        bias += expert * N
    row, in_rows = tile_rows(first_row, stop, BM)
    token = row if gather_index is None else tl.load(gather_index + row)
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    first = split * STEPS if SPLITS > 1 else 0

    acc = tl.zeros((BN, BM), tl.float32)
    if IS_FRAGMENTS:
        U: tl.constexpr = BK // 64
        TILES: tl.constexpr = (N + 15) // 16
        K_TILES: tl.constexpr = (K + 63) // 64
        blocks += expert * (TILES * K_TILES * TILE_WORDS)
        scales += expert * (TILES * (K_TILES + 1) * TILE_SCALE_WORDS)
        x_tile = x_rows + tl.arange(0, 64)[None, :]
        words, w_scales, is_wide = _fragments(blocks, scales, n_tile, N, K, BN)
        if uniform(is_wide, True):
            _exact_fragments(
                blocks, scales, bias, x_tile, first_row, stop, first * U, split, scatter_index,
                gammas, y, rows, n_tile, alpha, limit, up_offset, N, K, STEPS * U, LAYOUT,
                ACTIVATION, TERMS, BM, BN,
            )  # fmt: skip
            return
        acc = _multiply_fragments(
            acc, words, w_scales, x_tile, in_rows, first * U, K, BN, STEPS, U,
            LAYOUT == "wgmma_fragments", False, TERMS,
        )  # fmt: skip
    else:
        n = n_tile * BN + tl.arange(0, BN)
        in_n = (n < N)[:, None]
        w_row = expert * N + tl.minimum(n, N - 1)[:, None]
        codes = blocks + w_row * (K // 2)
        w_scales = scales + w_row * (K // 32)
        if not SCALED or _has_extreme_scale(w_scales, in_n, K, BN, BK):
            acc = _multiply_rows(
                acc, codes, w_scales, x_rows, in_rows, in_n, first, K, BN, BK, STEPS, True, TERMS,
                OPERAND,
            )  # fmt: skip
        else:
            acc = _multiply_rows(
                acc, codes, w_scales, x_rows, in_rows, in_n, first, K, BN, BK, STEPS, False, TERMS,
                OPERAND,
            )  # fmt: skip
    finish(
        acc, bias, first_row, stop, split, scatter_index, gammas, y, rows, n_tile, alpha, limit,
        up_offset, N, LAYOUT, ACTIVATION, BM, BN,
    )  # fmt: skip
