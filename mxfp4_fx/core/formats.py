"""MXFP4 numbers: the bytes of a checkpoint, and conversion between values and these bytes.

A block is 32 neighbouring values along K. Its values share one scale, an E8M0 byte `b` that means
2^(b - 127); byte 255 makes the whole block NaN. Each element is an E2M1 code of four bits: a sign
bit, two exponent bits and a mantissa bit. Two codes share a byte. The even element is in the low
nibble.

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

BLOCK = 32  # elements that share a scale (MX 5.2)
BYTES_PER_BLOCK = BLOCK // 2

E8M0_BIAS = 127  # MX 5.4.1
E8M0_NAN = 255  # MX 5.4.1; E8M0 has no zero, no sign and no infinity

E2M1_MAX = 6.0  # MX 5.3.3; E2M1 has no NaN and no infinity
# MX 5.3.3: code = sign << 3 | exponent << 1 | mantissa, exponent bias 1, exponent 0 is subnormal.
E2M1_VALUES: tuple[float, ...] = (
    *(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, E2M1_MAX),
    *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -E2M1_MAX),
)

# How `quantize` chooses the scale of a block.
SCALE_RULES = ("max", "search")

# Values in a slab. Temporaries take at most 10 bytes a value (20 under "search"): at most 10 MiB
# (20 MiB), which a CPU's last-level cache holds. Smaller slabs would spend their time on the calls
# of PyTorch's operations.
SLAB_VALUES = 1 << 20

# The integer that holds two neighbouring values, so that one lookup decodes a byte of codes.
_PAIR_DTYPE = {torch.float32: torch.int64, torch.bfloat16: torch.int32, torch.float16: torch.int32}

# Of a float32: the mask of all bits but the sign, the bits of infinity, the fraction's length.
_MAGNITUDE, _INFINITY, _FRACTION_BITS = 0x7FFFFFFF, 0x7F800000, 23


def pack(codes: Tensor) -> Tensor:
    """Pack two E2M1 codes into a byte: uint8 [..., K] -> uint8 [..., K / 2], even element low.

    Codes are 0 to 15. Raises TypeError for another dtype and ValueError for an odd K.
    """
    _require_uint8("codes", codes)
    if codes.dim() == 0 or codes.shape[-1] % 2:
        raise ValueError(
            f"codes of shape {_shape(codes)} do not pair up: pad the last dimension to even length"
        )
    return _pack_owned(codes.clone(memory_format=torch.contiguous_format))


def unpack(packed: Tensor) -> Tensor:
    """Unpack the E2M1 codes of each byte: uint8 [..., B] -> uint8 [..., 2 B]. Inverts `pack`.

    Raises TypeError for another dtype and ValueError for a tensor without dimensions.
    """
    _require_uint8("packed", packed)
    if packed.dim() == 0:
        raise ValueError("packed has no dimension to unpack along: pass bytes of shape [..., B]")
    words = packed.to(torch.int16, memory_format=torch.contiguous_format)
    return (words << 4).bitwise_or_(words).bitwise_and_(0x0F0F).view(torch.uint8)


def quantize(values: Tensor, *, scale_rule: str = "max") -> tuple[Tensor, Tensor]:
    """Round values to MXFP4: [..., K] -> blocks uint8 [..., K/32, 16], scales uint8 [..., K/32].

    `scale_rule` chooses the scale of each block:

    - "max" takes the smallest power of two, at least 2^-127, under which no element exceeds 6.
      MX 6.3 rounds the scale down instead and saturates the elements that then exceed 6. Rounding
      up follows "Recipes for Pre-training LLMs with MXFP8" (arXiv:2506.08027).
    - "search" takes the scale byte with the least sum of squared errors over the 32 elements, so it
      is never worse than "max" or MX 6.3. The sums are compared exactly. On a tie it takes the byte
      of "max". `_half_scale_is_nearer` has the proof.

    Elements round to nearest, ties to even, and saturate at 6 (MX 5.3.3). Zeros keep their sign.

    A block with a NaN or an infinity becomes NaN as a whole (scale 255, codes 0). A block of zeros
    has scale 127.

    Values that MXFP4 represents exactly come back equal, although a block without large elements
    may get a smaller scale. The exceptions are those that `dequantize` cannot return in the dtype:
    in float32 and bfloat16 from 2^128 on (4 and 6 under scale byte 253, 2 to 6 under byte 254); in
    float16 from 2^16 on (byte 141 and above) and those that are no multiple of 2^-24 (below byte
    104).

    The function reads the values slab by slab in memory order. A view like `w.transpose(1, 2)` is
    therefore never copied as a whole and takes hardly longer than `w`. Under
    `torch.set_flush_denormal(True)` subnormal values count as zero; no other values change.

    Raises TypeError unless the values are float32, bfloat16 or float16, ValueError unless K is a
    multiple of 32 and `scale_rule` one of SCALE_RULES.
    """
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"unknown scale_rule {scale_rule!r}: pass {' or '.join(SCALE_RULES)}")
    if values.dtype not in _PAIR_DTYPE:
        raise TypeError(
            f"quantize takes float32, bfloat16 or float16, not {values.dtype}: convert the values"
        )
    if values.dim() == 0 or values.shape[-1] % BLOCK:
        raise ValueError(
            f"values of shape {_shape(values)} do not divide into blocks of {BLOCK} along the last "
            "dimension: transpose them so that K is last, or pad K with zeros"
        )
    groups = values.detach().view(*values.shape[:-1], values.shape[-1] // BLOCK, BLOCK)
    blocks = values.new_empty((*groups.shape[:-1], BYTES_PER_BLOCK), dtype=torch.uint8)
    scales = values.new_empty(groups.shape[:-1], dtype=torch.uint8)

    # A slab's last dimension must be the one of the smallest stride. If that is not K (a [K, N]
    # parameter seen as [N, K]), it moves to the end, and a block lies along the one before it.
    inner = min(reversed(range(groups.dim())), key=groups.stride)
    block_dim = -1 if inner == groups.dim() - 1 else -2
    for slab in _slabs(groups):
        ordered = groups[slab].movedim(inner, -1)
        slab_blocks, slab_scales = _quantize_slab(ordered, block_dim, scale_rule)
        blocks[slab] = slab_blocks.movedim(-1, inner)
        scales[slab] = slab_scales.movedim(-1, inner).squeeze(-1)
    return blocks, scales


def dequantize(
    blocks: Tensor,
    scales: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Convert MXFP4 to values: blocks uint8 [..., G, 16], scales uint8 [..., G] -> [..., 32 G].

    float32 values are exact for all codes and scale bytes: subnormals are kept, values from 2^128
    on are infinite, byte 255 is NaN. bfloat16 and float16 values are the float32 values rounded to
    nearest, ties to even.

    `out` may have any strides and be on any device. The function fills it slab by slab and returns
    it. Without `out` the values are on the device of `blocks`. On torch.OutOfMemoryError a slab is
    computed on the CPU; values that do not fit on the device as a whole are returned on the CPU.

    Raises TypeError for a dtype other than float32, bfloat16 and float16 or an `out` of another
    dtype, ValueError for shapes or devices that do not belong together.
    """
    if dtype not in _PAIR_DTYPE:
        raise TypeError(
            f"dequantize gives float32, bfloat16 or float16, not {dtype}: convert its result"
        )
    _require_uint8("blocks", blocks)
    _require_uint8("scales", scales)
    if blocks.shape != (*scales.shape, BYTES_PER_BLOCK) or scales.dim() == 0:
        raise ValueError(
            f"blocks {_shape(blocks)} and scales {_shape(scales)} do not belong together: pass "
            f"blocks [..., K / {BLOCK}, {BYTES_PER_BLOCK}] and scales [..., K / {BLOCK}]"
        )
    if blocks.device != scales.device:
        raise ValueError(
            f"blocks are on {blocks.device}, scales on {scales.device}: move them to one device"
        )
    shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK)
    if out is not None and out.shape != shape:
        raise ValueError(
            f"out has shape {_shape(out)} but the values {list(shape)}: pass a view of that shape"
        )
    if out is not None and out.dtype != dtype:
        raise TypeError(f"out is {out.dtype} but the values are {dtype}: pass dtype={out.dtype}")

    try:
        pairs = _pair_table(dtype, blocks)
        values = blocks.new_empty(shape, dtype=dtype) if out is None else out
    except torch.OutOfMemoryError:
        pairs = _make_pair_table(dtype, torch.device("cpu"))
        values = torch.empty(shape, dtype=dtype, device="cpu") if out is None else out

    groups = values.detach().view(*scales.shape, BLOCK)
    for slab in _slabs(blocks):
        try:
            _dequantize_slab(blocks[slab], scales[slab], pairs, groups[slab])
        except torch.OutOfMemoryError:
            _dequantize_slab(blocks[slab].cpu(), scales[slab].cpu(), pairs, groups[slab])
    return values


def count_nan(scales: Tensor) -> int:
    """Return how many blocks are NaN, of scales of any shape, uint8."""
    # Most often none is, which a maximum shows in a small part of the time of a count.
    if not scales.numel() or int(scales.max()) < E8M0_NAN:
        return 0
    return int(torch.count_nonzero(scales == E8M0_NAN))


def _slabs(groups: Tensor) -> Iterator[tuple[slice, ...]]:
    """Return indices that cut [..., G, _] into slabs of at most SLAB_VALUES values (or one block).

    Dimensions stay whole as long as they fit, the one of the smallest stride first.
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


def _quantize_slab(values: Tensor, block_dim: int, scale_rule: str) -> tuple[Tensor, Tensor]:
    """Quantize blocks of 32 values along `block_dim` to 16 bytes and a scale along it."""
    scaled = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    # Magnitudes compare as their bits do, and the CPU cannot flush an integer's subnormals.
    amax = scaled.view(torch.int32).bitwise_and(_MAGNITUDE).amax(block_dim, keepdim=True)

    # The smallest e with amax <= 6 * 2^e = 1.5 * 2^(e + 2) is the exponent of amax minus 2, plus 1
    # if its fraction is over a half.
    up_to_half = (1 << (_FRACTION_BITS - 1)) - 1
    exponent = amax.clamp(max=_INFINITY).add_(up_to_half).bitwise_right_shift_(_FRACTION_BITS)
    scale = exponent.sub_(2).clamp_(min=0)
    inverse = ((2 * E8M0_BIAS - scale) << _FRACTION_BITS).view(torch.float32)
    scaled.mul_(inverse)
    if scale_rule == "search":
        halved = _half_scale_is_nearer(scaled, block_dim).logical_and_(scale > 0)
        scale.sub_(halved.to(scale.dtype))
        scaled.mul_(halved + 1.0).clamp_(-E2M1_MAX, E2M1_MAX)

    # E2M1 differs from float16 in the exponent bias, 1 instead of 15, and in the fraction, 1 bit
    # instead of 10. So a float16 that is multiplied by 2^-14 and rounded has the code in bit 15 and
    # bits 11 to 9; E2M1's subnormal becomes one of float16. The two factors are not merged into
    # one: their product may be a subnormal float32.
    scaled.mul_(2.0**-14)
    if values.dtype != torch.bfloat16:  # bfloat16 values have 8 significant bits already
        _round_to_odd(scaled)
    half = scaled.to(torch.float16).view(torch.int16)
    half.add_((half >> 9).bitwise_and_(1)).add_(0xFF)  # rounds to nearest even at bit 9
    # Bits 14 to 12 are zero now, so the exclusive or copies the sign to bit 12.
    codes = half.bitwise_xor_(half >> 3).bitwise_right_shift_(9).bitwise_and_(0xF).to(torch.uint8)
    if block_dim == -1:
        packed = _pack_owned(codes)
    else:
        pairs = codes.view(*codes.shape[:-2], BYTES_PER_BLOCK, 2, codes.shape[-1])
        even, odd = pairs.unbind(-2)
        packed = (odd << 4).bitwise_or_(even)

    scale = torch.where(amax == 0, E8M0_BIAS, scale)
    scale = torch.where(amax >= _INFINITY, E8M0_NAN, scale)
    return packed.mul_(scale != E8M0_NAN), scale.to(torch.uint8)


def _half_scale_is_nearer(scaled: Tensor, block_dim: int) -> Tensor:
    """Return whether half the scale of "max" gives a block a smaller sum of squared errors.

    No third scale can have a smaller one than both. Let 1 be the scale of "max", a an element's
    magnitude and A the largest magnitude of the block, so 3 < A <= 6. E2M1 represents the
    magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6.

    - Twice the scale represents 0, 1, 2, 3, 4, 6, 8 and 12. The scale itself represents those up to
      6, too, and no element is nearer to 8 or 12 than to 6. So no doubling reduces any error.
    - Half the scale represents 0, 0.25, 0.5, 0.75, 1, 1.5, 2 and 3. An element below 1 gains at
      most 1/16, an element from 1 to 3 keeps its error, and an element above 3 becomes 3.
    - Every further halving loses. Let 1 be the scale that is halved, so A > 6. The error of A grows
      from A - 6 to A - 3, which costs 6 A - 27 > 9. The other 31 elements gain at most 31/16.

    (Under the scale 2^-127 A may be 3 or less, but that scale has no half.)

    The gain of the half scale: an element below 1 that is d off a multiple of 0.5 gains
    d^2 - (0.25 - d)^2 = (d - 0.125) / 2 if that is positive. The cost: an element from 3.5 to 5
    costs (a - 3)^2 - (4 - a)^2 = 2 a - 7. An element above 5 costs more, but 2 a - 7 > 3 already
    exceeds the sum of all gains. Every step below is exact in float32: a gain is a multiple of
    2^-27 up to 1/16, a cost is a multiple of 2^-20 up to 5. Their sum in float64 is exact in any
    order.

    Args:
        scaled: float32, divided by the scale of "max"; block_dim has length 32.

    Returns:
        bool; block_dim has length 1. False for a block with NaN or infinity.
    """
    magnitude = scaled.abs()
    cost = (magnitude - 3.5).clamp_(min=0).mul_(2)
    halves = magnitude.clamp_(max=1).mul_(2)
    gain = halves.sub_(halves.round()).abs_().sub_(0.25).clamp_(min=0).div_(4)
    return gain.sub_(cost).sum(block_dim, keepdim=True, dtype=torch.float64) > 0


def _round_to_odd(values: Tensor) -> None:
    """Cut float32 to 8 significant bits in place; set the last one if any bit cut off was set.

    A later rounding to fewer bits then still sees on which side of a midpoint the value was.
    """
    bits = values.view(torch.int32)
    lost = (bits & 0xFFFF).add_(0xFFFF)  # bit 16 is set unless all bits below it are zero
    bits.bitwise_or_(lost).bitwise_and_(~0xFFFF)


def _pack_owned(codes: Tensor) -> Tensor:
    """Do what `pack` does for a contiguous tensor that starts its storage.

    A view of 16-bit words serves such a tensor, several times as fast as slices of even and odd
    elements. The words are little-endian, as in `unpack`.
    """
    words = codes.view(torch.int16)
    return (words >> 4).bitwise_or_(words).to(torch.uint8)


_pair_tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _pair_table(dtype: torch.dtype, blocks: Tensor) -> Tensor:
    """Return the pair table on the device of `blocks` and cache it.

    Making the table takes as long as looking up a small panel. Fake tensors and other subclasses
    get a table of their own kind, which is not cached.
    """
    if type(blocks) not in (Tensor, torch.nn.Parameter):
        return _make_pair_table(dtype, blocks.device)
    key = dtype, blocks.device
    if key not in _pair_tables:
        _pair_tables[key] = _make_pair_table(dtype, blocks.device)
    return _pair_tables[key]


def _make_pair_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the table of a byte's two values, as one integer, at index 256 * scale + byte."""
    byte = torch.arange(256, dtype=torch.int32, device=device)
    codes = torch.stack([byte & 0xF, byte >> 4], dim=-1)
    pairs = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)[codes]
    # 2^(byte - 127) as two normal factors: 2^-127 may be flushed to zero, and so would be products
    # with it that are normal numbers.
    for exponent in (byte // 2 - 63, byte - byte // 2 - 64):
        factor = ((exponent + E8M0_BIAS) << _FRACTION_BITS).view(torch.float32)
        pairs = pairs * factor[:, None, None]
    pairs[E8M0_NAN] = math.nan
    return pairs.to(dtype).view(_PAIR_DTYPE[dtype]).flatten()


def _dequantize_slab(blocks: Tensor, scales: Tensor, pairs: Tensor, out: Tensor) -> None:
    """Look the bytes of blocks [..., G, 16] up in the pair table, into out [..., G, 32]."""
    index = blocks.to(torch.int32, memory_format=torch.contiguous_format)
    index.add_(scales.to(torch.int32).mul_(256).unsqueeze(-1))
    # Of PyTorch's lookups only gather is fast and uses all threads, each on whole rows.
    rows = index.to(torch.int64).view(-1, index.shape[-2] * BYTES_PER_BLOCK)
    table = pairs.to(index.device).expand(rows.shape[0], -1)
    if out.is_contiguous() and out.storage_offset() % 2 == 0 and out.device == index.device:
        torch.gather(table, 1, rows, out=out.view(pairs.dtype).view(rows.shape))
    else:
        out.copy_(torch.gather(table, 1, rows).view(out.dtype).view(out.shape))


def _require_uint8(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, not {tensor.dtype}: pass the packed bytes")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
