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


@triton.jit
def mxfp8_columns(BK: tl.constexpr, UNITS: tl.constexpr):
    """Return the columns [BK] of K whose weights :func:`decode_mxfp8` puts in each place.

    Of 64 columns a thread t of four holds 16 neighbours: 16 t + 4 s + 2 a + h. A register of a
    matrix instruction's operand has two of them, h, and instructions take the registers in the
    order (s, a, t) with wgmma, (s, t, a) with mma.sync, whose order within 16 columns is free, too.
    """
    place = tl.arange(0, BK)
    if UNITS == "none":
        return place
    if UNITS == "wgmma":
        t, a = (place // 2) % 4, (place // 8) % 2
    else:
        t, a = (place // 4) % 4, (place // 2) % 2
    return place // 64 * 64 + 16 * t + 4 * (place // 16 % 4) + 2 * a + place % 2


@triton.jit
def _e4m3(code, factor):
    """Return E4M3 codes, the lowest byte of ``code``, times ``factor``, in float32."""
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 2.0**120 * factor


@triton.jit
def _decode_words(words, factors):
    """Decode words of four E4M3 codes to bfloat16 numbers times ``factors``, two in each word.

    ``factors`` has the same bfloat16 twice. A code's place is that of a bfloat16's lowest exponent
    bits and highest mantissa bits, where it lacks a factor 2^120. As in :func:`_multiply_pairs` the
    addend -0 changes nothing.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 zero, bias, sign, low, high;
        mov.b32 zero, 0x80008000;
        mov.b32 bias, 0x7B807B80;
        prmt.b32 low, $2, 0, 0x1404;
        and.b32 sign, low, 0x80008000;
        shr.u32 low, low, 4;
        lop3.b32 low, low, 0x07F007F0, sign, 0xEA;
        fma.rn.bf16x2 low, low, bias, zero;
        fma.rn.bf16x2 $0, low, $3, zero;
        prmt.b32 high, $2, 0, 0x3424;
        and.b32 sign, high, 0x80008000;
        shr.u32 high, high, 4;
        lop3.b32 high, high, 0x07F007F0, sign, 0xEA;
        fma.rn.bf16x2 high, high, bias, zero;
        fma.rn.bf16x2 $1, high, $3, zero;
        }""",
        "=r,=r,r,r",
        [words, factors],
        dtype=(tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _halves(pairs):
    """Split words into their lower and upper 16 bits."""
    return (pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16)


@triton.jit
def decode_mxfp8(
    words, scales, BN: tl.constexpr, BK: tl.constexpr, UNITS: tl.constexpr, PACKED: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Decode ``words`` [BN, BK/4] of four E4M3 codes to weights [BN, BK].

    Every scale byte is decoded rightly: 0 is 2^-127, and 255 NaN. No code may be NaN, 0x7f or 0xff:
    ``mxfp8.quantize`` makes none.

    Args:
        words: uint32.
        scales: bytes [BN, BK/16], each of 16 columns.
        UNITS: the matrix units whose order the columns get, see :func:`mxfp8_columns`: "wgmma" or
            "mma"; or "none" for K's own.
        PACKED: whether to multiply pairs of bfloat16, in assembly for NVIDIA's GPUs.
        OPERAND: the dtype of the result; bfloat16 if PACKED.
    """
    KT: tl.constexpr = BK // 64
    words = words.reshape(BN, KT, 4, 4)
    scales = scales.to(tl.uint32).reshape(BN, KT, 4, 1)
    if PACKED:
        factors = tl.where(scales == 0, 0x00400040, scales * 0x00800080)
        factors = tl.where(scales == 255, 0x7FC07FC0, factors).to(tl.uint32)
        first, second = _decode_words(words, tl.broadcast_to(factors, (BN, KT, 4, 4)))
        low, high = _halves(tl.join(first, second))
    else:
        factors = tl.where(scales == 0, 0x00400000, scales << 23)
        factors = tl.where(scales == 255, 0x7FC00000, factors).to(tl.float32, bitcast=True)
        low = tl.join(_e4m3(words, factors), _e4m3(words >> 16, factors)).to(OPERAND)
        high = tl.join(_e4m3(words >> 8, factors), _e4m3(words >> 24, factors)).to(OPERAND)
    both = tl.join(low, high).reshape(BN, KT, 4, 4, 2, 2)  # kt, t, s, a, h
    if UNITS == "wgmma":
        both = both.permute(0, 1, 3, 4, 2, 5)
    elif UNITS == "mma":
        both = both.permute(0, 1, 3, 2, 4, 5)
    both = both.reshape(BN, BK)
    # Not before: for sm_100 Triton 3.6 cannot compile a reshape that only a product reads.
    return both.to(tl.bfloat16, bitcast=True) if PACKED else both
