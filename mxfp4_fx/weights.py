"""Swizzled expert weights at run time: one for each source parameter, for as long as that lives.

Dynamo lifts parameters to graph inputs and uses one compiled graph for many modules, so a weight is
looked up when the graph is called, by the identity of the parameter that it is called with. Nothing
here is baked into a graph or enters a cache key.

A source is one tensor [E, K, N] of floats, or packed: blocks [E, N, K/32, 16] with scales
[E, N, K/32], both uint8, in the order of a checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mxfp4_fx import freed
from mxfp4_fx.errors import FreedWeightError, WeightError
from mxfp4_fx.formats import BLOCK, BYTES_PER_BLOCK, dequantize, quantize
from mxfp4_fx.layouts import LAYOUTS, Layout
from mxfp4_fx.ops import cpu

Parts = tuple[Tensor, Tensor]
_CHECKPOINT_ORDER = "row_major"


@dataclasses.dataclass(slots=True)
class _Source:
    """A tensor and the state that it was in."""

    tensor: weakref.ref[Tensor]
    version: int | None
    pointer: int

    def is_current(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.pointer == tensor.data_ptr()
            and self.version == _version(tensor)
        )


@dataclasses.dataclass(slots=True)
class _Entry:
    """A swizzled weight and what it was made from: a weight, or blocks and scales.

    Attributes:
        sizes: (E, N, K).
        keep: the user had its source restored: it is not freed again.
    """

    weight: _Source
    scales: _Source | None
    layout: str
    sizes: tuple[int, int, int]
    parts: Parts
    keep: bool = False

    def is_current(self, weight: Tensor, scales: Tensor | None) -> bool:
        if not self.weight.is_current(weight) or (scales is None) != (self.scales is None):
            return False
        return scales is None or self.scales is None or self.scales.is_current(scales)

    def sources(self) -> tuple[_Source, ...]:
        return (self.weight,) if self.scales is None else (self.weight, self.scales)


class WeightStore:
    """Source -> swizzled weight. Safe to use from several threads, but for a weight that one of
    them changes while another computes with it.

    A change in place (``copy_``, ``load_state_dict``, an optimizer) raises the source's version and
    ``p.data = t`` moves its memory: both are noticed and the weight is swizzled again, into the
    same memory. Writes that leave no trace (``p.data.mul_()``, through numpy, or in place on a
    parameter made under ``inference_mode``) need :meth:`refresh`.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str], _Entry] = {}
        # Of freed scales whose blocks are gone: another tensor may have the blocks' id by now.
        self._orphans: dict[int, _Entry] = {}
        self._lock = threading.RLock()

    def get(self, weight: Tensor, layout: str, scales: Tensor | None = None) -> Parts:
        """Blocks and scales in ``layout``; swizzled now if need be.

        Args:
            weight: [E, K, N], or the blocks of ``scales``.
            layout: a key of ``layouts.LAYOUTS``.
            scales: of a packed weight.
        """
        entry = self._entries.get((id(weight), layout))
        if entry is not None and entry.is_current(weight, scales):
            return entry.parts
        with self._lock:
            return self._swizzle(weight, layout, scales)

    def refresh(self, sources: Iterable[Tensor]) -> int:
        """Forget what was made from these tensors; returns how many swizzled weights that was.

        The next call of a compiled graph swizzles them again. Freed weights are left as they are:
        nothing could be written to them.
        """
        with self._lock:
            wanted = {id(source) for source in sources if not freed.is_freed(source)}
            stale = [e for e in self._all() if any(id(s.tensor()) in wanted for s in e.sources())]
            for entry in stale:
                entry.weight.pointer = -1
            return len(stale)

    def can_free(self, weight: Tensor, layout: str, scales: Tensor | None = None) -> bool:
        """Whether :meth:`free` would give memory back.

        Not where checkpoint order is the kernels' order, who read the source itself, nor what is no
        plain parameter, was restored by the user, or is freed already.
        """
        if scales is not None and layout == _CHECKPOINT_ORDER:
            return False
        entry = self._entries.get((id(weight), layout))
        if entry is not None and entry.keep:
            return False
        tensors = [weight] if scales is None else [weight, scales]
        return all(map(freed.can_free, tensors)) and not all(map(freed.is_freed, tensors))

    def free(self, weight: Tensor, layout: str, scales: Tensor | None = None) -> bool:
        """Swizzle a source and give its memory back; returns whether that was done."""
        with self._lock:
            self.get(weight, layout, scales)
            if not self.can_free(weight, layout, scales):
                return False
            if scales is not None:  # it would keep the very memory
                self._entries.pop((id(weight), _CHECKPOINT_ORDER), None)
            for tensor in (weight, scales):
                if not isinstance(tensor, nn.Parameter) or freed.is_freed(tensor):
                    continue
                self._drop_stale(tensor)
                if not freed.free(tensor):
                    return False
                self._is_right_for(tensor)
            return True

    def values(self, parameter: Tensor, device: torch.device | None = None) -> Tensor:
        """What a freed parameter held, in new memory; any other tensor as it is.

        The bytes of a packed weight are the ones it had; a weight of floats has the values that
        MXFP4 holds of it.

        Args:
            parameter: whose values are wanted.
            device: where to make them; the parameter's own if None.

        Raises:
            FreedWeightError: what it was swizzled to is gone.
        """
        if not freed.is_freed(parameter):
            return parameter
        with self._lock, torch.inference_mode(False), torch.no_grad():
            entry = self._entry_of(parameter)
            on = entry.parts[0].to(device), entry.parts[1].to(device)
            blocks, scales = unswizzle_weight(on, entry.layout, *entry.sizes)
            if entry.scales is None:
                return _dequantized(blocks, scales, parameter)
            return blocks if entry.weight.tensor() is parameter else scales

    def restore(self, parameter: Tensor) -> bool:
        """Give a freed parameter its memory and :meth:`values` again; whether it was freed."""
        with self._lock:
            if not isinstance(parameter, freed.FreedParameter):
                return False
            values = self.values(parameter)
            freed.restore(parameter, values)
            self._is_right_for(parameter, keep=True)
            return True

    def __len__(self) -> int:
        return len(self._entries)

    def _drop_stale(self, tensor: Tensor) -> None:
        """Of what was made from a source, only what has its present values may outlive them."""
        for key, entry in list(self._entries.items()):
            if any(s.tensor() is tensor and not s.is_current(tensor) for s in entry.sources()):
                del self._entries[key]

    def _is_right_for(self, tensor: Tensor, keep: bool = False) -> None:
        """The memory of a source was given back, or given again: what was made from it is right."""
        for entry in self._all():
            for source in entry.sources():
                if source.tensor() is tensor:
                    source.version, source.pointer = _version(tensor), tensor.data_ptr()
                    entry.keep = entry.keep or keep

    def _swizzle(self, weight: Tensor, layout: str, scales: Tensor | None) -> Parts:
        key = (id(weight), layout)
        entry = self._entries.get(key)
        if entry is not None and entry.is_current(weight, scales):
            return entry.parts  # another thread was faster
        # Read before the values: a write in between is then noticed at the next call.
        reference = weakref.ref(weight, lambda dead: self._forget(key, dead))
        state = _Source(reference, _version(weight), weight.data_ptr())
        scales_state = None
        if scales is not None:
            number = id(scales)
            scales_reference = weakref.ref(scales, lambda _: self._orphans.pop(number, None))
            scales_state = _Source(scales_reference, _version(scales), scales.data_ptr())
        old = entry.parts if entry is not None and entry.weight.tensor() is weight else None
        if freed.is_freed(weight) or (scales is not None and freed.is_freed(scales)):
            old = None  # its values may come from there
        keep = entry is not None and entry.weight.tensor() is weight and entry.keep
        sources = self._packed(weight, scales)
        parts = swizzle_weight(sources[0], layout, old, sources[1])
        if entry is not None:
            self._forget(key, entry.weight.tensor)
        sizes = _sizes(weight, scales is not None)
        self._entries[key] = _Entry(state, scales_state, layout, sizes, parts, keep)
        return parts

    def _packed(self, weight: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A source that can be read: freed ones are made again from what they were swizzled to."""
        if scales is not None:
            return self.values(weight), self.values(scales)
        if not freed.is_freed(weight):
            return weight, None
        entry = self._entry_of(weight)
        return unswizzle_weight(entry.parts, entry.layout, *entry.sizes)

    def _entry_of(self, parameter: Tensor) -> _Entry:
        for entry in self._all():
            if any(source.tensor() is parameter for source in entry.sources()):
                return entry
        raise FreedWeightError(
            f"the values of {parameter!r} are lost: it was freed, and the other half of the weight "
            "was replaced. Load the checkpoint again"
        )

    def _all(self) -> list[_Entry]:
        # A copy: a tensor that is collected meanwhile takes its entry along.
        return [*self._entries.values(), *self._orphans.values()]

    def _forget(self, key: tuple[int, str], dead: weakref.ref[Tensor]) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.weight.tensor is not dead:  # the id serves another tensor
                return
            del self._entries[key]
            scales = entry.scales.tensor() if entry.scales is not None else None
            if scales is not None and freed.is_freed(scales):
                self._orphans[id(scales)] = entry


STORE = WeightStore()
if hasattr(os, "register_at_fork"):
    # A thread that held the lock is not there to release it.
    os.register_at_fork(after_in_child=lambda: setattr(STORE, "_lock", threading.RLock()))


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
    e, n, k = _sizes(weight, scales is not None)
    order = LAYOUTS[layout]
    # Neither an inference tensor (it could not be saved for a backward) nor part of a graph.
    with torch.inference_mode(False), torch.no_grad():
        weight = weight.detach()
        if scales is not None and layout == _CHECKPOINT_ORDER:
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
    out = LAYOUTS[_CHECKPOINT_ORDER].empty(e, n, k, device)
    if _is_native(layout, device):
        cpu.unswizzle(*parts, *out)
        return out
    for expert in range(e):
        order = LAYOUTS[layout].unswizzle(parts[0][expert], parts[1][expert], n, k)
        for room, part in zip(out, order, strict=True):
            room[expert].copy_(part)
    return out


_KEPT = "_mxfp4_fx_kept_dense"


def keep_dense(weight: Tensor) -> None:
    """Have the backend leave the experts of this weight as they are."""
    setattr(weight, _KEPT, True)


def is_kept_dense(weight: object) -> bool:
    return getattr(weight, _KEPT, False)


def refresh(model: nn.Module) -> int:
    """Swizzle the expert weights of ``model`` again at its next call.

    Needed only after writes that torch cannot notice, such as ``p.data.mul_()`` or through numpy.

    Returns:
        How many swizzled weights are affected.
    """
    return STORE.refresh(model.parameters())


def restore(model: nn.Module) -> int:
    """Give the expert weights of ``model`` that ``free_weights`` freed their memory again.

    Packed weights (``mxfp4_fx.from_pretrained``) get back their bytes, weights of floats the values
    that MXFP4 holds of them. The compiled model does not free them again.

    Returns:
        How many parameters were freed.
    """
    return sum(STORE.restore(parameter) for parameter in model.parameters())


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


def _sizes(weight: Tensor, is_packed: bool) -> tuple[int, int, int]:
    """(E, N, K)"""
    if is_packed:
        e, n, groups = weight.shape[:3]
        return e, n, groups * BLOCK
    e, k, n = weight.shape
    return e, n, k


def _is_native(layout: str, device: torch.device) -> bool:
    return layout == "cpu_panels" and device.type == "cpu"


def _dequantized(blocks: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    """[E, K, N] of the dtype, device and strides of ``like``; one expert at a time."""
    weight = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    for expert in range(weight.shape[0]):
        dequantize(blocks[expert], scales[expert], weight.dtype, out=weight[expert].T)
    return weight


def _fits(parts: Parts, device: torch.device, order: Layout, e: int, n: int, k: int) -> bool:
    shapes = tuple((e, *shape) for shape in order.shapes(n, k))
    return parts[0].device == device and tuple(part.shape for part in parts) == shapes


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
