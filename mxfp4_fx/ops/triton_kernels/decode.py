"""MXFP4 weights as the matrix units want them, from the bytes of each layout (``layouts.py``).

A *fragment* tile holds 16 rows and 64 of K: 128 words of 32 bits, eight codes each. Every word
stands for four registers of a matrix instruction's operand, so that decoding needs no exchange
between threads. Shape letters: R tiles of 16 rows, BN = 16 R rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4_fx.ops.triton_kernels.arithmetic import INTERPRETED, UNIT

TILE_WORDS = tl.constexpr(128)  # of codes in a fragment tile
TILE_SCALE_WORDS = tl.constexpr(8)  # of scales beside it: for each g the bytes (kb, r)
# A code in a bfloat16's place, once in each half of a word: sign, two exponent bits, mantissa bit.
_PLACES = tl.constexpr(0x81C081C0)
_STORED_BIAS = tl.constexpr(126)  # a code in its place lacks a factor 2^126, which the scale brings


@triton.jit
def _in_place(words):
    """[R, 128] words -> [R, 128, 2, 2]: the two codes of a pair (j = 2 a + b) in their places."""
    first = words & _PLACES
    second = (words << 3) & _PLACES
    third = (words << 6) & _PLACES
    fourth = (words << 1) & 0x80008000
    fourth |= (words >> 3) & 0x01800180
    fourth |= (words >> 7) & 0x00400040
    return tl.join(tl.join(first, second), tl.join(third, fourth)).permute(0, 1, 3, 2)


@triton.jit
def _multiply_pairs(pairs, scales):
    """bfloat16 products, two a word. The addend -0 changes nothing, and sm_80 only has fma."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
        "=r,r,r",
        [pairs, scales],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _exact(code, scale):
    """A code, its bits at 15 and 8:6, times 2^(scale - 127), for every scale byte; 255 is NaN.

    The factor is applied in two halves, for neither it nor a product may be subnormal on the way.
    """
    exponent_mantissa = ((code >> 6) & 7).to(tl.int32)
    shift = tl.maximum((exponent_mantissa >> 1) - 1, 0)
    twice = tl.where(
        exponent_mantissa < 2, exponent_mantissa, (2 | (exponent_mantissa & 1)) << shift
    )
    twice = tl.where((code & 0x8000) != 0, -twice.to(tl.float32), twice.to(tl.float32))
    scale = scale.to(tl.int32)
    half = scale >> 1
    low = ((half + 64) << 23).to(tl.float32, bitcast=True)
    high = ((scale - half + 62) << 23).to(tl.float32, bitcast=True)
    high = tl.where(scale == 255, float("nan"), high)
    return (twice * low * high).to(UNIT)


@triton.jit
def decode_fragments(words, scale_words, R: tl.constexpr, WGMMA: tl.constexpr, EXACT: tl.constexpr):
    """Weights [16 R, 64] of fragment tiles: ``words`` [R, 128], ``scale_words`` [R, 8].

    Rows come in the order of a tile: row 8 r + g of it is the matrix's row 2 g + r. Without
    ``EXACT`` the scale bytes must be at most 128; see ``layouts.Fragments``.
    """
    pairs = _in_place(words).reshape(R, 8, 4, 2, 2, 2, 2)
    scales = (scale_words[:, :, None] >> (8 * tl.arange(0, 4)[None, None, :]).to(tl.uint32)) & 0xFF
    scales = scales.reshape((R, 8, 1, 2, 1, 1, 2) if WGMMA else (R, 8, 1, 2, 2, 1, 1))
    if EXACT:
        scales = (scales - _STORED_BIAS) & 0xFF
        even = _exact(pairs & 0xFFFF, scales)
        odd = _exact(pairs >> 16, scales)
    elif INTERPRETED:  # the same products, of the same bits, in float32
        factors = (scales << 23).to(tl.float32, bitcast=True)
        even = (pairs << 16).to(tl.float32, bitcast=True) * factors
        odd = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True) * factors
    else:
        factors = tl.broadcast_to(scales * 0x00800080, (R, 8, 4, 2, 2, 2, 2))
        products = _multiply_pairs(pairs, factors)
        even = (products & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        odd = (products >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    both = tl.join(even, odd)
    # R, g, t, kb, s, a, r, h -> rows (R, r, g), K (kb, s, a, t, h); or, of mma.sync,
    # R, g, t, kb, r, d, c, h -> rows (R, r, g), K (kb, d, t, c, h)
    both = both.permute((0, 6, 1, 3, 4, 5, 2, 7) if WGMMA else (0, 4, 1, 3, 5, 2, 6, 7))
    return both.reshape(16 * R, 64)


@triton.jit
def decode_rows(codes, scales, BN: tl.constexpr, BK: tl.constexpr):
    """Weights [BN, BK] from checkpoint order: ``codes`` [BN, BK/2] and ``scales`` [BN, BK/32]."""
    nibbles = tl.join(codes & 15, codes >> 4).reshape(BN, BK // 32, 32).to(tl.uint32)
    places = ((nibbles & 8) << 12) | ((nibbles & 7) << 6)
    return _exact(places, scales[:, :, None]).reshape(BN, BK)
