"""Linears with MXFP8 weights on the CPU, natively (``cpu_kernels/mxfp8.h``), and the conversions.

Few rows multiply codes that are decoded on the fly, more rows panels of a weight that are decoded
into the cache. Where torch multiplies faster, a slab of a weight is made values of x's dtype.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4_fx.core import hardware
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.ops import reference_around
from mxfp4_fx.ops.cpu_library import check, library, pointer, weights_library
from mxfp4_fx.ops.cpu_structs import DTYPES, mxfp8_group

# Values of a weight that are decoded at a time, for many rows: 16 MiB in 16 bits.
_SLAB_VALUES = 8 << 20


def linears(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Compute ``ops.reference_around.linears_mxfp8``.

    Up to ``hardware.mxfp8_rows`` rows sums are float32 and have the same bits for any number of
    threads. While the rows are few (``FEW_ROWS`` in ``cpu_kernels/mxfp8_linear.h``), a row's
    results have the same bits beside any other rows.

    Raises:
        ValueError: shapes do not fit.
    """
    if not _is_plain(x, codes, scales, biases):
        return reference_around.linears_mxfp8(x, codes, scales, biases)
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    results = [x.new_empty((*x.shape[:-1], part.shape[1])) for part in codes]
    if rows.shape[0] > hardware.mxfp8_rows(x.dtype):
        for y, code, scale, bias in zip(results, codes, scales, biases, strict=True):
            _many(rows, code[0], scale[0], bias, y.view(rows.shape[0], -1))
        return results
    parts: list[int] = []
    for y, code, scale, bias in zip(results, codes, scales, biases, strict=True):
        at = 0 if bias is None else bias.data_ptr()
        parts += code.data_ptr(), scale.data_ptr(), at, y.data_ptr(), code.shape[1]
    group = rows.data_ptr(), rows.shape[0], rows.stride(0), k, len(codes)
    arguments = mxfp8_group(len(codes)).pack(
        *group, DTYPES[x.dtype], torch.get_num_threads(), *parts
    )
    check(library().mxfp8_linears(arguments), "linears_mxfp8")
    return results


def quantize(source: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Round a weight [1, N, K] to MXFP8, into ``codes`` and ``scales``, as ``mxfp8.quantize`` does.

    Raises:
        TypeError: ``source`` is not float32, bfloat16 or float16.
    """
    if source.dtype not in DTYPES:
        raise TypeError(f"a weight must be float32, bfloat16 or float16, not {source.dtype}")
    weight = source.resolve_neg()[0]
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    weights_library().mxfp8_quantize(
        pointer(weight),
        DTYPES[weight.dtype],
        *map(ctypes.c_int64, (*weight.shape, weight.stride(0))),
        pointer(codes),
        pointer(scales),
        torch.get_num_threads(),
    )


def dequantize(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Fill contiguous ``out`` [N, K] with the values of contiguous bytes, and return it."""
    weights_library().mxfp8_dequantize(
        pointer(codes),
        pointer(scales),
        *map(ctypes.c_int64, codes.shape),
        DTYPES[out.dtype],
        pointer(out),
        torch.get_num_threads(),
    )
    return out


def _many(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fill y [R, N] for x [R, K], codes [N, K] and scales [N, K/32], slab by slab."""
    n, k = codes.shape
    step = max(1, _SLAB_VALUES // k)
    room = x.new_empty((min(step, n), k))
    for first in range(0, n, step):
        slab = slice(first, min(n, first + step))
        weight = dequantize(codes[slab], scales[slab], room[: slab.stop - first])
        part = None if bias is None else bias[slab]
        y[:, slab] = torch.nn.functional.linear(x, weight, part)


def _is_plain(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> bool:
    """Return whether the native kernel reads these tensors."""
    if not (len(codes) == len(scales) == len(biases)) or not x.ndim or not x.numel():
        return False
    if x.dtype not in DTYPES or x.is_neg() or not x.is_cpu:
        return False
    k = x.shape[-1]
    for code, scale, bias in zip(codes, scales, biases, strict=True):
        shape = code.shape
        if len(shape) != 3 or shape[0] != 1 or shape[2] != k or k % BLOCK:
            return False
        if scale.shape != (1, shape[1], k // BLOCK):
            return False
        for part in (code, scale):
            if part.dtype is not torch.uint8 or not part.is_contiguous() or not part.is_cpu:
                return False
        if bias is not None and (
            bias.shape != (shape[1],) or bias.dtype is not x.dtype or not bias.is_contiguous()
        ):
            return False
    return True
