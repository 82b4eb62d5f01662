"""The store of swizzled expert weights: one for each source, as long as the source lives.

Dynamo lifts parameters to graph inputs and uses one compiled graph for many modules. So each call
of a graph looks its weights up by the identity of the parameters that it gets. Nothing of the store
is a constant of a graph or enters a cache key.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mxfp4_fx.core import forks, torch_private, torch_private_dynamo
from mxfp4_fx.core.errors import DeviceFullError
from mxfp4_fx.core.torch_private_distributed import gathered_from, is_filled_by_fsdp, shard_of
from mxfp4_fx.weights import freed, notices, steps
from mxfp4_fx.weights.entries import Entries, Entry, Key
from mxfp4_fx.weights.source import MXFP4, MXFP8, Encoding, Parts, Source
from mxfp4_fx.weights.state import (
    MARK,
    Mark,
    TensorState,
    geometry_of,
    guards_of,
    is_written,
    mark_of,
    mark_storage,
    owner_of,
)
from mxfp4_fx.weights.swizzle import nan_experts, swizzle_weight, unswizzle_weight


class WeightStore:
    """A map from source and layout to the swizzled weight.

    Several threads may use it, but no thread may change a weight while another computes with it.

    The store notices a change of a tensor and swizzles the weight again, into the same memory. A
    change in place (``copy_``, ``load_state_dict``, an optimizer) raises the tensor's version,
    ``p.data = t`` gives it another storage, and a hook on optimizers names the parameters of each
    step. Writes that leave no trace (``p.data.mul_()``, through numpy, or in place on a parameter
    made under ``inference_mode``) need :meth:`refresh`.

    Attributes:
        swizzled: how many times a weight was swizzled because it was new or had changed.
    """

    def __init__(self) -> None:
        self.swizzled = 0
        self._entries = Entries()
        self._by_key = self._entries.by_key
        self._lock = threading.RLock()

    def find(self, tensors: tuple[Tensor, ...], encoding: Encoding, layout: str) -> Parts | None:
        """Return the result of :meth:`get` for ``Source(tensors, encoding)`` if it is current.

        If not, return None.
        """
        # Every call looks every weight up here. Making a source, or a loop over its one or two
        # tensors, would take half as long again.
        if len(tensors) == 1:
            (weight,) = tensors
            if (base := weight._base) is not None:
                return self._find_view(weight, base, encoding, layout)
            entry = self._by_key.get((id(getattr(weight, MARK, None)), encoding, layout))
            if entry is None or not entry.states[0].is_current(weight, weight._cdata):
                return None
        elif not encoding.of_parameters:
            return self._find_by_storage(tensors, encoding, layout)
        else:
            blocks, scales = tensors
            mark, other = id(getattr(blocks, MARK, None)), id(getattr(scales, MARK, None))
            entry = self._by_key.get((mark, other, encoding, layout))
            if (
                entry is None
                or not entry.states[0].is_current(blocks, blocks._cdata)
                or not entry.states[1].is_current(scales, scales._cdata)
            ):
                return None
        return None if entry.stale or not entry.guards(*tensors) else entry.parts

    def _find_view(
        self, weight: Tensor, base: Tensor, encoding: Encoding, layout: str
    ) -> Parts | None:
        place = weight.shape, weight.stride(), weight.storage_offset()
        entry = self._by_key.get((id(getattr(base, MARK, None)), encoding, layout, place))
        if entry is None or entry.stale or not entry.guards(weight):
            return None
        return entry.parts if entry.states[0].is_current(weight, base._cdata) else None

    def _find_by_storage(
        self, tensors: tuple[Tensor, ...], encoding: Encoding, layout: str
    ) -> Parts | None:
        blocks, scales = tensors
        held, other = blocks.untyped_storage(), scales.untyped_storage()
        mark, second = id(getattr(held, MARK, None)), id(getattr(other, MARK, None))
        offsets = blocks.storage_offset(), scales.storage_offset()
        entry = self._by_key.get((mark, second, encoding, layout, *offsets))
        if (
            entry is not None
            and not entry.stale
            and entry.guards(blocks, scales)
            and entry.states[0].is_current(blocks, held._cdata)
            and entry.states[1].is_current(scales, other._cdata)
        ):
            return entry.parts
        if layout in encoding.layouts and not any(map(freed.is_freed, tensors)):
            # An entry would keep the storages alive, and they its marks.
            return encoding.view(tensors, layout)
        return None

    def get(self, source: Source, layout: str, name: str = "") -> Parts:
        """Return blocks and scales in ``layout``; swizzle the source if they are not current.

        Args:
            source: the tensors of the model.
            layout: a key of ``layouts.LAYOUTS``.
            name: the weight's name, for warnings.
        """
        parts = self.find(source.tensors, source.encoding, layout)
        if parts is not None:
            return parts
        shards = tuple(map(self._shard_of_copy, source.tensors))
        if any(a is not b for a, b in zip(shards, source.tensors, strict=True)):
            parts = self.find(shards, source.encoding, layout)
            if parts is not None:
                return parts
            # FSDP2 may not have copied again since the shards were written to.
            if all(torch.equal(a, b) for a, b in zip(shards, source.tensors, strict=True)):
                return self.get(Source(shards, source.encoding), layout, name)
        timed = torch_private_dynamo.timed("mxfp4_fx.swizzle")
        with timed, self._lock, torch_private.as_plain_tensors():
            return self._swizzle(source, layout, name)

    def look_at(self, wholes: Iterable[Tensor]) -> None:
        """Notice writes through DTensors, which their shards do not show.

        What reads a shard may have been given the shard alone. So whoever has the DTensors shows
        them to the store before each call.
        """
        written = [whole for whole in wholes if is_written(whole)]
        if written and self._by_key:
            self.refresh(written)

    def refresh(self, tensors: Iterable[Tensor]) -> int:
        """Mark the weights that were swizzled from these tensors stale.

        The next call of a compiled graph swizzles them again. Freed tensors are skipped: nothing
        can have written to them.

        Returns:
            How many swizzled weights are affected.
        """
        with self._lock:
            stale = self._entries.made_from(tensors)
            for entry in stale:
                entry.stale = True
            return len(stale)

    def forget(self, tensors: Iterable[Tensor]) -> int:
        """Release the weights swizzled from these tensors, except those that hold freed values.

        Returns:
            How many swizzled weights are released.
        """
        with self._lock:
            return self._entries.forget(self._entries.made_from(tensors))

    def can_free(self, source: Source, layout: str) -> bool:
        """Return whether :meth:`free` would free memory.

        It would not if the kernels read the source itself, if a tensor is no plain parameter, was
        restored by the user or is filled by FSDP, if an attempt has failed, or if all tensors are
        freed already.
        """
        tensors = source.tensors
        if layout in source.encoding.layouts:
            return False
        can_free = freed.can_free if source.encoding.of_parameters else freed.can_free_plain
        if not all(map(can_free, tensors)) or all(map(freed.is_freed, tensors)):
            return False
        marks = (getattr(owner_of(tensor), MARK, None) for tensor in tensors)
        is_kept = any(mark is not None and (mark.keep or mark.kept) for mark in marks)
        return not is_kept and not any(map(is_filled_by_fsdp, tensors))

    def free(self, source: Source, layout: str, name: str = "") -> bool:
        """Swizzle a source and free its memory; return whether memory was freed."""
        with self._lock:
            self.get(source, layout, name)
            if not self.can_free(source, layout):
                return False
            held = [
                tensor
                for tensor in source.tensors
                if (isinstance(tensor, nn.Parameter) or not source.encoding.of_parameters)
                and not freed.is_freed(tensor)
            ]
            marks = [mark_of(tensor) for tensor in held]
            for tensor in held:
                self._entries.drop_old(tensor)
                # Noted before it happens: an interrupt must not lose track of where values are.
                self._entries.note_freed(tensor, True)
            is_done = freed.free(held)
            for tensor, mark in zip(held, marks, strict=True):
                if not source.encoding.of_parameters:
                    mark_storage(tensor, mark)
                self._entries.note_freed(tensor, is_done)
                self._entries.renew(tensor)
            if not is_done and not marks[0].kept:
                marks[0].kept = True
                notices.warn_of_kept(name)
            return is_done

    def values(self, source: Source, device: torch.device | None = None) -> tuple[Tensor, ...]:
        """Return the tensors of a source: freed ones in new memory, any others as they are.

        A packed weight has its former bytes. A weight of floats has the values that it has in
        MXFP4.

        Args:
            source: some of its tensors may be freed.
            device: where freed tensors get their new memory; None stands for their own device.

        Raises:
            FreedWeightError: the swizzled weight that held a freed tensor's values is gone.
        """
        return self._values(source.tensors, device)

    def values_of(self, parameter: Tensor) -> Tensor:
        """Return one parameter as :meth:`values` does, whichever source it belongs to."""
        return self._values((parameter,))[0]

    def restore(self, parameters: Iterable[Tensor]) -> int:
        """Give freed parameters memory and their :meth:`values` again.

        The sources follow one another; all given parameters of a source are restored together.

        Returns:
            How many parameters were restored.
        """
        with self._lock:
            waiting = [p for p in parameters if isinstance(p, freed.FreedParameter)]
            restored = 0
            with notices.restoring(len(waiting)) as bar:
                while waiting:
                    entry = self._entries.holder(waiting[0])
                    together = [p for p in waiting if entry.holds(mark_of(p))]
                    for parameter, values in zip(together, self._values(together), strict=True):
                        self._restore(parameter, values, entry)
                    restored += len(together)
                    bar.update(len(together))
                    waiting = [p for p in waiting if freed.is_freed(p)]
            return restored

    def _restore(self, parameter: Tensor, values: Tensor, entry: Entry) -> None:
        mark = mark_of(parameter)
        freed.restore(parameter, values)
        if not entry.encoding.of_parameters:
            mark_storage(parameter, mark)
        self._entries.note_freed(parameter, False)
        self._entries.renew(parameter)
        mark_of(parameter).keep = True

    def held(self, source: Source) -> tuple[Parts, str]:
        """Return the swizzled parts of a source with a freed tensor, and their layout."""
        with self._lock, torch_private.as_plain_tensors():
            layout = self._entries.holder(next(filter(freed.is_freed, source.tensors))).layout
            return self.get(source, layout), layout

    def __len__(self) -> int:
        return len(self._by_key)

    def _swizzle(self, source: Source, layout: str, name: str) -> Parts:
        tensors = source.tensors
        by_storage = not source.encoding.of_parameters
        marks = [mark_storage(tensor) if by_storage else mark_of(tensor) for tensor in tensors]
        key: Key = (*map(id, marks), source.encoding, layout)
        if by_storage:
            key = (*key, *(tensor.storage_offset() for tensor in tensors))
        elif any(owner_of(tensor) is not tensor for tensor in tensors):
            key = (*key, *(geometry_of(tensor)[:3] for tensor in tensors))
        old = self._by_key.get(key)
        if old is not None and old.is_current(tensors):
            return old.parts  # of a view or in another mode, or another thread swizzled it
        # The states are read before the values, so the next call notices a write in between.
        new = Entry(
            tuple(
                TensorState.of(tensor, freed.is_freed(tensor), lambda dead: self._died(key, dead))
                for tensor in tensors
            ),
            tuple(map(geometry_of, tensors)),
            guards_of(tensors),
            source.encoding,
            layout,
            source.encoding.sizes(tensors),
        )
        is_filled = any(map(is_filled_by_fsdp, tensors))
        is_moved = old is not None and old.was_moved(new)
        new.stale = is_filled or is_moved
        if not new.stale:
            self.swizzled += 1
            if old is None or not old.has_state_of(new):
                self._entries.tied_are_stale(new)
        room = old.parts if old is not None and not new.has_freed() else None
        if old is not None:
            old.stale = True  # an interrupt may leave some new values in its memory
        readable = self._readable(source)
        try:
            new.parts = swizzle_weight(readable, layout, room)
        except torch.OutOfMemoryError as error:
            raise DeviceFullError(notices.of_full_device(source, name)) from error
        self._by_key[key] = new
        for tensor, state in zip(tensors, new.states, strict=True):
            if not state.is_freed:  # a freed tensor may have got values in another way
                self._entries.note_freed(tensor, False)
        if old is not None:
            self._entries.let_go(old)
        notices.warn_of_nan(source, nan_experts(readable, new.parts, layout), name)
        is_repeated = is_filled or (is_moved and marks[0].moved)  # share_memory moves it once
        marks[0].moved = is_moved
        if is_repeated and not marks[0].told:
            marks[0].told = True
            notices.warn_of_repeats(name, "its memory is filled anew for each call, as FSDP does")
        return new.parts

    def _shard_of_copy(self, tensor: Tensor) -> Tensor:
        """Return the shard that FSDP2 copies to a tensor for each forward; most often ``tensor``.

        The shard stays where it is, and has the version of its values.
        """
        whole = gathered_from(tensor)
        if whole is None:
            return tensor
        self.look_at([whole])
        return shard_of(whole)

    def _readable(self, source: Source) -> Source:
        """Return the source with memory for its freed tensors; in MXFP4 if all are freed."""
        if all(map(freed.is_freed, source.tensors)):
            entry = self._entries.holder(source.tensors[0])
            is_same = entry.encoding is source.encoding
            if is_same and all(entry.holds(mark_of(tensor)) for tensor in source.tensors):
                with torch.inference_mode(False):  # the store may keep these parts
                    parts = unswizzle_weight(entry.parts, entry.layout, *entry.sizes)
                return Source(parts, MXFP8 if entry.encoding.of_linears else MXFP4)
        return Source(self._values(source.tensors), source.encoding)

    def _values(
        self, tensors: Sequence[Tensor], device: torch.device | None = None
    ) -> tuple[Tensor, ...]:
        made: dict[Entry, tuple[Tensor, ...]] = {}
        as_plain = torch_private.as_plain_tensors()
        with self._lock, torch.inference_mode(False), torch.no_grad(), as_plain:
            return tuple(
                self._value(tensor, made, device) if freed.is_freed(tensor) else tensor
                for tensor in tensors
            )

    def _value(
        self, parameter: Tensor, made: dict[Entry, tuple[Tensor, ...]], device: torch.device | None
    ) -> Tensor:
        """Return the values of a freed parameter.

        ``made`` caches the tensors of each entry's source.
        """
        entry = self._entries.holder(parameter)
        if entry not in made:
            on = entry.parts[0].to(device), entry.parts[1].to(device)
            parts = unswizzle_weight(on, entry.layout, *entry.sizes)
            made[entry] = entry.encoding.from_mxfp4(parts, parameter)
        mark = mark_of(parameter)
        at = next(at for at, state in enumerate(entry.states) if state.mark() is mark)
        return made[entry][at]

    def _died(self, key: Key, dead: weakref.ref[Mark]) -> None:
        with self._lock:
            self._entries.drop_dead(key, dead)


STORE = WeightStore()
freed.read_from(lambda parameter: STORE.values_of(parameter))
forks.renew_lock(STORE, "_lock", threading.RLock)
steps.tell(STORE)
