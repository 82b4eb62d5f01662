"""Linears of few rows on the CPU, natively: ``cpu_kernels/linear.h`` reads a weight once, as it is.

The other linears are left to torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4_fx.core import hardware
from mxfp4_fx.ops import reference_around
from mxfp4_fx.ops.cpu_library import library
from mxfp4_fx.ops.cpu_structs import DTYPES, linear_group


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Compute ``ops.reference_around.linears``: natively up to ``hardware.linear_rows`` rows of x.

    Natively, sums are float32, and a row's results have the same bits beside any other rows and for
    any number of threads.

    Raises:
        ValueError: shapes do not fit.
    """
    results = _natively(x, weights, biases)
    return reference_around.linears(x, weights, biases) if results is None else results


def _natively(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor] | None:
    """Return the results, or None if torch is the faster or the kernel does not read such tensors.

    A call of few rows takes as long as reading 100 KB, so each line here counts.
    """
    dtype, shape = x.dtype, x.shape
    k = shape[-1] if shape else 0
    rows = x.numel() // k if k else 0
    if not 0 < rows <= hardware.linear_rows(dtype) or not x.is_cpu or len(weights) != len(biases):
        return None
    if len(shape) != 2:
        x = x.reshape(rows, k)
    x_stride, step = x.stride()
    if step != 1:
        x, x_stride = x.contiguous(), k
    results: list[Tensor] = []
    parts: list[int] = []
    for weight, bias in zip(weights, biases, strict=True):
        if weight.ndim != 2:
            return None
        n, columns = weight.shape
        stride, step = weight.stride()
        if columns != k or step != 1 or weight.dtype is not dtype or not weight.is_cpu:
            return None
        at = 0
        if bias is not None:
            if bias.shape != (n,) or bias.dtype is not dtype or not bias.is_cpu:
                return None
            if bias.stride() != (1,):
                return None
            at = bias.data_ptr()
        y = x.new_empty((*shape[:-1], n))
        results.append(y)
        parts += weight.data_ptr(), at, y.data_ptr(), n, stride
    count = len(weights)
    arguments = linear_group(count).pack(
        x.data_ptr(), rows, x_stride, k, count, DTYPES[dtype], torch.get_num_threads(), *parts
    )
    library().mxfp4_linears(arguments)
    return results
