"""Swizzled expert weights at run time: one for each source, for as long as that lives.

Dynamo lifts parameters to graph inputs and uses one compiled graph for many modules, so a weight is
looked up when the graph is called, by the identity of the parameter that it is called with. Nothing
here is baked into a graph or enters a cache key. ``swizzle.py`` says what a source is.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mxfp4_fx.core import forks, torch_private
from mxfp4_fx.core.errors import FreedWeightError, NanWeightsWarning, RepeatedSwizzleWarning
from mxfp4_fx.core.torch_private import is_filled_by_fsdp
from mxfp4_fx.weights import freed
from mxfp4_fx.weights.source import (
    MARK,
    Entry,
    Mark,
    Parts,
    Source,
    State,
    geometry_of,
    guards_of,
    mark_of,
    states_of,
)
from mxfp4_fx.weights.swizzle import (
    CHECKPOINT_ORDER,
    dequantized_like,
    nan_experts,
    sizes_of,
    swizzle_weight,
    unswizzle_weight,
)

_Key = tuple[Any, ...]
_NO_SCALES = id(None)


class WeightStore:
    """Source -> swizzled weight. Safe to use from several threads, but for a weight that one of
    them changes while another computes with it.

    A change in place (``copy_``, ``load_state_dict``, an optimizer) raises the source's version,
    ``p.data = t`` gives it another storage, and optimizers are asked what they step: all are
    noticed, and the weight is swizzled again, into the same memory. Writes that leave no trace
    (``p.data.mul_()``, through numpy, or in place on a parameter made under ``inference_mode``)
    need :meth:`refresh`.

    Attributes:
        swizzled: how often something was swizzled because it was new or had changed.
    """

    def __init__(self) -> None:
        self.swizzled = 0
        self._entries: dict[_Key, Entry] = {}
        # They alone have the values of something freed, whose other half was replaced.
        self._orphans: list[Entry] = []
        self._lock = threading.RLock()

    def get(
        self, weight: Tensor, layout: str, scales: Tensor | None = None, name: str = ""
    ) -> Parts:
        """Blocks and scales in ``layout``; swizzled now if need be.

        Args:
            weight: [E, K, N], or the blocks of ``scales``.
            layout: a key of ``layouts.LAYOUTS``.
            scales: of a packed weight.
            name: the weight's, for what may have to be said of it.
        """
        # Every weight passes here in every call.
        mark = id(getattr(weight, MARK, None))
        if scales is None:
            entry = self._entries.get((mark, _NO_SCALES, layout))
            if (
                entry is not None
                and entry.sources[0].is_current(weight)
                and entry.guards(weight)
                and not entry.stale
            ):
                return entry.parts
            tensors: tuple[Tensor, ...] = (weight,)
        else:
            entry = self._entries.get((mark, id(getattr(scales, MARK, None)), layout))
            if (
                entry is not None
                and entry.sources[0].is_current(weight)
                and entry.sources[1].is_current(scales)
                and entry.guards(weight, scales)
                and not entry.stale
            ):
                return entry.parts
            tensors = (weight, scales)
        with self._lock, torch_private.as_plain_tensors():
            return self._swizzle(tensors, layout, name)

    def refresh(self, sources: Iterable[Tensor]) -> int:
        """Forget what was made from these tensors; returns how many swizzled weights that was.

        The next call of a compiled graph swizzles them again. Freed weights are left as they are:
        nothing could be written to them.
        """
        with self._lock:
            stale = self._made_from(sources)
            for entry in stale:
                entry.stale = True
            return len(stale)

    def forget(self, sources: Iterable[Tensor]) -> int:
        """Let go of what was made from these tensors, but for the values of freed ones."""
        with self._lock:
            found = {id(entry) for entry in self._made_from(sources)}
            keys = [
                key
                for key, entry in self._entries.items()
                if id(entry) in found and not any(source.is_freed for source in entry.sources)
            ]
            for key in keys:
                del self._entries[key]
            return len(keys)

    def can_free(self, weight: Tensor, layout: str, scales: Tensor | None = None) -> bool:
        """Whether :meth:`free` would give memory back.

        Not where checkpoint order is the kernels' order, who read the source itself, nor what is no
        plain parameter, was restored by the user, is freed already, or is FSDP's to fill.
        """
        if scales is not None and layout == CHECKPOINT_ORDER:
            return False
        tensors = [weight] if scales is None else [weight, scales]
        if not all(map(freed.can_free, tensors)) or all(map(freed.is_freed, tensors)):
            return False
        marks = (getattr(tensor, MARK, None) for tensor in tensors)
        is_kept = any(getattr(mark, "keep", False) for mark in marks)
        return not is_kept and not any(map(is_filled_by_fsdp, tensors))

    def free(
        self, weight: Tensor, layout: str, scales: Tensor | None = None, name: str = ""
    ) -> bool:
        """Swizzle a source and give its memory back; returns whether that was done."""
        with self._lock:
            self.get(weight, layout, scales, name)
            if not self.can_free(weight, layout, scales):
                return False
            for tensor in (weight, scales):
                if not isinstance(tensor, nn.Parameter) or freed.is_freed(tensor):
                    continue
                self._drop_old(tensor)
                if not freed.free(tensor):
                    return False
                self._renew(tensor, is_freed=True)
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
        as_plain = torch_private.as_plain_tensors()
        with self._lock, torch.inference_mode(False), torch.no_grad(), as_plain:
            entry = self._holder(parameter)
            on = entry.parts[0].to(device), entry.parts[1].to(device)
            blocks, scales = unswizzle_weight(on, entry.layout, *entry.sizes)
            if len(entry.sources) == 1:
                return dequantized_like(blocks, scales, parameter)
            return blocks if entry.sources[0].mark() is mark_of(parameter) else scales

    def restore(self, parameter: Tensor) -> bool:
        """Give a freed parameter its memory and :meth:`values` again; whether it was freed."""
        with self._lock:
            if not isinstance(parameter, freed.FreedParameter):
                return False
            freed.restore(parameter, self.values(parameter))
            self._renew(parameter, is_freed=False)
            mark_of(parameter).keep = True
            return True

    def held(self, weight: Tensor, scales: Tensor) -> tuple[Parts, str]:
        """A packed weight of which something is freed, as it is held: parts and their layout."""
        with self._lock, torch_private.as_plain_tensors():
            layout = self._holder(weight if freed.is_freed(weight) else scales).layout
            return self.get(weight, layout, scales), layout

    def __len__(self) -> int:
        return len(self._entries)

    def _swizzle(self, tensors: tuple[Tensor, ...], layout: str, name: str) -> Parts:
        marks = [mark_of(tensor) for tensor in tensors]
        key: _Key = (id(marks[0]), id(marks[1]) if len(marks) == 2 else _NO_SCALES, layout)
        if any(tensor._base is not None for tensor in tensors):
            key = (*key, *(geometry_of(tensor)[:3] for tensor in tensors))
        old = self._entries.get(key)
        if old is not None and old.is_current(tensors):
            return old.parts  # a view, or another mode, or another thread was faster
        # Read before the values: a write in between is then noticed at the next call.
        has_freed = [freed.is_freed(tensor) for tensor in tensors]
        new = Entry(
            tuple(
                Source.of(tensor, is_freed, lambda dead: self._died(key, dead))
                for tensor, is_freed in zip(tensors, has_freed, strict=True)
            ),
            tuple(map(geometry_of, tensors)),
            guards_of(tensors),
            layout,
            sizes_of(tensors[0], len(tensors) == 2),
        )
        new.stale = any(map(is_filled_by_fsdp, tensors)) or (old is not None and old.was_moved(new))
        if not new.stale:
            self.swizzled += 1
            if old is None or not old.has_state_of(new):
                self._tied_are_stale(new)
        room = old.parts if old is not None and not any(has_freed) else None
        if old is not None:
            old.stale = True  # an interrupt leaves half of the new values in there
        new.parts = swizzle_weight(*self._readable(tensors, layout, room))
        self._entries[key] = new
        for mark, is_freed in zip(marks, has_freed, strict=True):
            if not is_freed:  # its values may have been given another way
                self._is_not_freed(mark)
        if old is not None:
            self._let_go(old)
        if len(tensors) == 1 and not has_freed[0]:
            _warn_of_nan(nan_experts(tensors[0], new.parts, layout), name)
        if new.stale and not marks[0].told:
            marks[0].told = True
            warn_of_repeats(name, "its memory is filled anew for each call, as FSDP does")
        return new.parts

    def _readable(
        self, tensors: tuple[Tensor, ...], layout: str, room: Parts | None
    ) -> tuple[Tensor, str, Parts | None, Tensor | None]:
        """``swizzle_weight``'s arguments; what is freed is made again from where it is held."""
        if len(tensors) == 2:
            return self.values(tensors[0]), layout, room, self.values(tensors[1])
        if not freed.is_freed(tensors[0]):
            return tensors[0], layout, room, None
        entry = self._holder(tensors[0])
        with torch.inference_mode(False):  # they may be kept as they are
            blocks, scales = unswizzle_weight(entry.parts, entry.layout, *entry.sizes)
        return blocks, layout, room, scales

    def _holder(self, parameter: Tensor) -> Entry:
        mark = mark_of(parameter)
        for entry in self._all():
            if entry.holds(mark):
                return entry
        raise FreedWeightError(
            f"the values of {parameter!r} are lost: it was freed, and the other half of the weight "
            "was replaced. Load the checkpoint again"
        )

    def _made_from(self, tensors: Iterable[Tensor]) -> list[Entry]:
        """What was made from the memory of these tensors, whoever shares it; not of freed ones."""
        by_storage: dict[int, list[State]] = {}
        for tensor in tensors:
            if not freed.is_freed(tensor):
                for state in states_of(tensor):
                    by_storage.setdefault(id(state.storage()), []).append(state)
        return [
            entry
            for entry in list(self._entries.values())
            if any(
                source.overlaps(state)
                for source in entry.sources
                for state in by_storage.get(id(source.storage()), ())
            )
        ]

    def _tied_are_stale(self, changed: Entry) -> None:
        """A write to what shares memory with others is counted for the one that it went through."""
        for entry in list(self._entries.values()):
            if any(
                mine.mark() is not theirs.mark() and mine.overlaps(theirs)
                for mine in changed.sources
                for theirs in entry.sources
            ):
                entry.stale = True

    def _drop_old(self, tensor: nn.Parameter) -> None:
        """Of what was made from a source that is to be freed, only what has its present values may
        outlive them, and nothing that is its very memory."""
        mark = mark_of(tensor)
        for key, entry in list(self._entries.items()):
            mine = [source for source in entry.sources if source.mark() is mark]
            is_itself = entry.layout == CHECKPOINT_ORDER and len(entry.sources) == 2
            is_old = entry.stale or not all(source.is_current(tensor) for source in mine)
            if mine and (is_itself or is_old):
                del self._entries[key]
                self._let_go(entry)

    def _renew(self, tensor: nn.Parameter, is_freed: bool) -> None:
        """The memory of a source was given back, or given again: what was made from it is right."""
        mark = mark_of(tensor)
        for entry in self._all():
            for source in entry.sources:
                if source.mark() is mark:
                    source.renew(tensor, is_freed)

    def _is_not_freed(self, mark: Mark) -> None:
        for entry in self._all():
            for source in entry.sources:
                if source.mark() is mark:
                    source.is_freed = False

    def _all(self) -> list[Entry]:
        # A copy: a tensor that is collected meanwhile takes its entry along.
        return [*self._entries.values(), *self._orphans]

    def _died(self, key: _Key, dead: weakref.ref[Mark]) -> None:
        with self._lock:
            entry = self._entries.get(key)
            # The ids may be those of others by now.
            if entry is not None and any(source.mark is dead for source in entry.sources):
                del self._entries[key]
                self._let_go(entry)
            elif self._orphans:
                self._let_go()

    def _let_go(self, *entries: Entry) -> None:
        """Keep of these, and of the orphans, what alone has the values of something freed."""
        reachable = list(self._entries.values())

        def is_needed(entry: Entry) -> bool:
            marks = [source.mark() for source in entry.sources if source.is_freed]
            return any(
                mark is not None and not any(other.holds(mark) for other in reachable)
                for mark in marks
            )

        self._orphans = [entry for entry in (*self._orphans, *entries) if is_needed(entry)]


STORE = WeightStore()
freed.read_from(lambda parameter: STORE.values(parameter))
forks.renew_lock(STORE, "_lock", threading.RLock)


def _is_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """An optimizer's kernels may write without raising a version: the fused ones do."""
    if len(STORE) and not torch.compiler.is_compiling():
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        STORE.refresh(p for p in parameters if p.requires_grad or p.grad is not None)


# Before, too: a step may be interrupted.
register_optimizer_step_pre_hook(_is_stepped)
register_optimizer_step_post_hook(_is_stepped)


def warn_of_repeats(name: str, why: str) -> None:
    """Say that a weight is swizzled at each call."""
    warnings.warn(
        f"{name or 'an expert weight'} is swizzled again at each call: {why}. That is right, and "
        f"takes longer than the experts themselves",
        RepeatedSwizzleWarning,
        stacklevel=3,
    )


def _warn_of_nan(experts: list[int], name: str) -> None:
    if experts:
        shown = ", ".join(map(str, experts[:8])) + (", ..." if experts[8:] else "")
        warnings.warn(
            f"{name or 'an expert weight'} has infinite or NaN elements (experts {shown}): MXFP4 "
            f"makes NaN of each block of 32 that holds one",
            NanWeightsWarning,
            stacklevel=3,
        )
