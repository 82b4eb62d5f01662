"""A lowered graph's inputs: what is bound at each call, and the captured graph's own."""

from __future__ import annotations

import dataclasses
import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mxfp4_fx.core import torch_private
from mxfp4_fx.weights.freed import is_freed
from mxfp4_fx.weights.source import Encoding, Parts, Source
from mxfp4_fx.weights.state import Mark, mark_of
from mxfp4_fx.weights.store import STORE, warn_of_repeats

_TITLE = "mxfp4: swizzling expert weights"


@dataclasses.dataclass(frozen=True)
class Binding:
    """A weight that a lowered graph reads swizzled, and the captured graph as the model holds it.

    Attributes:
        slots: where its source's tensors are among the captured graph's inputs.
        encoding: how these hold the weight.
        layout: what it is swizzled to.
        inputs: the lowered graph's inputs that are bound to its blocks and scales, by name.
        name: the weight's, in the model that was captured; others may share the graph.
    """

    slots: tuple[int, ...]
    encoding: Encoding
    layout: str
    inputs: tuple[str, str]
    name: str

    def source(self, inputs: tuple[Any, ...]) -> Source:
        """What the captured graph's ``inputs`` hold of the weight."""
        return Source(self.take(inputs), self.encoding)

    @functools.cached_property
    def take(self) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        """The source's tensors of the captured graph's inputs, in a fraction of a microsecond."""
        if len(self.slots) == 1:  # by its index alone it would not come as a tuple
            return operator.itemgetter(slice(self.slots[0], self.slots[0] + 1))
        return operator.itemgetter(*self.slots)


class InputPlan:
    """Where a lowered graph's inputs come from: the captured graph's inputs, swizzled or not.

    Swizzled weights are looked up at every call, by the parameters that the call brings. It lives
    as long as the compiled code, which may outlive the model: it holds positions, no tensors.

    Attributes:
        bindings: the weights that are swizzled.
    """

    def __init__(
        self, captured: Sequence[str], lowered: Sequence[str], bindings: Sequence[Binding]
    ) -> None:
        """Of both graphs the inputs' names, in order, and what is bound to the lowered one's."""
        self.bindings = tuple(bindings)
        bound = {
            name: (at, part)
            for at, binding in enumerate(bindings)
            for part, name in enumerate(binding.inputs)
        }
        slots = {name: at for at, name in enumerate(captured)}
        # For each input: one of the captured graph's as it is, or a swizzled weight and its part.
        self._inputs = [bound.get(name) or (slots[name], None) for name in lowered]
        as_they_are = {at for at, part in self._inputs if part is None}
        self._only_swizzled = [b for b in self.bindings if not as_they_are.intersection(b.slots)]
        self._lookups = [(b.take, b.encoding, b.layout, b) for b in self.bindings]
        # What the last call that had to swizzle was called with, and how many in a row had others.
        self._last: list[weakref.ref[Mark]] = []
        self._strangers = 0

    def examples(self, inputs: Sequence[Any], fakes: Sequence[Any]) -> list[Any]:
        """Example inputs for the inner compiler: captured ones, and fake ones of what is swizzled.

        Args:
            inputs: the captured graph's.
            fakes: one for each of the lowered graph's inputs.
        """
        return [
            inputs[at] if part is None else fake
            for fake, (at, part) in zip(fakes, self._inputs, strict=True)
        ]

    def inputs(self, args: tuple[Any, ...]) -> list[Any]:
        """The lowered graph's inputs for a call of the captured one with ``args``."""
        # Freed parameters go by the road of all others, past their own class's veto.
        with torch_private.as_plain_tensors():
            before = STORE.swizzled
            parts = self._look_up(args)
            if STORE.swizzled != before:
                self._look_out(args)
                parts = self._look_up(args)  # what shares memory may have turned out to be stale
        return [args[at] if part is None else parts[at][part] for at, part in self._inputs]

    def swizzle_ahead(self, inputs: tuple[Any, ...]) -> None:
        """Swizzle while compiling, with a progress bar, rather than in the first call."""
        for binding in tqdm(self.bindings, _TITLE, leave=False, disable=None):
            source = binding.source(inputs)
            if all(
                isinstance(t, Tensor) and not isinstance(t, torch_private.FakeTensor)
                for t in source.tensors
            ):
                STORE.get(source, binding.layout, binding.name)

    def free(self, args: tuple[Any, ...]) -> None:
        """Swizzle what is not, and give each source's memory back before the next is swizzled."""
        found = [
            binding
            for binding in self._only_swizzled
            # As it is in every call but the first: no source needs to be made.
            if not all(map(is_freed, binding.take(args)))
            and STORE.can_free(binding.source(args), binding.layout)
        ]
        if found:
            for binding in tqdm(found, _TITLE, leave=False, disable=None):
                STORE.free(binding.source(args), binding.layout, binding.name)

    def _look_up(self, args: tuple[Any, ...]) -> list[Parts]:
        find = STORE.find
        return [
            find(take(args), encoding, layout)
            or STORE.get(binding.source(args), layout, binding.name)
            for take, encoding, layout, binding in self._lookups
        ]

    def _look_out(self, args: tuple[Any, ...]) -> None:
        """Tell if each call brings tensors that no earlier one brought, and that do not last."""
        are_gone = bool(self._last) and all(mark() is None for mark in self._last)
        self._strangers = self._strangers + 1 if are_gone else 0
        self._last = [weakref.ref(mark_of(args[b.slots[0]])) for b in self.bindings]
        if self._strangers == 2:
            warn_of_repeats(
                self.bindings[0].name,
                "every call brings another tensor, and the last one is gone",
            )
