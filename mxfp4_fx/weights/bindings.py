"""The inputs of a lowered graph: swizzled weights, bound at each call, and captured inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mxfp4_fx.core import background, torch_private
from mxfp4_fx.core.torch_private_distributed import shard_of
from mxfp4_fx.weights import mapped
from mxfp4_fx.weights.freed import is_freed
from mxfp4_fx.weights.mapped import MappedFile
from mxfp4_fx.weights.notices import warn_of_kept_shard, warn_of_repeats
from mxfp4_fx.weights.source import Encoding, Parts, Source
from mxfp4_fx.weights.state import Mark, Trace, mark_of
from mxfp4_fx.weights.store import STORE
from mxfp4_fx.weights.swizzle import is_native

SWIZZLING = "mxfp4: swizzling weights"


@dataclasses.dataclass(frozen=True)
class Binding:
    """A weight that the lowered graph reads swizzled and the captured graph as the model holds it.

    Attributes:
        slots: the positions of the source's tensors among the captured graph's inputs.
        encoding: how these tensors hold the weight.
        layout: the layout that the weight is swizzled to.
        inputs: the names of the lowered graph's inputs for the blocks and the scales.
        name: the weight's name in the captured model; other models may share the graph.
    """

    slots: tuple[int, ...]
    encoding: Encoding
    layout: str
    inputs: tuple[str, str]
    name: str

    def source(self, inputs: tuple[Any, ...]) -> Source:
        """Return the weight's source among the captured graph's ``inputs``."""
        return Source(self.take(inputs), self.encoding)

    @functools.cached_property
    def take(self) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        """A function from the captured graph's inputs to the source's tensors.

        It takes a fraction of a microsecond.
        """
        if len(self.slots) == 1:  # itemgetter of one index returns no tuple; of a slice it does
            return operator.itemgetter(slice(self.slots[0], self.slots[0] + 1))
        return operator.itemgetter(*self.slots)


class InputPlan:
    """The map from a captured graph's inputs to the lowered graph's: unchanged, or swizzled.

    Each call looks the swizzled weights up by the parameters among its arguments. The plan holds
    positions and no tensors: it lives as long as the compiled code, which may outlive the model.

    Attributes:
        bindings: the weights that are swizzled.
    """

    def __init__(
        self,
        captured: Sequence[str],
        lowered: Sequence[str],
        bindings: Sequence[Binding],
        wholes: Iterable[int],
        is_lent: Callable[[Tensor], bool],
        tell_of_lent: Callable[[], None],
        is_shared: Callable[[Tensor], bool],
        caller: Callable[[], Any],
    ) -> None:
        """
        Args:
            captured, lowered: the names of both graphs' inputs, in order.
            bindings: the weights that the lowered graph reads swizzled.
            wholes: the positions of DTensors in whose place the lowered graph reads their shards.
            is_lent: whether an input is there for the present call alone, as the user wants it.
            tell_of_lent: warns, at most once, of what lent inputs cost.
            is_shared: whether a linear's weight may be read by something else, as tied ones are.
            caller: returns the model or the function whose call runs the graph, or None.
        """
        self.bindings = tuple(bindings)
        self._is_lent, self._tell_of_lent, self._is_shared = is_lent, tell_of_lent, is_shared
        self._caller = caller
        self._wholes = tuple(wholes)
        bound_slots = {at for binding in bindings for at in binding.slots}
        self._bound_wholes = tuple(bound_slots.intersection(self._wholes))
        bound = {
            name: (at, part)
            for at, binding in enumerate(bindings)
            for part, name in enumerate(binding.inputs)
        }
        slots = {name: at for at, name in enumerate(captured)}
        # For each lowered input: (captured input, None), or (binding, part of its weight).
        self._inputs = [bound.get(name) or (slots[name], None) for name in lowered]
        as_they_are = {at for at, part in self._inputs if part is None}
        self._only_swizzled = [b for b in self.bindings if not as_they_are.intersection(b.slots)]
        self._lookups = [(b.take, b.encoding, b.layout, b) for b in self.bindings]
        # Caller -> what is known of its last call that swizzled.
        self._lookouts: weakref.WeakKeyDictionary[Any, _Lookout] = weakref.WeakKeyDictionary()
        self._of_nobody = _Lookout()
        self._noted = -1  # the store's count of swizzled weights when traces were left last

    def examples(self, inputs: Sequence[Any], fakes: Sequence[Any]) -> list[Any]:
        """Return example inputs for the inner compiler; those of swizzled weights are fake.

        Args:
            inputs: the captured graph's inputs.
            fakes: a fake tensor for each of the lowered graph's inputs.
        """
        inputs = self._with_shards(inputs)
        return [
            inputs[at] if part is None else fake
            for fake, (at, part) in zip(fakes, self._inputs, strict=True)
        ]

    def inputs(self, args: tuple[Any, ...]) -> list[Any]:
        """Return the lowered graph's inputs for a call of the captured graph with ``args``."""
        # As plain tensors: the class of freed parameters would raise an error.
        with torch_private.as_plain_tensors():
            args = self._with_shards(args)
            before = STORE.swizzled
            parts = self._look_up(args)
            if STORE.swizzled != before:
                self._look_out(args)
                parts = self._look_up(args)  # swizzling may mark weights that share memory stale
            elif self._noted != before:
                self._noted = before
                for binding in self.bindings:
                    mark_of(args[binding.slots[0]]).trace.was_found = True
        return [args[at] if part is None else parts[at][part] for at, part in self._inputs]

    def names(
        self, args: tuple[Any, ...], inputs: Sequence[Any], holders: Mapping[int, str]
    ) -> Iterator[tuple[Tensor, str]]:
        """Yield the lowered graph's weights and their names in the model, for profiles.

        Args:
            args: the captured graph's inputs.
            inputs: the lowered graph's, which :meth:`inputs` has made of them.
            holders: ``id`` of a captured weight -> the name of the module that holds it.

        Yields:
            A weight's blocks, and its name; a linear's weight has the linear's.
        """
        for value, (at, part) in zip(inputs, self._inputs, strict=True):
            if part == 0:
                binding = self.bindings[at]
                weight, of, holder = binding.name.partition(" of ")
                holder = holders.get(id(args[binding.slots[0]]), holder)
                yield value, holder if binding.encoding.of_linears else f"{weight}{of}{holder}"

    @contextlib.contextmanager
    def swizzling_ahead(
        self, *calls: tuple[Any, ...], is_quiet: bool, are_freed: bool
    ) -> Iterator[None]:
        """Swizzle weights while the block compiles, not in the first call, with a progress bar.

        Weights that a native function swizzles are swizzled in a thread beside the block, the
        others after it: those share Python, or a GPU's streams, with the compiler. If the block
        raises, the store forgets what was swizzled.

        Args:
            calls: the captured graph's inputs, in the first call and in others that it will serve.
            is_quiet: the block measures times, so nothing may run beside it.
            are_freed: the first call frees the weights. So that the peak of memory does not grow,
                only weights in a mapped file are swizzled ahead, and each one's pages are given
                back at once.

        Raises:
            BaseException: whatever swizzling raises, after the block.
        """
        given = [self._with_shards(inputs) for inputs in calls]
        needed = [(b, i) for i in given for b in self.bindings if self._is_needed(b, i)]
        beside = [(binding, inputs) for binding, inputs in needed if _is_native(binding, inputs)]
        after = [(binding, inputs) for binding, inputs in needed if not _is_native(binding, inputs)]
        if not is_quiet:
            mapped.read_ahead(tensor for b, inputs in beside for tensor in b.take(inputs))
        if are_freed:
            files = mapped.mapped_files()
            beside, after = [(b, i) for b, i in beside if self._is_paged(b, i, files)], []
        if is_quiet:
            beside, after = [], beside + after
        made: list[Source] = []

        def swizzle(
            bindings: list[tuple[Binding, tuple[Any, ...]]], is_stopped: Callable[[], bool]
        ) -> None:
            for binding, inputs in tqdm(bindings, SWIZZLING, leave=False, disable=None):
                if is_stopped():
                    return
                source = binding.source(inputs)
                made.append(source)
                STORE.get(source, binding.layout, binding.name)
                if are_freed:
                    mapped.page_out(source.tensors)

        try:
            with contextlib.ExitStack() as thread:
                if beside:
                    work = functools.partial(swizzle, beside)
                    thread.enter_context(background.meanwhile(work))
                yield
            if after:
                swizzle(after, lambda: False)
        except BaseException:
            STORE.forget(tensor for source in made for tensor in source.tensors)
            raise

    def free(self, args: tuple[Any, ...]) -> None:
        """Swizzle each weight and free its source's memory before the next one is swizzled.

        Lent weights are left out: they are gone after the call. So are linears' weights that
        something else reads, as an embedding does if they are tied.
        """
        args = self._with_shards(args)
        self._tell_of_kept(args)
        found = [
            binding
            for binding in self._only_swizzled
            # In all calls but the first, all tensors are freed, and no source needs to be made.
            if not all(map(is_freed, binding.take(args)))
            and STORE.can_free(binding.source(args), binding.layout)
            and not any(map(self._is_lent, binding.take(args)))
            and not self._is_kept(binding, args)
        ]
        if found:
            for binding in tqdm(found, SWIZZLING, leave=False, disable=None):
                STORE.free(binding.source(args), binding.layout, binding.name)

    def free_together(self, calls: Sequence[tuple[Any, ...]]) -> None:
        """Free the weights of several calls, as :meth:`free` does; of all or of none.

        Dynamo, which compiles, has weak references to the weights of the call that it captured.
        Views could not be parted from their bases, so they are freed when they are called.
        """
        given = [tensor for args in calls for b in self.bindings for tensor in b.take(args)]
        if all(_is_real(tensor) and tensor._base is None for tensor in given):
            for args in calls:
                self.free(args)

    def _with_shards(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Return the inputs with shards in the place of DTensors, at which the store looks."""
        if not self._wholes:
            return tuple(args)
        STORE.look_at(args[at] for at in self._bound_wholes)
        given = list(args)
        for at in self._wholes:
            given[at] = shard_of(args[at])
        return tuple(given)

    def _tell_of_kept(self, args: tuple[Any, ...]) -> None:
        """Warn, once a weight, that the memory of a DTensor's shard is not freed."""
        for binding in self._only_swizzled:
            tensor = binding.take(args)[0]
            if not is_freed(tensor) and (mark := mark_of(tensor)).is_shard and not mark.kept:
                mark.kept = True
                warn_of_kept_shard(binding.name)

    def _is_kept(self, binding: Binding, args: tuple[Any, ...]) -> bool:
        """Return whether a linear's weight stays because something else may read it."""
        weights = binding.take(args) if binding.encoding.of_linears else ()
        kept = [weight for weight in weights if self._is_shared(weight)]
        for weight in kept:
            mark_of(weight).kept = True  # the next call need not look again
        return bool(kept)

    def _is_needed(self, binding: Binding, inputs: tuple[Any, ...]) -> bool:
        """Return whether a real weight is to be swizzled for the first call."""
        tensors = binding.take(inputs)
        if not all(_is_real(tensor) for tensor in tensors):
            return False
        with torch_private.as_plain_tensors():
            return STORE.find(tensors, binding.encoding, binding.layout) is None

    def _is_paged(
        self, binding: Binding, inputs: tuple[Any, ...], files: Sequence[MappedFile]
    ) -> bool:
        """Return whether :meth:`free` will free a weight whose memory is a file's."""
        source = binding.source(inputs)
        return (
            binding in self._only_swizzled
            and not any(map(is_freed, source.tensors))
            and all(mapped.is_mapped(tensor, files) for tensor in source.tensors)
            and STORE.can_free(source, binding.layout)
            and not any(map(self._is_lent, source.tensors))
            and not self._is_kept(binding, inputs)
        )

    def _look_up(self, args: tuple[Any, ...]) -> list[Parts]:
        find = STORE.find
        return [
            find(take(args), encoding, layout)
            or STORE.get(binding.source(args), layout, binding.name)
            for take, encoding, layout, binding in self._lookups
        ]

    def _look_out(self, args: tuple[Any, ...]) -> None:
        """Warn if each call has new tensors, and those of the one before are gone after one call.

        Each caller is looked at by itself. Callers that share the graph may follow one another or
        take turns, as layers do that are compiled one by one, and a caller may get other weights.
        """
        if all(binding.layout in binding.encoding.layouts for binding in self.bindings):
            return  # the kernels read them as they are
        caller = self._caller()
        known = self._of_nobody
        if caller is not None:
            known = self._lookouts.setdefault(caller, _Lookout())
        marks = [mark_of(args[binding.slots[0]]) for binding in self.bindings]
        strangers = known.follow(marks)
        if strangers >= 2 and self._is_lent(args[self.bindings[0].slots[0]]):
            self._tell_of_lent()
        elif strangers == 2:
            warn_of_repeats(
                self.bindings[0].name,
                "every call brings another tensor, and the last one is gone",
            )


class _Lookout:
    """The marks of a caller's last call that swizzled, for the caller's next one.

    Attributes:
        strangers: how many such calls in a row have found the marks of the one before gone.
    """

    def __init__(self) -> None:
        self._last: list[tuple[weakref.ref[Mark], Trace]] = []
        self.strangers = 0

    def follow(self, marks: Iterable[Mark]) -> int:
        """Note the marks of a call that swizzled; return ``strangers``."""
        are_gone = bool(self._last) and all(
            mark() is None and not trace.was_found for mark, trace in self._last
        )
        self.strangers = self.strangers + 1 if are_gone else 0
        self._last = [(weakref.ref(mark), mark.trace) for mark in marks]
        return self.strangers


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, torch_private.FakeTensor)


def _is_native(binding: Binding, inputs: tuple[Any, ...]) -> bool:
    devices = {tensor.device.type for tensor in binding.take(inputs)}
    return devices == {"cpu"} and is_native(binding.encoding, binding.layout, "cpu")
