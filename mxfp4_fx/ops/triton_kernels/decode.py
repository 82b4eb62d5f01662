"""Decoding of MXFP4 weights into operands of matrix units, for each layout (``layouts.py``).

A *fragment* tile has 16 rows and 64 columns of K: 128 words of 32 bits with eight codes each. A
word decodes to four registers of a matrix instruction's operand, so threads exchange no data.
Shape letters: R tiles of 16 rows, BN = 16 R rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4_fx.ops.triton_kernels.arithmetic import INTERPRETED, UNIT

TILE_WORDS = tl.constexpr(128)  # words of codes in a fragment tile
TILE_SCALE_WORDS = tl.constexpr(8)  # words of its scales: for each g the bytes (kb, r)
# The bits of a code as a bfloat16, in both halves of a word: sign, two exponent bits, mantissa bit.
_PLACES = tl.constexpr(0x81C081C0)
_TWICE = tl.constexpr(0xC8643210)  # E2M1's magnitudes, times 2, from code 0 to code 7
_STORED_BIAS = tl.constexpr(126)  # a code in its place lacks a factor 2^126; its scale includes it


@triton.jit
def _in_place(words):
    """Split words [R, 128] into pairs [R, 128, 2, 2], pair j = 2 a + b with both codes in place."""
    first = words & _PLACES
    second = (words << 3) & _PLACES
    third = (words << 6) & _PLACES
    fourth = (words << 1) & 0x80008000
    fourth |= (words >> 3) & 0x01800180
    fourth |= (words >> 7) & 0x00400040
    return tl.join(tl.join(first, second), tl.join(third, fourth)).permute(0, 1, 3, 2)


@triton.jit
def _multiply_pairs(pairs, scales):
    """Multiply bfloat16 numbers, two in each word.

    sm_80 only has an fma for this; its addend -0 changes nothing.
    """
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
    """Return a code times 2^(scale - 127) in float32, exact for every scale byte; 255 gives NaN.

    The code is the lowest four bits; those above count for nothing. The scale is applied as two
    factors, so that neither factor nor the first product is subnormal.
    """
    # Twice the magnitude is an integer of 4 bits.
    twice = (_TWICE >> ((code << 2) & 28)) & 15
    twice = twice.to(tl.int32).to(tl.float32)
    twice = tl.where((code & 8) != 0, -twice, twice)
    scale = scale.to(tl.int32)
    half = scale >> 1
    low = ((half + 64) << 23).to(tl.float32, bitcast=True)
    high = ((scale - half + 62) << 23).to(tl.float32, bitcast=True)
    high = tl.where(scale == 255, float("nan"), high)
    return twice * low * high


@triton.jit
def _out_of_place(code):
    """Return the code of a number that has the code's bits in a bfloat16's place: 15 and 8:6."""
    return ((code >> 12) & 8) | ((code >> 6) & 7)


@triton.jit
def decode_fragments(words, scale_words, R: tl.constexpr, WGMMA: tl.constexpr, EXACT: tl.constexpr):
    """Decode fragment tiles, ``words`` [R, 128] and ``scale_words`` [R, 8], to weights [16 R, 64].

    The rows have a tile's order: row 8 r + g of a tile is row 2 g + r of the matrix. Without
    ``EXACT`` the scale bytes must be at most 128; see ``layouts.Fragments``.
    """
    pairs = _in_place(words).reshape(R, 8, 4, 2, 2, 2, 2)
    scales = (scale_words[:, :, None] >> (8 * tl.arange(0, 4)[None, None, :]).to(tl.uint32)) & 0xFF
    scales = scales.reshape((R, 8, 1, 2, 1, 1, 2) if WGMMA else (R, 8, 1, 2, 2, 1, 1))
    if EXACT:
        scales = (scales - _STORED_BIAS) & 0xFF
        even = _exact(_out_of_place(pairs), scales).to(UNIT)
        odd = _exact(_out_of_place(pairs >> 16), scales).to(UNIT)
    elif INTERPRETED:  # the same products in float32
        factors = (scales << 23).to(tl.float32, bitcast=True)
        even = (pairs << 16).to(tl.float32, bitcast=True) * factors
        odd = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True) * factors
    else:
        factors = tl.broadcast_to(scales * 0x00800080, (R, 8, 4, 2, 2, 2, 2))
        products = _multiply_pairs(pairs, factors)
        even = (products & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        odd = (products >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    both = tl.join(even, odd)
    # wgmma: R, g, t, kb, s, a, r, h -> rows (R, r, g), K (kb, s, a, t, h)
    # mma.sync: R, g, t, kb, r, d, c, h -> rows (R, r, g), K (kb, d, t, c, h)
    both = both.permute((0, 6, 1, 3, 4, 5, 2, 7) if WGMMA else (0, 4, 1, 3, 5, 2, 6, 7))
    return both.reshape(16 * R, 64)


@triton.jit
def decode_rows(codes, scales, BN: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr):
    """Decode ``codes`` [BN, BK/2] and ``scales`` [BN, BK/32] in checkpoint order to [BN, BK].

    ``OPERAND`` is the dtype of the result, bfloat16 or float32.
    """
    codes = codes.to(tl.uint32)
    nibbles = tl.join(codes, codes >> 4).reshape(BN, BK // 32, 32)
    return _exact(nibbles, scales[:, :, None]).reshape(BN, BK).to(OPERAND)
