"""Weights as a model holds them -> blocks and scales in a kernel's layout, and back.

A source is one tensor [E, K, N] of floats, or packed: blocks [E, N, K/32, 16] with scales
[E, N, K/32], both uint8, in the order of a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4_fx.core.errors import WeightError
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, dequantize, quantize
from mxfp4_fx.core.layouts import LAYOUTS, Layout
from mxfp4_fx.ops import cpu
from mxfp4_fx.weights.source import Parts

CHECKPOINT_ORDER = "row_major"


def swizzle_weight(
    weight: Tensor, layout: str, out: Parts | None = None, scales: Tensor | None = None
) -> Parts:
    """Swizzle a weight, quantizing one of floats: an expert at a time (natively: some kilobytes).

    Args:
        weight: [E, K, N] float32, bfloat16 or float16, as transformers holds it; or blocks.
        layout: a key of ``layouts.LAYOUTS``.
        out: an earlier result; its memory is used again if it fits. What autograd saved of it for
            a backward then counts as modified.
        scales: of a packed weight. In checkpoint order it is its own result: nothing is copied.

    Raises:
        WeightError: not of these shapes, or K no multiple of 32.
    """
    _check_shapes(weight, scales)
    e, n, k = sizes_of(weight, scales is not None)
    order = LAYOUTS[layout]
    # Neither an inference tensor (it could not be saved for a backward) nor part of a graph.
    with torch.inference_mode(False), torch.no_grad():
        weight = weight.detach()
        if scales is not None and layout == CHECKPOINT_ORDER:
            return weight, scales.detach()
        is_native = _is_native(layout, weight.device)
        if out is None or not _fits(out, weight.device, order, e, n, k):
            out = cpu.empty(order, e, n, k) if is_native else order.empty(e, n, k, weight.device)
        if is_native:
            if scales is None:
                cpu.quantize(weight, *out)
            else:
                cpu.swizzle(weight, scales, *out)
            torch.autograd.graph.increment_version(out)  # torch has not seen the write
            return out
        for expert in range(e):
            packed = (
                quantize(weight[expert].T) if scales is None else (weight[expert], scales[expert])
            )
            for room, part in zip(out, order.swizzle(*packed), strict=True):
                room[expert].copy_(part)
    return out


def unswizzle_weight(parts: Parts, layout: str, e: int, n: int, k: int) -> Parts:
    """The inverse: blocks [E, N, K/32, 16] and scales [E, N, K/32] in checkpoint order, new."""
    device = parts[0].device
    out = LAYOUTS[CHECKPOINT_ORDER].empty(e, n, k, device)
    if _is_native(layout, device):
        cpu.unswizzle(*parts, *out)
        return out
    for expert in range(e):
        order = LAYOUTS[layout].unswizzle(parts[0][expert], parts[1][expert], n, k)
        for room, part in zip(out, order, strict=True):
            room[expert].copy_(part)
    return out


def dequantized_like(blocks: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    """[E, K, N] of the dtype, device and strides of ``like``; one expert at a time."""
    weight = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    for expert in range(weight.shape[0]):
        dequantize(blocks[expert], scales[expert], weight.dtype, out=weight[expert].T)
    return weight


def nan_experts(weight: Tensor, parts: Parts, layout: str) -> list[int]:
    """The experts of a weight [E, K, N] of floats that have infinite or NaN elements.

    MXFP4 has neither: a block of 32 that holds one becomes NaN, all of it.

    Args:
        weight: the weight.
        parts: what it was swizzled to, in ``layout``.
    """
    if layout == "cpu_panels" and not parts[1].any():  # no scale byte is extreme
        return []
    with torch.inference_mode(False), torch.no_grad():
        ends = [torch.stack(torch.aminmax(expert)) for expert in weight.detach() if expert.numel()]
        if not ends:
            return []
        found: list[int] = (~torch.stack(ends).isfinite().all(dim=1)).nonzero().flatten().tolist()
        return found


def sizes_of(weight: Tensor, is_packed: bool) -> tuple[int, int, int]:
    """(E, N, K)"""
    if is_packed:
        e, n, groups = weight.shape[:3]
        return e, n, groups * BLOCK
    e, k, n = weight.shape
    return e, n, k


def _check_shapes(weight: Tensor, scales: Tensor | None) -> None:
    shape = tuple(weight.shape)
    if scales is None and (weight.ndim != 3 or shape[1] % BLOCK):
        raise WeightError(
            f"expert weights must be [E, K, N] with K a multiple of {BLOCK}; this one is {shape}"
        )
    if scales is not None and (weight.ndim != 4 or shape != (*scales.shape, BYTES_PER_BLOCK)):
        raise WeightError(
            f"packed expert weights must be blocks [E, N, K/{BLOCK}, {BYTES_PER_BLOCK}] and scales "
            f"[E, N, K/{BLOCK}]; these are {shape} and {tuple(scales.shape)}"
        )


def _is_native(layout: str, device: torch.device) -> bool:
    return layout == "cpu_panels" and device.type == "cpu"


def _fits(parts: Parts, device: torch.device, order: Layout, e: int, n: int, k: int) -> bool:
    shapes = tuple((e, *shape) for shape in order.shapes(n, k))
    return parts[0].device == device and tuple(part.shape for part in parts) == shapes
