"""The store's entries: swizzled weights, and the states of the tensors they were made from."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from mxfp4_fx.core.errors import FreedWeightError
from mxfp4_fx.weights.freed import is_freed
from mxfp4_fx.weights.source import Encoding, Parts
from mxfp4_fx.weights.state import (
    Geometry,
    Mark,
    State,
    TensorState,
    geometry_of,
    guards_of,
    mark_of,
    owner_of,
    states_of,
)

# The ids of the marks of a source's tensors, its encoding, the layout; for views, their geometry.
Key = tuple[Any, ...]


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """A swizzled weight and the source that it was made from.

    Attributes:
        states: the state of each of the source's tensors.
        geometry: the geometry of each of them.
        guards: checks the geometry at a fraction of the cost.
        encoding: how the tensors hold the weight.
        layout: the layout of ``parts``.
        sizes: (E, N, K).
        parts: blocks and scales in ``layout``.
        stale: the weight must be swizzled again, even if the tensors' states are current.
    """

    states: tuple[TensorState, ...]
    geometry: tuple[Geometry, ...]
    guards: Callable[..., bool]
    encoding: Encoding
    layout: str
    sizes: tuple[int, int, int]
    parts: Parts = ()  # type: ignore[assignment]  # the store sets it after swizzling
    stale: bool = False

    def is_current(self, tensors: tuple[Tensor, ...]) -> bool:
        """Return whether the tensors have not changed; renew the guards if so."""
        pairs = zip(self.states, tensors, strict=True)
        if (
            self.stale
            or self.geometry != tuple(map(geometry_of, tensors))
            or not all(s.is_current(t, owner_of(t)._cdata) for s, t in pairs)
        ):
            return False
        # The guards also check modes and requires_grad, which may have changed.
        self.guards = guards_of(tensors)
        return True

    def has_state_of(self, new: Entry) -> bool:
        """Return whether nothing happened to the tensors between this entry and ``new``.

        Both entries have the same tensors.
        """
        return self.geometry == new.geometry and all(
            a.storage() is b.storage() and (a.address, a.version) == (b.address, b.version)
            for a, b in zip(self.states, new.states, strict=True)
        )

    def was_moved(self, new: Entry) -> bool:
        """Return whether a storage has new memory; the code that moved it may also fill it."""
        return self.geometry == new.geometry and any(
            a.storage() is b.storage() and a.address != b.address
            for a, b in zip(self.states, new.states, strict=True)
        )

    def is_its_source(self) -> bool:
        """Return whether the parts are the source's own memory."""
        return self.layout in self.encoding.layouts

    def has_freed(self) -> bool:
        """Return whether this entry holds the values of a freed tensor."""
        return any(state.is_freed for state in self.states)

    def holds(self, mark: Mark) -> bool:
        """Return whether this entry holds the values of the freed tensor with this mark."""
        return any(state.is_freed and state.mark() is mark for state in self.states)


class Entries:
    """All entries of the store. The caller of a method holds the store's lock.

    Attributes:
        by_key: the entries that lookups find.
        orphans: entries without a key that alone hold the values of a freed tensor: the other
            tensor of their source was replaced.
    """

    def __init__(self) -> None:
        self.by_key: dict[Key, Entry] = {}
        self.orphans: list[Entry] = []

    def all(self) -> list[Entry]:
        # A copy: if a tensor is collected during the loop, its entry leaves the dictionary.
        return [*self.by_key.values(), *self.orphans]

    def holder(self, freed: Tensor) -> Entry:
        """Return the entry that holds a freed tensor's values.

        Raises:
            FreedWeightError: no entry holds them any more.
        """
        mark = mark_of(freed)
        for entry in self.all():
            if entry.holds(mark):
                return entry
        raise FreedWeightError(
            f"the values of {freed!r} are lost: it was freed, and the other half of the weight "
            "was replaced. Load the checkpoint again"
        )

    def made_from(self, tensors: Iterable[Tensor]) -> list[Entry]:
        """Return the entries made from the memory of these tensors, which others may share.

        Freed tensors have no memory and are skipped.
        """
        by_storage: dict[int, list[State]] = {}
        for tensor in tensors:
            if not is_freed(tensor):
                for state in states_of(tensor):
                    by_storage.setdefault(id(state.storage()), []).append(state)
        return [
            entry
            for entry in list(self.by_key.values())
            if any(
                mine.overlaps(state)
                for mine in entry.states
                for state in by_storage.get(id(mine.storage()), ())
            )
        ]

    def tied_are_stale(self, changed: Entry) -> None:
        """Mark the entries stale whose tensors share memory with those of a changed entry.

        A write raises the version only of the tensor that it went through.
        """
        for entry in list(self.by_key.values()):
            if any(
                mine.mark() is not theirs.mark() and mine.overlaps(theirs)
                for mine in changed.states
                for theirs in entry.states
            ):
                entry.stale = True

    def forget(self, entries: Iterable[Entry]) -> int:
        """Remove these entries, except those that hold a freed tensor's values.

        Returns:
            How many were removed.
        """
        found = {id(entry) for entry in entries if not entry.has_freed()}
        keys = [key for key, entry in self.by_key.items() if id(entry) in found]
        for key in keys:
            del self.by_key[key]
        return len(keys)

    def drop_old(self, tensor: Tensor) -> None:
        """Remove the entries of a tensor that must not outlive its memory, before it is freed.

        These are entries with values that are not the present ones, and entries whose parts are the
        tensor's own memory.
        """
        mark = mark_of(tensor)
        for key, entry in list(self.by_key.items()):
            mine = [state for state in entry.states if state.mark() is mark]
            is_old = entry.stale or not all(
                state.is_current(tensor, owner_of(tensor)._cdata) for state in mine
            )
            if mine and (entry.is_its_source() or is_old):
                del self.by_key[key]
                self.let_go(entry)

    def drop_dead(self, key: Key, dead: weakref.ref[Mark]) -> None:
        """Remove the entry with this key after one of its tensors was collected."""
        entry = self.by_key.get(key)
        # Other marks may have the same ids by now.
        if entry is not None and any(state.mark is dead for state in entry.states):
            del self.by_key[key]
            self.let_go(entry)
        elif self.orphans:
            self.let_go()

    def renew(self, tensor: Tensor) -> None:
        """Record a tensor's new state after its memory was freed or restored.

        The entries made from it stay current.
        """
        for state in self._states_of(mark_of(tensor)):
            state.renew(tensor)

    def note_freed(self, tensor: Tensor, is_freed: bool) -> None:
        """Record whether only the entries of a tensor hold its values."""
        for state in self._states_of(mark_of(tensor)):
            state.is_freed = is_freed

    def let_go(self, *entries: Entry) -> None:
        """Keep, of ``entries`` and the orphans, those that alone hold a freed tensor's values."""
        reachable = list(self.by_key.values())

        def is_needed(entry: Entry) -> bool:
            marks = [state.mark() for state in entry.states if state.is_freed]
            return any(
                mark is not None and not any(other.holds(mark) for other in reachable)
                for mark in marks
            )

        self.orphans = [entry for entry in (*self.orphans, *entries) if is_needed(entry)]

    def _states_of(self, mark: Mark) -> list[TensorState]:
        return [state for entry in self.all() for state in entry.states if state.mark() is mark]
