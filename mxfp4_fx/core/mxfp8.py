"""MXFP8 numbers with E4M3 elements: conversion between values and their bytes.

A block is 32 neighbouring values along K, which share one E8M0 scale as in MXFP4 (``formats.py``).
Each element is an E4M3 byte: a sign bit, four exponent bits of bias 7, three mantissa bits. E4M3
has no infinity; its codes 0x7f and 0xff are NaN.

    values  [..., K]        float32, bfloat16 or float16
    codes   [..., K]        uint8, E4M3
    scales  [..., K / 32]   uint8, E8M0

"MX" below is the OCP Microscaling Formats (MX) Specification, version 1.0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mxfp4_fx.core.formats import BLOCK, E8M0_BIAS, E8M0_NAN, SLAB_VALUES

E4M3_MAX = 448.0  # MX 5.3.1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of a float32: the mask of all bits but the sign, the bits of infinity, the fraction's length.
_MAGNITUDE, _INFINITY, _FRACTION_BITS = 0x7FFFFFFF, 0x7F800000, 23
_MAX_EXPONENT, _MAX_FRACTION = 8, 0x600000  # 448 = 1.75 * 2^8


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round values to MXFP8: [..., K] -> codes uint8 [..., K], scales uint8 [..., K/32].

    A block's scale is the smallest power of two, at least 2^-127, under which no element exceeds
    448, so none saturates; ``formats.quantize`` says why not MX 6.3's, which is smaller. Elements
    round to nearest, ties to even (MX 5.3.1), and zeros keep their sign. What rounds to 2^128, from
    248 * 2^120 on, is infinite when it is a value again.

    A block with a NaN or an infinity becomes NaN as a whole (scale 255, codes 0), so no result has
    a NaN code. A block of zeros has scale 127.

    Temporaries are bounded: rows are read in slabs. Under ``torch.set_flush_denormal(True)``
    subnormal values count as zero.

    Raises:
        TypeError: the values are not float32, bfloat16 or float16.
        ValueError: K is no multiple of 32.
    """
    if values.dtype not in DTYPES:
        raise TypeError(
            f"quantize takes float32, bfloat16 or float16, not {values.dtype}: convert the values"
        )
    if values.dim() == 0 or values.shape[-1] % BLOCK:
        raise ValueError(
            f"values of shape {list(values.shape)} do not divide into blocks of {BLOCK} along the "
            "last dimension: pad K with zeros"
        )
    k = values.shape[-1]
    codes = values.new_empty(values.shape, dtype=torch.uint8)
    scales = values.new_empty((*values.shape[:-1], k // BLOCK), dtype=torch.uint8)
    rows, code_rows = values.detach().reshape(-1, k), codes.view(-1, k)
    scale_rows = scales.view(-1, k // BLOCK)
    step = max(1, SLAB_VALUES // max(1, k))
    for first in range(0, rows.shape[0], step):
        slab = slice(first, first + step)
        found, scale = _quantize_slab(rows[slab].unflatten(1, (-1, BLOCK)))
        code_rows[slab], scale_rows[slab] = found.flatten(1), scale
    return codes, scales


def dequantize(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """Convert MXFP8 to values: codes uint8 [..., K], scales uint8 [..., K/32] -> [..., K].

    float32 values are exact, subnormals too; values from 2^128 on are infinite, and NaN codes and
    scale 255 are NaN. bfloat16 and float16 values are the float32 values rounded to nearest. What
    :func:`quantize` makes of bfloat16 is exact in bfloat16, where it is normal.

    Args:
        codes, scales: the bytes.
        dtype: float32, bfloat16 or float16.
        out: filled slab by slab and returned, if given; of any strides.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not belong together.
    """
    if dtype not in DTYPES:
        raise TypeError(
            f"dequantize gives float32, bfloat16 or float16, not {dtype}: convert its result"
        )
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise TypeError(f"codes and scales must be uint8, not {codes.dtype} and {scales.dtype}")
    if codes.dim() == 0 or codes.shape != (*scales.shape[:-1], scales.shape[-1] * BLOCK):
        raise ValueError(
            f"codes {list(codes.shape)} and scales {list(scales.shape)} do not belong together: "
            f"pass codes [..., K] and scales [..., K / {BLOCK}]"
        )
    values = codes.new_empty(codes.shape, dtype=dtype) if out is None else out
    k = codes.shape[-1]
    step = max(1, SLAB_VALUES // max(1, k))
    to, code_rows = values.view(-1, k), codes.reshape(-1, k)
    scale_rows = scales.reshape(-1, k // BLOCK)
    for first in range(0, code_rows.shape[0], step):
        slab = slice(first, first + step)
        to[slab].copy_(_dequantize_slab(code_rows[slab], scale_rows[slab]))
    return values


def _quantize_slab(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize [rows, blocks, 32] to codes of that shape and scales [rows, blocks]."""
    scaled = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    # Magnitudes compare as their bits do, and the CPU cannot flush an integer's subnormals.
    amax = scaled.view(torch.int32).bitwise_and(_MAGNITUDE).amax(-1, keepdim=True)
    # The smallest e with amax <= 1.75 * 2^(e + 8): amax's exponent less 8, plus 1 if its fraction
    # is over 0.75.
    up = (1 << _FRACTION_BITS) - 1 - _MAX_FRACTION
    exponent = amax.clamp(max=_INFINITY).add_(up).bitwise_right_shift_(_FRACTION_BITS)
    scale = exponent.sub_(_MAX_EXPONENT).clamp_(min=0)
    scaled.mul_(((2 * E8M0_BIAS - scale) << _FRACTION_BITS).view(torch.float32))
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    scale = torch.where(amax == 0, E8M0_BIAS, scale)
    scale = torch.where(amax >= _INFINITY, E8M0_NAN, scale)
    return codes.mul_(scale != E8M0_NAN), scale.to(torch.uint8).squeeze(-1)


def _dequantize_slab(codes: Tensor, scales: Tensor) -> Tensor:
    """Convert [rows, K] and [rows, K/32] to float32."""
    values = codes.contiguous().view(torch.float8_e4m3fn).to(torch.float32)
    values = values.unflatten(1, (-1, BLOCK))
    byte = scales.to(torch.int32).unsqueeze(-1)
    # 2^(byte - 127) as two normal factors: 2^-127 may be flushed to zero.
    for exponent in (byte // 2 - 63, byte - byte // 2 - 64):
        values.mul_(((exponent + E8M0_BIAS) << _FRACTION_BITS).view(torch.float32))
    return values.masked_fill_(byte == E8M0_NAN, math.nan).flatten(1)
