"""MXFP4 numbers: what the bytes of a checkpoint mean, and how values become such bytes.

32 neighbours along K (a block) share one scale, an E8M0 byte `b` that stands for 2^(b - 127); byte 255 makes the
whole block NaN. An element is an E2M1 code of four bits (sign, two exponent bits, one mantissa bit). Two codes share a
byte, the even element in the low nibble.

    values  [..., K]            float32, bfloat16 or float16
    blocks  [..., K / 32, 16]   uint8, two E2M1 codes a byte
    scales  [..., K / 32]       uint8, E8M0

"MX" below is the OCP Microscaling Formats (MX) Specification, version 1.0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 32  # MX 5.2: elements that share a scale
BYTES_PER_BLOCK = BLOCK // 2

E8M0_BIAS = 127  # MX 5.4.1
E8M0_NAN = 255  # MX 5.4.1; there is no zero and no infinity

E2M1_MAX = 6.0  # MX 5.3.3; there is no NaN and no infinity
# MX 5.3.3, in code order: code = sign << 3 | exponent << 1 | mantissa, exponent bias 1, exponent 0 subnormal.
E2M1_VALUES: tuple[float, ...] = (
    *(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
)

# Values handled at a time. It bounds the temporaries (16 bytes a value, so 16 MiB), keeps them in a CPU's cache, and
# still gives every operation enough work to be worth its call.
SLAB_VALUES = 1 << 20

# A pair of values as one integer, so that a byte of codes is decoded by one lookup.
_PAIR_DTYPE = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}

# float32: the bits of infinity, of every magnitude, and the width of the fraction.
_INFINITY, _MAGNITUDE, _FRACTION_BITS = 0x7F800000, 0x7FFFFFFF, 23


def pack(codes: Tensor) -> Tensor:
    """Puts two E2M1 codes in a byte: uint8 [..., K] of codes 0 to 15 -> uint8 [..., K / 2], even element low.

    Raises TypeError for another dtype and ValueError for an odd K.
    """
    _require_uint8("codes", codes)
    if codes.dim() == 0 or codes.shape[-1] % 2:
        raise ValueError(f"codes of shape {_shape(codes)} do not pair up: pad the last dimension to an even length")
    return _pack_contiguous(codes.clone(memory_format=torch.contiguous_format))


def unpack(packed: Tensor) -> Tensor:
    """Takes the codes out of their bytes: uint8 [..., B] -> uint8 [..., 2 B]. The inverse of `pack`.

    Raises TypeError for another dtype.
    """
    _require_uint8("packed", packed)
    pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
    return (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds values to MXFP4: [..., K] -> blocks uint8 [..., K / 32, 16], scales uint8 [..., K / 32].

    The scale of a block is the smallest power of two, 2^-127 at least, that leaves no element above 6 in magnitude.
    MX 6.3 takes the power of two of the largest element over that of 6, which is one step smaller where the largest
    element is above 6 times it, and saturates those elements. Rounding the scale up instead is what "Recipes for
    Pre-training LLMs with MXFP8" (arXiv:2506.08027) proposes. Elements round to nearest, ties to even (MX 5.3.3);
    zeros keep their sign.

    Values that are MXFP4 already come back equal, though a block without a large element gets a smaller scale. What
    `dequantize` itself could not hold is lost: in float32 and bfloat16, magnitudes from 2^128 on (codes 4 and 6 of
    scale byte 253; 2, 3, 4 and 6 of byte 254) are infinities by then; float16 overflows in the same way from byte 141
    on and drops bits below byte 104.

    A block that holds a NaN or an infinity becomes NaN as a whole (scale 255, codes 0). A block of zeros has scale 127.
    The values are read slab by slab, in the order of memory, so a transposed view of a parameter is never copied.
    Subnormal float32 values count as zero while `torch.set_flush_denormal` is on; no other value depends on it.

    Raises TypeError unless values are float32, bfloat16 or float16, and ValueError unless K is a multiple of 32.
    """
    if values.dtype not in _PAIR_DTYPE:
        raise TypeError(f"quantize takes float32, bfloat16 or float16, not {values.dtype}: convert the values first")
    if values.dim() == 0 or values.shape[-1] % BLOCK:
        raise ValueError(
            f"values of shape {_shape(values)} do not divide into blocks of {BLOCK}: "
            f"K is the last dimension, transpose or zero-pad the values"
        )
    groups = values.detach().unflatten(-1, (values.shape[-1] // BLOCK, BLOCK))
    blocks = values.new_empty((*groups.shape[:-1], BYTES_PER_BLOCK), dtype=torch.uint8)
    scales = values.new_empty(groups.shape[:-1], dtype=torch.uint8)

    # Work along the dimension that neighbours in memory form. Where that is not K (a [K, N] parameter seen as [N, K]),
    # it becomes the last dimension and the blocks lie along the one before.
    inner = min(range(groups.dim()), key=lambda dim: (groups.stride(dim) or math.inf, -dim))
    block_dim = -1 if inner == groups.dim() - 1 else -2
    for slab in _slabs(groups):
        slab_blocks, slab_scales = _quantize_slab(groups[slab].movedim(inner, -1), block_dim)
        blocks[slab] = slab_blocks.movedim(-1, inner)
        scales[slab] = slab_scales.movedim(-1, inner).squeeze(-1)
    return blocks, scales


def dequantize(
    blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16, *, out: Tensor | None = None
) -> Tensor:
    """Turns MXFP4 into values: blocks uint8 [..., G, 16], scales uint8 [..., G] -> `dtype` [..., 32 G].

    Exact for all codes and all scale bytes in float32, subnormals included; magnitudes from 2^128 on are infinities.
    bfloat16 and float16 are the float32 value rounded to nearest, ties to even. Scale byte 255 gives NaN.

    `out`, of any strides and on any device, is filled slab by slab and returned. Without it the result is on the
    device of `blocks`. A slab that does not fit there (torch.OutOfMemoryError) is computed on the CPU; a result that
    does not fit is a CPU tensor.

    Raises TypeError for dtypes other than these (`dtype`: float32, bfloat16, float16) and for an `out` of another
    dtype, ValueError for shapes or devices that do not belong together.
    """
    if dtype not in _PAIR_DTYPE:
        raise TypeError(f"dequantize gives float32, bfloat16 or float16, not {dtype}: convert its result")
    _require_uint8("blocks", blocks)
    _require_uint8("scales", scales)
    if blocks.dim() < 2 or blocks.shape[-1] != BYTES_PER_BLOCK or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"blocks of shape {_shape(blocks)} and scales of shape {_shape(scales)} do not belong together: "
            f"expected blocks [..., K / {BLOCK}, {BYTES_PER_BLOCK}] and scales [..., K / {BLOCK}]"
        )
    if blocks.device != scales.device:
        raise ValueError(f"blocks are on {blocks.device} and scales on {scales.device}: move them to one device")
    shape = (*blocks.shape[:-2], blocks.shape[-2] * BLOCK)
    if out is not None and out.shape != shape:
        raise ValueError(f"out has shape {_shape(out)}, the values {list(shape)}: pass an out (or a view) of that shape")
    if out is not None and out.dtype != dtype:
        raise TypeError(f"out is {out.dtype} but the values are {dtype}: pass dtype={out.dtype}")

    try:
        pairs = _pair_table(dtype, blocks.device)
        result = blocks.new_empty(shape, dtype=dtype) if out is None else out
    except torch.OutOfMemoryError:
        pairs = _pair_table(dtype, torch.device("cpu"))
        result = torch.empty(shape, dtype=dtype, device="cpu") if out is None else out

    groups = result.detach().unflatten(-1, (blocks.shape[-2], BLOCK))
    for slab in _slabs(blocks):
        try:
            _dequantize_slab(blocks[slab], scales[slab], pairs, groups[slab])
        except torch.OutOfMemoryError:
            _dequantize_slab(blocks[slab].cpu(), scales[slab].cpu(), pairs, groups[slab])
    return result


def _slabs(groups: Tensor) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut [..., G, block] into slabs of at most SLAB_VALUES values, contiguous where `groups` is.

    The dimensions that vary fastest in memory stay whole for as long as they fit. A single block is never cut.
    """
    lengths = groups.shape[:-1]
    steps = [1] * len(lengths)
    values = BLOCK
    for dim in sorted(range(len(lengths)), key=groups.stride):
        steps[dim] = max(1, min(lengths[dim], SLAB_VALUES // values))
        values *= steps[dim]
    return itertools.product(
        *(
            [slice(start, start + step) for start in range(0, length, step)]
            for length, step in zip(lengths, steps, strict=True)
        )
    )


def _quantize_slab(values: Tensor, block_dim: int) -> tuple[Tensor, Tensor]:
    """Blocks of 32 values along `block_dim` -> bytes with 16 and scales with 1 in its place."""
    # Magnitudes order like their bits, and integers know no subnormals to flush and no NaN to lose.
    scaled = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    amax = scaled.view(torch.int32).bitwise_and(_MAGNITUDE).amax(block_dim, keepdim=True)

    # amax <= 6 * 2^e = 1.5 * 2^(e + 2): the exponent of amax less 2, and one more if its fraction is above a half.
    above_half = (1 << (_FRACTION_BITS - 1)) - 1
    exponent = amax.clamp(max=_INFINITY).add_(above_half).bitwise_right_shift_(_FRACTION_BITS)
    scales = exponent.sub_(2).clamp_(min=0)
    inverse = ((2 * E8M0_BIAS - scales) << _FRACTION_BITS).view(torch.float32)

    # float16 less its bias and its last 9 fraction bits is E2M1, subnormals included. Multiplying by 2^-14 (in a step
    # of its own: 2^-14 times `inverse` may be subnormal) lines the biases up, the conversion aligns the subnormals.
    scaled.mul_(inverse).mul_(2.0**-14)
    if values.dtype != torch.bfloat16:
        _round_to_odd(scaled)
    half = scaled.to(torch.float16).view(torch.int16)
    half.add_((half >> 9).bitwise_and_(1)).add_(0xFF)  # to nearest even, in bits 9 and up
    # Now sign, 0, 0, 0, exponent, mantissa. The exclusive or puts a copy of the sign next to the exponent.
    codes = half.bitwise_xor_(half >> 3).bitwise_right_shift_(9).bitwise_and_(0xF).to(torch.uint8)
    if block_dim == -1:
        packed = _pack_contiguous(codes)
    else:
        even, odd = codes.unflatten(-2, (BYTES_PER_BLOCK, 2)).unbind(-2)
        packed = (odd << 4).bitwise_or_(even)

    scales = torch.where(amax == 0, E8M0_BIAS, scales)
    scales = torch.where(amax >= _INFINITY, E8M0_NAN, scales)
    return packed.mul_(scales != E8M0_NAN), scales.to(torch.uint8)


def _round_to_odd(values: Tensor) -> None:
    """Cuts float32 to 8 significant bits in place; the last one is set if anything was cut off.

    So a later rounding to fewer bits sees on which side of a midpoint the value was, and is not a second rounding.
    """
    bits = values.view(torch.int32)
    sticky = (bits & 0xFFFF).add_(0xFFFF)
    bits.bitwise_or_(sticky).bitwise_and_(~0xFFFF)


def _pack_contiguous(codes: Tensor) -> Tensor:
    """Fresh, contiguous codes [..., K] -> bytes [..., K / 2]; whole 16-bit words are faster than every second byte."""
    words = codes.view(torch.int16)
    return (words >> 4).bitwise_or_(words).to(torch.uint8)


def _pair_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of every byte under every scale: entry [256 * scale + byte], both values as one integer."""
    byte = torch.arange(256, dtype=torch.int32, device=device)
    codes = torch.stack([byte & 0xF, byte >> 4], dim=-1)
    pairs = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)[codes]
    # 2^(byte - 127) in two factors that are never subnormal: a flushed 2^-127 would take normal products along.
    first = byte >> 1
    second = byte - first
    pairs = pairs * ((first + 64) << _FRACTION_BITS).view(torch.float32)[:, None, None]
    pairs = pairs * ((second + 63) << _FRACTION_BITS).view(torch.float32)[:, None, None]
    pairs[E8M0_NAN] = math.nan
    return pairs.to(dtype).view(_PAIR_DTYPE[dtype]).flatten()


def _dequantize_slab(blocks: Tensor, scales: Tensor, pairs: Tensor, out: Tensor) -> None:
    """Looks blocks [..., G, 16] up in the pair table, into out [..., G, 32]."""
    index = blocks.to(torch.int64, memory_format=torch.contiguous_format)
    index.add_(scales.to(torch.int64).mul_(256).unsqueeze(-1))
    # gather, of all PyTorch lookups, is the fast one that uses every thread; it wants rows.
    rows = index.flatten(0, -3) if index.dim() > 2 else index
    rows = rows.flatten(1)
    table = pairs.to(index.device).expand(rows.shape[0], -1)
    if out.is_contiguous() and out.storage_offset() % 2 == 0 and out.device == index.device:
        torch.gather(table, 1, rows, out=out.view(pairs.dtype).view(rows.shape))
    else:
        out.copy_(torch.gather(table, 1, rows).view(out.dtype).view(out.shape))


def _require_uint8(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8 bytes, not {tensor.dtype}: use .view(torch.uint8) on packed data")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
