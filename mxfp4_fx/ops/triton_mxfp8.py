"""Launches of the Triton kernels for linears with MXFP8 weights, and for the input's gradient.

As in ``triton.py`` every grid follows from shapes alone, so that CUDA graphs capture the ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mxfp4_fx.core import hardware
from mxfp4_fx.ops import operands_around, reference_around, tiles
from mxfp4_fx.ops.triton_kernels.arithmetic import UNIT
from mxfp4_fx.ops.triton_kernels.linears import (
    linears_mxfp8_backward_kernel,
    linears_mxfp8_kernel,
    sum_splits_kernel,
)

TOGETHER = 3  # linears that one launch computes: q, k and v
# K is split while there are fewer programs: about four for each multiprocessor of a large GPU.
_PROGRAMS = 512
# From so many rows of a tile on, a launch of its own brings x into the order of the matrix units.
_ORDERED_ROWS = 64
_SUM_TILE = (4, 512)  # rows, columns
# Layout of a GPU's experts -> the matrix units that read a weight from registers.
_UNITS = {"wgmma_fragments": "wgmma", "mma_fragments": "mma"}
# Matrix units -> the axes (R, 64 columns, t, s, a, h) in the order of ``decode.mxfp8_columns``.
_ORDERS = {"wgmma": (0, 1, 3, 4, 2, 5), "mma": (0, 1, 3, 2, 4, 5)}


class _Linear(NamedTuple):
    """A linear's weight, its bias, and its columns: the result, or the gradient of it, [R, N]."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    columns: Tensor

    @property
    def n(self) -> int:
        return self.codes.shape[1]


def linears(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Compute ``ops.reference_around.linears_mxfp8``, for codes without NaN.

    A launch computes up to three linears, if all or none of them have a bias. A second one sums the
    parts of K, if few rows and columns would leave a GPU idle. Sums are float32, and weights that
    are no normal numbers of bfloat16 may lose digits.

    Raises:
        TypeError: x is not float32, bfloat16 or float16.
        ValueError: shapes do not fit.
    """
    operands_around.check_linears_mxfp8(x, codes, scales, biases)
    _require_dtype(x.dtype)
    if x.numel() == 0:
        return reference_around.linears_mxfp8(x, codes, scales, biases)
    rows = x.reshape(-1, x.shape[-1]).resolve_neg()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    results = [x.new_empty((*x.shape[:-1], code.shape[1])) for code in codes]
    each = [
        _Linear(code, scale, bias, y.view(rows.shape[0], code.shape[1]))
        for code, scale, bias, y in zip(codes, scales, biases, results, strict=True)
        if code.shape[1]
    ]
    for group in _groups(each):
        _launch(rows, group)
    return results


def backward(grads: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """Compute ``ops.backward.linears_mxfp8_backward``, with a launch for three linears.

    Raises:
        TypeError: the gradients are not float32, bfloat16 or float16.
    """
    dtype, device = grads[0].dtype, grads[0].device
    _require_dtype(dtype)
    k = codes[0].shape[2]
    shape = (*grads[0].shape[:-1], k)
    each = [
        _Linear(code, scale, None, grad.reshape(-1, code.shape[1]).resolve_neg().contiguous())
        for grad, code, scale in zip(grads, codes, scales, strict=True)
        if grad.numel()
    ]
    if not each or not k:
        return grads[0].new_zeros(shape)
    rows = each[0].columns.shape[0]
    gpu = hardware.gpu_name(device)
    terms = hardware.gpu_terms(gpu, dtype)
    tile = tiles.choose_mxfp8(gpu, rows, terms)
    grid = (-(-rows // tile.block_m) * -(-k // tile.block_n),)
    # Parts of a sum of several launches are rounded once, at the end.
    to = dtype if len(each) <= TOGETHER else torch.float32
    total: Tensor | None = None
    with hardware.on(device):
        for first in range(0, len(each), TOGETHER):
            group = each[first : first + TOGETHER]
            part = torch.empty((rows, k), dtype=to, device=device)
            linears_mxfp8_backward_kernel[grid](
                *_padded([one.columns for one in group]), *_weights(group), part, rows,
                *_widths(group), K=k, TERMS=terms, BM=tile.block_m, BK=tile.block_n,
                BN=_gradient_columns(gpu, tile), **_decoding(gpu),
                **tiles.compiler_options(tile, gpu, terms),
            )  # fmt: skip
            total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(dtype).view(shape)


def _require_dtype(dtype: torch.dtype) -> None:
    if dtype not in hardware.DTYPES:
        raise TypeError(
            "mxfp4::linears_mxfp8: kernels='triton' computes in float32, bfloat16 and float16, not "
            f"in {dtype}"
        )


def _groups(each: Sequence[_Linear]) -> Iterator[list[_Linear]]:
    """Divide linears into those of one launch: neighbours that all have a bias, or none has one."""
    group: list[_Linear] = []
    for one in each:
        if len(group) == TOGETHER or (group and (group[0].bias is None) != (one.bias is None)):
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _launch(x: Tensor, group: Sequence[_Linear]) -> None:
    """Fill the results of up to three linears of x [R, K]."""
    rows, k = x.shape
    gpu = hardware.gpu_name(x.device)
    units = _units(gpu)
    terms = hardware.gpu_terms(gpu, x.dtype)
    tile = tiles.choose_mxfp8(gpu, rows, terms)
    programs = -(-rows // tile.block_m) * sum(-(-one.n // tile.block_n) for one in group)
    splits = _splits(tile, programs, k)
    is_ordered = units in _ORDERS and tile.block_m >= _ORDERED_ROWS
    if is_ordered:
        x = _in_order(x, units)
    results = [one.columns for one in group]
    parts = results
    if splits > 1:
        parts = [x.new_empty((splits, *y.shape), dtype=torch.float32) for y in results]
    biases = [] if group[0].bias is None else [_given(one.bias) for one in group]
    with hardware.on(x.device):
        linears_mxfp8_kernel[programs, splits](
            x, *_weights(group), *_padded(biases), *_padded(parts), x.stride(0), rows,
            *_widths(group), K=k, TERMS=terms, BM=tile.block_m, BN=tile.block_n, BK=tile.block_k,
            SPLITS=splits, UNITS=units, IS_ORDERED=is_ordered, **_decoding(gpu),
            **tiles.compiler_options(tile, gpu, terms),
        )  # fmt: skip
        if splits > 1:
            bm, bn = _SUM_TILE
            sums = -(-rows // bm) * sum(-(-one.n // bn) for one in group)
            sum_splits_kernel[(sums,)](
                *_padded(parts), *_padded(results), rows, *_widths(group), SPLITS=splits, BM=bm,
                BN=bn, **tiles.OPTIONS,
            )  # fmt: skip


def _splits(tile: tiles.Tile, programs: int, k: int) -> int:
    """Return the number of parts of K: equal ones if K is whole steps, and never an empty one."""
    steps = -(-k // tile.block_k)
    most = max(1, min(tile.splits, _PROGRAMS // programs, steps))
    if k % tile.block_k == 0:
        return next(splits for splits in range(most, 0, -1) if steps % splits == 0)
    return -(-steps // -(-steps // most))


def _units(gpu: str) -> str:
    """Return the matrix units for whose order a GPU's kernels bring columns into, or "none"."""
    layout = hardware.gpu_layout(gpu)
    return _UNITS.get(layout.name, "none") if layout is not None else "none"


def _decoding(gpu: str) -> dict[str, Any]:
    """Return the kernels' constants that say how a GPU decodes weights."""
    floats = hardware.multiplies_float32(gpu)
    return {
        "PACKED": gpu.startswith("sm_") and not floats,
        "OPERAND": tl.float32 if floats else UNIT.value,
    }


def _gradient_columns(gpu: str, tile: tiles.Tile) -> int:
    """Return how many columns of a gradient a program multiplies at a time."""
    return 32 if hardware.multiplies_float32(gpu) else tile.block_k  # with more, registers spill


def _in_order(x: Tensor, units: str) -> Tensor:
    """Return x [R, K], padded to whole 64 columns, in the order of ``decode.mxfp8_columns``."""
    whole = torch.nn.functional.pad(x, (0, -x.shape[1] % 64))
    return whole.view(x.shape[0], -1, 4, 4, 2, 2).permute(_ORDERS[units]).reshape(whole.shape)


def _weights(group: Sequence[_Linear]) -> list[Tensor | None]:
    """Return the codes and the scales as kernels read them, which know no strides of weights."""
    words = [one.codes.contiguous().view(torch.uint32) for one in group]
    return [*_padded(words), *_padded([one.scales.contiguous() for one in group])]


def _widths(group: Sequence[_Linear]) -> list[int]:
    return [*(one.n for one in group), *(0 for _ in range(TOGETHER - len(group)))]


def _padded(given: Sequence[Tensor]) -> list[Tensor | None]:
    return [*given, *(None for _ in range(TOGETHER - len(given)))]


def _given(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias.contiguous()
