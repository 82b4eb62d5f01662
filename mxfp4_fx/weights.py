"""Swizzled expert weights at run time: one for each source parameter, for as long as that lives.

Dynamo lifts parameters to graph inputs and uses one compiled graph for many modules, so a weight is
looked up when the graph is called, by the identity of the parameter that it is called with. Nothing
here is baked into a graph or enters a cache key.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from mxfp4_fx.errors import WeightError
from mxfp4_fx.formats import BLOCK, quantize
from mxfp4_fx.layouts import LAYOUTS, Layout
from mxfp4_fx.ops import cpu

Parts = tuple[Tensor, Tensor]


@dataclasses.dataclass(slots=True)
class _Entry:
    """A swizzled weight and the state of the source that it was made from."""

    source: weakref.ref[Tensor]
    version: int | None
    pointer: int
    parts: Parts

    def is_current(self, source: Tensor) -> bool:
        return (
            self.source() is source
            and self.pointer == source.data_ptr()
            and self.version == _version(source)
        )


class WeightStore:
    """Source parameter -> swizzled weight. Safe to use from several threads, but for a weight that
    one of them changes while another computes with it.

    A change in place (``copy_``, ``load_state_dict``, an optimizer) raises the source's version and
    ``p.data = t`` moves its memory: both are noticed and the weight is swizzled again, into the
    same memory. Writes that leave no trace (``p.data.mul_()``, through numpy, or in place on a
    parameter made under ``inference_mode``) need :meth:`refresh`.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str], _Entry] = {}
        self._lock = threading.RLock()

    def get(self, source: Tensor, layout: str) -> Parts:
        """Blocks and scales of ``source`` [E, K, N] in ``layout``; swizzled now if need be."""
        entry = self._entries.get((id(source), layout))
        if entry is not None and entry.is_current(source):
            return entry.parts
        with self._lock:
            return self._swizzle(source, layout)

    def refresh(self, sources: Iterable[Tensor]) -> int:
        """Forget what was made from these tensors; returns how many swizzled weights that was.

        The next call of a compiled graph swizzles them again.
        """
        with self._lock:
            wanted = {id(source) for source in sources}
            # A copy: a tensor that is collected meanwhile takes its entry along.
            stale = [
                entry for entry in list(self._entries.values()) if id(entry.source()) in wanted
            ]
            for entry in stale:
                entry.pointer = -1
            return len(stale)

    def __len__(self) -> int:
        return len(self._entries)

    def _swizzle(self, source: Tensor, layout: str) -> Parts:
        key = (id(source), layout)
        entry = self._entries.get(key)
        if entry is not None and entry.is_current(source):
            return entry.parts  # another thread was faster
        # Read before the values: a write in between is then noticed at the next call.
        version, pointer = _version(source), source.data_ptr()
        old = entry.parts if entry is not None and entry.source() is source else None
        parts = swizzle_weight(source, layout, out=old)
        reference = weakref.ref(source, lambda dead: self._forget(key, dead))
        self._entries[key] = _Entry(reference, version, pointer, parts)
        return parts

    def _forget(self, key: tuple[int, str], dead: weakref.ref[Tensor]) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.source is dead:  # else the id serves another tensor
                del self._entries[key]


STORE = WeightStore()
if hasattr(os, "register_at_fork"):
    # A thread that held the lock is not there to release it.
    os.register_at_fork(after_in_child=lambda: setattr(STORE, "_lock", threading.RLock()))


def swizzle_weight(source: Tensor, layout: str, out: Parts | None = None) -> Parts:
    """Quantize and swizzle a weight, one expert at a time (natively: a few kilobytes at a time).

    Args:
        source: [E, K, N] float32, bfloat16 or float16, as transformers holds it.
        layout: a key of ``layouts.LAYOUTS``.
        out: an earlier result; its memory is used again if it fits. What autograd saved of it for
            a backward then counts as modified.

    Raises:
        WeightError: not three-dimensional, or K no multiple of 32.
    """
    if source.ndim != 3 or source.shape[1] % BLOCK:
        raise WeightError(
            f"expert weights must be [E, K, N] with K a multiple of {BLOCK}; "
            f"this one is {tuple(source.shape)}"
        )
    e, k, n = source.shape
    order = LAYOUTS[layout]
    is_native = layout == "cpu_panels" and source.device.type == "cpu"
    # Neither an inference tensor (it could not be saved for a backward) nor part of a graph.
    with torch.inference_mode(False), torch.no_grad():
        if out is None or not _fits(out, source, order):
            out = cpu.empty(order, e, n, k) if is_native else order.empty(e, n, k, source.device)
        if is_native:
            cpu.quantize(source.detach(), *out)
            torch.autograd.graph.increment_version(out)  # torch has not seen the write
            return out
        for expert in range(e):
            swizzled = order.swizzle(*quantize(source.detach()[expert].T))
            for room, part in zip(out, swizzled, strict=True):
                room[expert].copy_(part)
    return out


def refresh(model: torch.nn.Module) -> int:
    """Swizzle the expert weights of ``model`` again at its next call.

    Needed only after writes that torch cannot notice, such as ``p.data.mul_()`` or through numpy.

    Returns:
        How many swizzled weights are affected.
    """
    return STORE.refresh(model.parameters())


def _fits(parts: Parts, source: Tensor, order: Layout) -> bool:
    e, k, n = source.shape
    shapes = tuple((e, *shape) for shape in order.shapes(n, k))
    return parts[0].device == source.device and tuple(part.shape for part in parts) == shapes


def _version(source: Tensor) -> int | None:
    return None if source.is_inference() else source._version
