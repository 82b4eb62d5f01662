"""Aliases in a graph, and the calls that may write to their memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.torch_private import FakeTensor, is_wrapper
from mxfp4_fx.passes.effects import Effect, effect


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
    """

    def __init__(self, graph: fx.Graph, inputs: list[Any]) -> None:
        # Two inputs have different fake storages even if they share real memory, as a parameter and
        # a view of it do, or two tensors of one numpy array. So the real memory is a second key.
        self._shared: dict[object, object] = {}
        areas = _areas([value for value in inputs if _has_memory(value)])
        for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
            if _has_memory(value):
                self._shared |= {key: ("input", areas[id(value)]) for key in storages(node)}
        effects = {node: effect(node) for node in graph.nodes}
        self._reshaped = _touched(effects, Effect.RESHAPES)
        self._repointed = _touched(effects, Effect.REPOINTS)
        self.writes = [
            (node, self._given(node, what))
            for node, what in effects.items()
            if what & (Effect.WRITES | Effect.UNKNOWN)
        ]

    def _given(self, node: fx.Node, what: Effect) -> set[object]:
        given = {key for argument in node.all_input_nodes for key in self.of(argument)}
        # A transform has many calls, and nearly all only read. So UNKNOWN memory counts as written
        # only if the call certainly writes.
        return given if what & Effect.WRITES else given - {UNKNOWN}

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


def _touched(effects: dict[fx.Node, Effect], what: Effect) -> dict[int, fx.Node]:
    """Map the id of a fake tensor to the last call that may do ``what`` to it."""
    return {
        id(value): node
        for node, found in effects.items()
        if found & what
        for argument in node.all_input_nodes
        for value in tensors_in(argument)
    }


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
