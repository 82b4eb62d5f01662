"""Aliases in a graph, and the calls that may write to their memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.torch_private import FakeTensor, is_wrapper
from mxfp4_fx.core.torch_private_distributed import is_dtensor, shard_of
from mxfp4_fx.passes.effects import Effect, Modes, effect
from mxfp4_fx.passes.regions import region_of


def tensors_in(node: fx.Node) -> Iterator[Tensor]:
    """Yield the fake tensors of a node's result: one, or those of a tuple."""
    value = node.meta.get("example_value")
    for leaf in value if isinstance(value, list | tuple) else (value,):
        if isinstance(leaf, Tensor):
            yield leaf


def storages(node: fx.Node) -> set[object]:
    """Return the keys of a node's memory. Nodes that may alias share a key or have UNKNOWN.

    Dynamo propagates fake tensors, and a view's fake tensor shares its base's storage.
    """
    return {_storage(t) for t in tensors_in(node) if t.layout is torch.strided}


# The keys of memory that cannot be identified. UNKNOWN: the value is inside a function transform
# such as vmap. ANY: the graph gives the value other memory.
UNKNOWN, ANY = "unknown", "any"


def _storage(value: Tensor) -> object:
    if is_transformed(value):
        return UNKNOWN
    return torch_private.storage_key(value)


def is_transformed(value: Tensor) -> bool:
    """Return whether a value is inside a function transform (``torch.func``: vmap, grad)."""
    return bool(torch_private.is_transformed(value))


class Memory:
    """The memory of each value in a graph, and the calls that may write to it.

    Dynamo records one fake tensor for each value, in the state at the end of the graph. A value
    that a call reshapes in place (``t_``) had another shape before, and one that a call repoints
    (``set_``) had other memory.

    Attributes:
        writes: each call that may write, in order, with the keys of its arguments' memory.
        writes_outside: for the graph of a region, each call outside of it that may write to one of
            its inputs, with the keys of that input's memory, and whether it comes later.
    """

    def __init__(
        self, graph: fx.Graph, inputs: Mapping[fx.Node, Any], around: Around | None = None
    ) -> None:
        """
        Args:
            inputs: the graph's inputs -> their values.
            around: what the inputs are outside, if the graph is that of a region.
        """
        # Two inputs have different fake storages even if they share real memory, as a parameter and
        # a view of it do, or two tensors of one numpy array. So the real memory is a second key.
        self._shared: dict[object, object] = {}
        held = {node: shard_of(v) if is_dtensor(v) else v for node, v in inputs.items()}
        areas = _areas([value for value in held.values() if _has_memory(value)])
        for node, value in held.items():
            if _has_memory(value):
                self._shared |= {key: ("input", areas[id(value)]) for key in storages(node)}
        effects = effects_on(graph)
        self._reshaped = _touched(effects, Effect.RESHAPES)
        self._repointed = _touched(effects, Effect.REPOINTS)
        self.writes_outside: list[tuple[fx.Node, set[object], bool]] = []
        if around is not None:
            self._add_outside([*inputs], around)
        self.writes = [
            (node, self._written(on))
            for node, on in effects.items()
            if any(what & (Effect.WRITES | Effect.UNKNOWN) for what in on.values())
        ]

    def _add_outside(self, inputs: list[fx.Node], around: Around) -> None:
        for node, memory, reshaper in zip(inputs, around.memory, around.reshapers, strict=True):
            self._shared |= dict.fromkeys(storages(node), ("outside", memory))
            for value in tensors_in(node):
                if reshaper is not None:
                    self._reshaped.setdefault(id(value), reshaper)
                if memory is None:
                    self._repointed.setdefault(id(value), node)
        for writer, at, later in around.writes:
            self.writes_outside.append((writer, self.of(inputs[at]), later))

    def _written(self, on: dict[fx.Node, Effect]) -> set[object]:
        written: set[object] = set()
        for argument, what in on.items():
            # A transform has many calls, and nearly all only read. So UNKNOWN memory counts as
            # written only if the call certainly writes.
            if what & Effect.WRITES:
                written |= self.of(argument)
            elif what & Effect.UNKNOWN:
                written |= self.of(argument) - {UNKNOWN}
        return written

    def of(self, node: fx.Node) -> set[object]:
        """Return the keys of a node's memory."""
        if any(id(value) in self._repointed for value in tensors_in(node)):
            return {ANY}
        keys = storages(node)
        return keys | {self._shared[key] for key in keys if key in self._shared}

    def reshaper(self, node: fx.Node) -> fx.Node | None:
        """Return the call that reshapes a node's value in place, if there is one."""
        found = (self._reshaped.get(id(value)) for value in tensors_in(node))
        return next((call for call in found if call is not None), None)


Effects = dict[fx.Node, dict[fx.Node, Effect]]


def effects_on(graph: fx.Graph) -> Effects:
    """Return each call of a graph -> what it may do in place to each of its arguments."""
    bodies: dict[fx.GraphModule, list[Effect]] = {}
    return {node: _effects_of(node, bodies) for node in graph.nodes}


def _effects_of(node: fx.Node, bodies: dict[fx.GraphModule, list[Effect]]) -> dict[fx.Node, Effect]:
    region = region_of(node)
    if region is None:
        what = effect(node)
        return dict.fromkeys(node.all_input_nodes, what) if what else {}
    if region.body not in bodies:
        bodies[region.body] = _effects_on_inputs(region.body.graph)
    found: dict[fx.Node, Effect] = {}
    for operand, what in zip(region.operands, bodies[region.body], strict=True):
        if isinstance(operand, fx.Node) and what:
            found[operand] = found.get(operand, Effect.READS) | what
    return found


def needed(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that the result or a side effect depends on.

    Compilers drop the others, which no call with needed ones may keep alive: in the pieces of a
    layer, q or k and v (``huggingface/regions.py``).
    """
    effects = effects_on(graph)
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in found or any(effects[node].values()):
            found.update((node, *node.all_input_nodes))
    return found


def _effects_on_inputs(graph: fx.Graph) -> list[Effect]:
    """Return what a graph may do in place to each of its inputs."""
    memory = Memory(graph, {})
    inputs = {node: memory.of(node) for node in graph.find_nodes(op="placeholder")}
    found = dict.fromkeys(inputs, Effect.READS)
    for effects in effects_on(graph).values():
        for argument, what in effects.items():
            touched = memory.of(argument) - (set() if what & Effect.WRITES else {UNKNOWN})
            for node, mine in inputs.items():
                if may_share(mine, touched):
                    found[node] |= what
    return [*found.values()]


def _touched(effects: Effects, what: Effect) -> dict[int, fx.Node]:
    """Map the id of a fake tensor to the last call that may do ``what`` to it."""
    return {
        id(value): node
        for node, on in effects.items()
        for argument, found in on.items()
        if found & what
        for value in tensors_in(argument)
    }


@dataclasses.dataclass(frozen=True)
class Around:
    """What the inputs of a region are outside of it, in the order of the inputs.

    Regions whose ``Around`` is equal are alike for all that the passes ask.

    Attributes:
        modes: torch's modes where the region is called.
        memory: for each input a number that inputs share if their memory may overlap; None if an
            input's memory is not known.
        reshapers: for each input the call outside that changes its shape in place, or None.
        writes: each call outside that may write to an input, that input's position, and whether the
            call comes after the region.
    """

    modes: Modes
    memory: tuple[int | None, ...]
    reshapers: tuple[fx.Node | None, ...]
    writes: tuple[tuple[fx.Node, int, bool], ...]


def may_share(a: set[object], b: set[object]) -> bool:
    """Return whether memory with the keys ``a`` may overlap memory with the keys ``b``."""
    unknown = {ANY, UNKNOWN}
    return not (a.isdisjoint(b) and unknown.isdisjoint(a) and unknown.isdisjoint(b))


def _has_memory(value: object) -> bool:
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return False
    return value.layout is torch.strided and not is_wrapper(value)


def _areas(values: list[Tensor]) -> dict[int, int]:
    """Map the id of a tensor to the number of its area; storages that overlap are one area."""
    spans = sorted(
        (value.device.type, value.device.index or 0, s.data_ptr(), s.data_ptr() + s.nbytes(), at)
        for at, value in enumerate(values)
        for s in (value.untyped_storage(),)
    )
    found: dict[int, int] = {}
    area, end, device = 0, 0, None
    for *where, start, stop, at in spans:
        if where != device or start >= end:
            area, end, device = area + 1, stop, where
        end = max(end, stop)
        found[id(values[at])] = area
    return found
