"""Swizzling into the layout ``cpu_panels`` and back, by the native CPU library."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.core.layouts import LAYOUTS
from mxfp4_fx.ops.cpu_library import check, pointer, weights_library
from mxfp4_fx.ops.cpu_structs import DTYPES


def quantize(source: Tensor, blocks: Tensor, scales: Tensor) -> None:
    """Round a weight to MXFP4 and swizzle it into ``blocks`` and ``scales``, in one pass.

    The bytes are the same as those of ``formats.quantize`` and ``CpuPanels.swizzle``. It needs no
    memory besides the result.

    Args:
        source: [E, N, K], or pairs of rows [E, N/2, 2, K]; float32, bfloat16 or float16, with any
            strides.
        blocks, scales: the tensors to fill, of ``CpuPanels.shapes`` behind an axis of E.

    Raises:
        TypeError: ``source`` has another dtype.
    """
    if source.dtype not in DTYPES:
        raise TypeError(f"a weight must be float32, bfloat16 or float16, not {source.dtype}")
    source = source.resolve_neg()  # the memory of a lazily negated tensor has the other signs
    e, *rows, k = source.shape
    stride_e, *stride_n, stride_k = source.stride()
    pair, odd = stride_n if len(rows) == 2 else (2 * stride_n[0], stride_n[0])
    check(
        weights_library().mxfp4_quantize(
            pointer(source),
            DTYPES[source.dtype],
            *map(ctypes.c_int64, (e, math.prod(rows), k, stride_e, pair, odd, stride_k)),
            pointer(blocks),
            pointer(scales),
            torch.get_num_threads(),
        ),
        "quantize",
    )


def swizzle(blocks: Tensor, scales: Tensor, panels: Tensor, flags: Tensor) -> None:
    """Swizzle blocks [E, N, K/32, 16] and scales [E, N, K/32] of a checkpoint into panels.

    Or pairs of rows, [E, N/2, 2, ...], with all gates before all ups in memory.
    """
    e, *rows, groups = scales.shape
    is_concatenated = len(rows) == 2
    if is_concatenated:
        blocks, scales = blocks.transpose(1, 2), scales.transpose(1, 2)
    blocks, scales = (part.resolve_neg().contiguous() for part in (blocks, scales))
    n = math.prod(rows)
    pair, odd = (1, n // 2) if is_concatenated else (2, 1)
    check(
        weights_library().mxfp4_swizzle(
            pointer(blocks),
            pointer(scales),
            *map(ctypes.c_int64, (e, n, groups * BLOCK, pair, odd)),
            pointer(panels),
            pointer(flags),
            torch.get_num_threads(),
        ),
        "swizzle",
    )


def unswizzle(panels: Tensor, flags: Tensor, blocks: Tensor, scales: Tensor) -> None:
    """Invert :func:`swizzle`, into contiguous ``blocks`` and ``scales``."""
    e, n, groups = scales.shape
    check(
        weights_library().mxfp4_unswizzle(
            pointer(panels),
            *map(ctypes.c_int64, (e, n, groups * BLOCK)),
            pointer(blocks),
            pointer(scales),
            torch.get_num_threads(),
        ),
        "unswizzle",
    )


def empty(e: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Return ``CpuPanels.empty``, on huge pages where the system has them."""
    blocks, scales = LAYOUTS["cpu_panels"].empty(e, n, k, torch.device("cpu"))
    weights_library().mxfp4_huge_pages(pointer(blocks), ctypes.c_int64(blocks.numel()))
    return blocks, scales
