"""What the store has: swizzled weights, and the states of what they were made from."""

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

# The ids of the marks of a source's tensors, its encoding, and the layout; geometry of views.
Key = tuple[Any, ...]


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """A swizzled weight and the source that it was made from.

    Attributes:
        states: of each of the source's tensors.
        geometry: of each, too, and ``guards`` that ask for it at a fraction of the price.
        sizes: (E, N, K).
        stale: it must be made again, whatever the tensors look like.
    """

    states: tuple[TensorState, ...]
    geometry: tuple[Geometry, ...]
    guards: Callable[..., bool]
    encoding: Encoding
    layout: str
    sizes: tuple[int, int, int]
    parts: Parts = ()  # type: ignore[assignment]  # made a little later
    stale: bool = False

    def is_current(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether nothing has changed."""
        pairs = zip(self.states, tensors, strict=True)
        if (
            self.stale
            or self.geometry != tuple(map(geometry_of, tensors))
            or not all(s.is_current(t, owner_of(t)._cdata) for s, t in pairs)
        ):
            return False
        # They ask for modes and requires_grad, too, which may have changed.
        self.guards = guards_of(tensors)
        return True

    def has_state_of(self, new: Entry) -> bool:
        """Whether nothing has happened to the tensors, which are the same, in between."""
        return self.geometry == new.geometry and all(
            a.storage() is b.storage() and (a.address, a.version) == (b.address, b.version)
            for a, b in zip(self.states, new.states, strict=True)
        )

    def was_moved(self, new: Entry) -> bool:
        """Whether a storage has new memory: whoever gives and takes it may also fill it."""
        return self.geometry == new.geometry and any(
            a.storage() is b.storage() and a.address != b.address
            for a, b in zip(self.states, new.states, strict=True)
        )

    def is_its_source(self) -> bool:
        """Whether the parts are the source's very memory."""
        return self.encoding.layout == self.layout

    def has_freed(self) -> bool:
        """Whether values of something freed are here."""
        return any(state.is_freed for state in self.states)

    def holds(self, mark: Mark) -> bool:
        """Whether a freed tensor's values are here."""
        return any(state.is_freed and state.mark() is mark for state in self.states)


class Entries:
    """All entries; who calls holds the store's lock.

    Attributes:
        by_key: those that a source is looked up in.
        orphans: they alone have the values of something freed, whose other half was replaced.
    """

    def __init__(self) -> None:
        self.by_key: dict[Key, Entry] = {}
        self.orphans: list[Entry] = []

    def all(self) -> list[Entry]:
        # A copy: a tensor that is collected meanwhile takes its entry along.
        return [*self.by_key.values(), *self.orphans]

    def holder(self, freed: Tensor) -> Entry:
        """The entry that holds a freed tensor's values.

        Raises:
            FreedWeightError: there is none any more.
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
        """What was made from the memory of these tensors, whoever shares it; not of freed ones."""
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
        """A write to what shares memory with others is counted for the one that it went through."""
        for entry in list(self.by_key.values()):
            if any(
                mine.mark() is not theirs.mark() and mine.overlaps(theirs)
                for mine in changed.states
                for theirs in entry.states
            ):
                entry.stale = True

    def forget(self, entries: Iterable[Entry]) -> int:
        """Let go of these but for those that hold values of something freed; how many went."""
        found = {id(entry) for entry in entries if not entry.has_freed()}
        keys = [key for key, entry in self.by_key.items() if id(entry) in found]
        for key in keys:
            del self.by_key[key]
        return len(keys)

    def drop_old(self, tensor: Tensor) -> None:
        """Of what was made from a tensor that is to be freed, only what has its present values may
        outlive them, and nothing that is its very memory."""
        mark = mark_of(tensor)
        for key, entry in list(self.by_key.items()):
            mine = [state for state in entry.states if state.mark() is mark]
            is_old = entry.stale or not all(
                state.is_current(tensor, tensor._cdata) for state in mine
            )
            if mine and (entry.is_its_source() or is_old):
                del self.by_key[key]
                self.let_go(entry)

    def drop_dead(self, key: Key, dead: weakref.ref[Mark]) -> None:
        """A tensor is gone, of which the entry with this key was made."""
        entry = self.by_key.get(key)
        # The ids may be those of others by now.
        if entry is not None and any(state.mark is dead for state in entry.states):
            del self.by_key[key]
            self.let_go(entry)
        elif self.orphans:
            self.let_go()

    def renew(self, tensor: Tensor) -> None:
        """A tensor's memory was given back, or given again: what was made from it is right."""
        for state in self._states_of(mark_of(tensor)):
            state.renew(tensor)

    def note_freed(self, tensor: Tensor, is_freed: bool) -> None:
        """Whether a tensor's values are here and nowhere else."""
        for state in self._states_of(mark_of(tensor)):
            state.is_freed = is_freed

    def let_go(self, *entries: Entry) -> None:
        """Keep of these, and of the orphans, what alone has the values of something freed."""
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
