"""Swizzling of sources into blocks and scales in a kernel's layout, and unswizzling."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from mxfp4_fx.core.layouts import CHECKPOINT_ORDER, MXFP8_ROWS, STORED_LAYOUTS
from mxfp4_fx.weights.source import Encoding, Parts, Source

# (layout, device type) -> task -> "module:function", imported on first use. The tasks:
#     an encoding's name: fill parts from a source's tensors, as `Encoding.arranged` has them
#     unswizzle: bring parts into checkpoint order
#     empty: allocate parts
# For a task without an entry, the layout's own methods work in torch, one expert at a time.
NATIVE: dict[tuple[str, str], dict[str, str]] = {
    ("cpu_panels", "cpu"): {
        "floats": "mxfp4_fx.ops.cpu_panels:quantize",
        "floats of pairs": "mxfp4_fx.ops.cpu_panels:quantize",
        "mxfp4": "mxfp4_fx.ops.cpu_panels:swizzle",
        "mxfp4 of pairs": "mxfp4_fx.ops.cpu_panels:swizzle",
        "unswizzle": "mxfp4_fx.ops.cpu_panels:unswizzle",
        "empty": "mxfp4_fx.ops.cpu_panels:empty",
    },
    (MXFP8_ROWS, "cpu"): {"linear": "mxfp4_fx.ops.cpu_mxfp8:quantize"},
}


def swizzle_weight(source: Source, layout: str, out: Parts | None = None) -> Parts:
    """Swizzle a source; a source of floats is quantized.

    The temporary memory is one expert's, or some kilobytes with a native function.

    Args:
        source: the tensors of the model.
        layout: a key of ``layouts.STORED_LAYOUTS``. If the source has this layout already, the
            result is its own memory and nothing is copied.
        out: an earlier result, whose memory is used again if it fits. If autograd saved it for a
            backward, that backward then raises: the saved tensor counts as modified.

    Returns:
        Blocks and scales of ``STORED_LAYOUTS[layout].shapes`` behind an axis of E.

    Raises:
        TypeError: the floats are not float32, bfloat16 or float16.
        WeightError: the shapes do not fit the encoding, or K is not a multiple of 32.
    """
    encoding = source.encoding
    e, n, k = encoding.sizes(source.tensors)
    # The result must be neither an inference tensor, which autograd cannot save, nor in a graph.
    with torch.inference_mode(False), torch.no_grad():
        tensors = tuple(tensor.detach() for tensor in source.tensors)
        if layout in encoding.layouts:
            return encoding.view(tensors, layout)
        device = tensors[0].device
        if out is None or not _fits(out, device, layout, e, n, k):
            out = _empty(layout, e, n, k, device)
        fill = _native(layout, device.type, encoding.name)
        if fill is not None:
            fill(*encoding.arranged(tensors), *out)
            torch.autograd.graph.increment_version(out)  # torch does not notice a native write
            return out
        for expert in range(e):
            parts = STORED_LAYOUTS[layout].swizzle(*encoding.to_mxfp4(tensors, expert))
            for room, part in zip(out, parts, strict=True):
                room[expert].copy_(part)
    return out


def is_native(encoding: Encoding, layout: str, device: str) -> bool:
    """Return whether a native function swizzles such weights, without Python's lock."""
    return layout not in encoding.layouts and encoding.name in NATIVE.get((layout, device), {})


def unswizzle_weight(parts: Parts, layout: str, e: int, n: int, k: int) -> Parts:
    """Unswizzle parts into new blocks [E, N, K/32, 16] and scales [E, N, K/32].

    The result is in checkpoint order. MXFP8 has one order, so it is returned as it is.
    """
    if layout == MXFP8_ROWS:
        return parts
    device = parts[0].device
    out = _empty(CHECKPOINT_ORDER, e, n, k, device)
    back = _native(layout, device.type, "unswizzle")
    if back is not None:
        back(*parts, *out)
        return out
    for expert in range(e):
        order = STORED_LAYOUTS[layout].unswizzle(parts[0][expert], parts[1][expert], n, k)
        for room, part in zip(out, order, strict=True):
            room[expert].copy_(part)
    return out


def nan_experts(source: Source, parts: Parts, layout: str) -> list[int]:
    """Return the experts with infinite or NaN elements; MXFP4 makes their whole block of 32 NaN.

    Args:
        source: the weight.
        parts: the weight swizzled to ``layout``.
        layout: a key of ``layouts.STORED_LAYOUTS``.
    """
    extremes = STORED_LAYOUTS[layout].extremes(parts[1])
    if extremes is not None and not extremes.any():
        return []
    with torch.inference_mode(False), torch.no_grad():
        return source.encoding.not_finite(source.tensors)


def _empty(layout: str, e: int, n: int, k: int, device: torch.device) -> Parts:
    room = _native(layout, device.type, "empty")
    if room is None:
        return STORED_LAYOUTS[layout].empty(e, n, k, device)
    parts: Parts = room(e, n, k)
    return parts


@functools.cache
def _native(layout: str, device: str, what: str) -> Callable[..., Any] | None:
    place = NATIVE.get((layout, device), {}).get(what)
    if place is None:
        return None
    module, name = place.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _fits(parts: Parts, device: torch.device, layout: str, e: int, n: int, k: int) -> bool:
    shapes = tuple((e, *shape) for shape in STORED_LAYOUTS[layout].shapes(n, k))
    return parts[0].device == device and tuple(part.shape for part in parts) == shapes
