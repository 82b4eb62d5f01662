"""The tensors of a graph that becomes a native program: where they lie, and how."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mxfp4_fx.ops.program import Builder, Place, Result

_aten = torch.ops.aten
# Ops whose results lie in the memory of their first operand.
VIEWS = {
    _aten.alias.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.view.default,
}


class NoProgram(Exception):
    """A graph cannot become a program; the message says why."""


class Memory(NamedTuple):
    """What one or more tensors lie in: an argument, or what an instruction writes.

    Attributes:
        place: where it begins.
        argument: the argument's number, or None.
        bytes: what an instruction writes; 0 for an argument.
    """

    place: Place
    argument: int | None
    bytes: int


class Value(NamedTuple):
    """A tensor with fixed sizes; its offset is in elements."""

    memory: Memory
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def place(self) -> Place:
        return self.memory.place.behind(self.offset * self.dtype.itemsize)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        return _lies_as(self.shape, self.stride, range(len(self.shape)))


class Values:
    """The values of a graph's nodes, as a program's instructions are added one after the other.

    Attributes:
        builder: of the program.
    """

    def __init__(self, nodes: Sequence[fx.Node], returned: Sequence[fx.Node]) -> None:
        """
        Args:
            nodes: the graph's, without its output.
            returned: those that it returns.
        """
        self.builder = Builder()
        # A node's value, or values; the argument's number, if it is no tensor with fixed sizes.
        self._known: dict[fx.Node, Any] = {}
        self._examples: dict[int, Any] = {}  # of the arguments
        self._owners = _owners(nodes)
        self._returned = {self._owners[node] for node in returned}
        self._last = {
            self._owners[read]: at for at, n in enumerate(nodes) for read in n.all_input_nodes
        }

    def of(self, node: Any) -> Value:
        """Return a node's value.

        Raises:
            NoProgram: it is no tensor with fixed sizes.
        """
        value = self._known.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(value, Value):
            raise NoProgram(f"{node} is no tensor with fixed sizes")
        return value

    def all_of(self, nodes: Sequence[Any]) -> list[Value]:
        return [self.of(node) for node in nodes]

    def place_of(self, node: fx.Node) -> Place:
        """Return where a tensor begins; its sizes may be symbolic if it is an argument."""
        known = self._known[node]
        return known.place if isinstance(known, Value) else Place(("pointer", known))

    def size(self, node: fx.Node, dim: int) -> int | Place:
        """Return a tensor's size along a dimension: a number, or the place of an argument's."""
        known = self._known[node]
        if isinstance(known, Value):
            return known.shape[dim]
        size = self._examples[known].shape[dim]
        return size if isinstance(size, int) else Place(("size", known, dim))

    def stride(self, node: fx.Node, dim: int) -> int | Place:
        """Return a tensor's stride along a dimension in the same way, in elements."""
        known = self._known[node]
        if isinstance(known, Value):
            return known.stride[dim]
        stride = self._examples[known].stride(dim)
        return stride if isinstance(stride, int) else Place(("stride", known, dim))

    def add_argument(self, node: fx.Node, number: int, example: Any) -> None:
        """Add an argument. The example says how it lies: passes may have replaced the node's."""
        self._known[node] = number
        self._examples[number] = example
        if not isinstance(example, Tensor):
            return
        if example.device.type != "cpu" or example.layout != torch.strided or example.is_neg():
            raise NoProgram("an argument is on another device, or is no plain tensor")
        if _has_fixed_sizes(example):
            memory = Memory(Place(("pointer", number)), number, 0)
            about = example.dtype, tuple(example.shape), example.stride()
            self._known[node] = Value(memory, 0, *about)

    def add_view(self, node: fx.Node) -> None:
        """Add a view, or several, of a tensor.

        Where it lies is computed from where its source does. The node's own fake value may be of
        another source, which a pass of Inductor has replaced by one that is equal to it.
        """
        source, *args = node.args
        value = self.of(source)
        tensor = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
        if any(isinstance(arg, fx.Node) for arg in args):
            raise NoProgram("a view has symbolic sizes")
        try:
            found = node.target(tensor, *args, **node.kwargs)  # type: ignore[operator]
        except RuntimeError as error:
            raise NoProgram(f"{node.target} would make no view") from error
        views = [
            Value(
                value.memory,
                value.offset + int(view.storage_offset()),
                value.dtype,
                tuple(view.shape),
                view.stride(),
            )
            for view in ([found] if isinstance(found, Tensor) else found)
        ]
        self._known[node] = views[0] if isinstance(found, Tensor) else views

    def add_item(self, node: fx.Node, source: fx.Node, index: int) -> None:
        """Add one of several values."""
        self._known[node] = self._known[source][index]

    def make(self, node: fx.Node) -> Value:
        """Add the value that an instruction for this node is to write."""
        made = self._make(node, node.meta["val"])
        self._known[node] = made
        return made

    def make_all(self, node: fx.Node) -> list[Value]:
        """Add the values that an instruction for this node is to write."""
        made = [self._make(node, fake) for fake in node.meta["val"]]
        self._known[node] = made
        return made

    def release(self, node: fx.Node, at: int) -> None:
        """Let the memory be used again of what the node, the ``at``-th, is the last to read."""
        for owner in {self._owners[each] for each in (node, *node.all_input_nodes)}:
            is_made = owner.op != "placeholder" and owner not in self._returned
            if is_made and self._last.get(owner, at) <= at:
                values = self._known[owner]
                for value in [values] if isinstance(values, Value) else values:
                    self.builder.release(value.memory.place, value.memory.bytes)

    def result(self, node: Any) -> Result:
        """Return what the program returns for a node.

        Raises:
            NoProgram: it is an argument, or lies in one.
        """
        value = self.of(node)
        if value.memory.argument is not None:
            raise NoProgram("it returns an argument, or a view of one")
        return Result(value.memory.place, value.shape, value.stride, value.offset)

    def _make(self, node: fx.Node, fake: Tensor) -> Value:
        if not _has_fixed_sizes(fake) or not fake.numel():
            raise NoProgram(f"{node.target} makes a tensor with symbolic sizes, or none")
        shape, stride = tuple(fake.shape), fake.stride()
        order = sorted(range(len(shape)), key=lambda dim: stride[dim], reverse=True)
        if fake.device.type != "cpu" or not _lies_as(shape, stride, order):
            raise NoProgram(f"{node.target} makes a tensor with holes, or on another device")
        size = fake.numel() * fake.dtype.itemsize
        if self._owners[node] in self._returned:
            place = self.builder.returned(shape, stride, fake.dtype)
        else:
            place = self.builder.allocate(size)
        return Value(Memory(place, None, size), 0, fake.dtype, shape, stride)


def _owners(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return, of each node, the one in whose memory its value lies."""
    owners: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source: Any = node.args[0] if node.target in (*VIEWS, operator.getitem) else node
        owners[node] = owners.get(source, node)
    return owners


def _has_fixed_sizes(fake: Tensor) -> bool:
    return all(isinstance(size, int) for size in (*fake.shape, *fake.stride()))


def _lies_as(shape: Sequence[int], stride: Sequence[int], order: Sequence[int]) -> bool:
    """Return whether a tensor lies without holes, its dimensions in this order."""
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1 and stride[dim] != expected:
            return False
        expected *= shape[dim]
    return True
