"""Graphs as text for people: a line for each node, with what it gives and the code that made it."""

from __future__ import annotations

import collections
import dataclasses
import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from mxfp4_fx.core.torch_private import OpOverload
from mxfp4_fx.passes.origin import module_name, source_line

# What Dynamo puts into the names of inputs, and named_modules does not.
_STEPS = re.compile(r"_(?:modules|parameters|buffers)_")
_SIGNS = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//"}


@dataclasses.dataclass(frozen=True)
class Line:
    """One node of a graph.

    Attributes:
        text: the node as a statement of Python.
        value: dtype and shape of what it gives, or "".
        layer: the name of the module that made it, or "".
        where: the line of code that made it, as ``file:line: code``, or "".
    """

    text: str
    value: str = ""
    layer: str = ""
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Listing:
    """A graph, or the body of a region in it: its name and its nodes in order."""

    name: str
    lines: tuple[Line, ...]


@dataclasses.dataclass(frozen=True)
class GraphChange:
    """A captured graph before and after the passes, each with the bodies of its regions."""

    before: tuple[Listing, ...]
    after: tuple[Listing, ...]

    @classmethod
    def of(cls, before: fx.GraphModule, after: fx.GraphModule) -> GraphChange:
        """Write two graphs down. The result holds text alone: no graph, no tensor."""
        first = tuple(list_graphs(before))
        return cls(first, first if after is before else tuple(list_graphs(after)))


def list_graphs(gm: fx.GraphModule, name: str = "graph") -> Iterator[Listing]:
    """Yield a graph and the graphs that it calls, each once."""
    todo, seen = [(name, gm)], {id(gm)}
    while todo:
        name, gm = todo.pop(0)
        names = _short_names(gm.graph)
        yield Listing(name, tuple(_line(node, names) for node in gm.graph.nodes))
        for node in gm.graph.find_nodes(op="get_attr"):
            body = getattr(gm, str(node.target), None)
            if isinstance(body, fx.GraphModule) and id(body) not in seen:
                seen.add(id(body))
                todo.append((str(node.target), body))


class _Word(str):
    """Text that stands in an argument list without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _short_names(graph: fx.Graph) -> dict[fx.Node, _Word]:
    """Name inputs as ``named_parameters`` does, as far as the names stay different."""
    names = {node: node.name for node in graph.nodes}
    short = {
        node: _STEPS.sub(".", node.name.removeprefix("l_self")).strip("._")
        for node in graph.find_nodes(op="placeholder")
    }
    others = [name for node, name in names.items() if node not in short]
    taken = collections.Counter([*others, *short.values()])
    chosen = names | {node: name for node, name in short.items() if taken[name] == 1}
    return {node: _Word(name) for node, name in chosen.items()}


def _line(node: fx.Node, names: dict[fx.Node, _Word]) -> Line:
    name = names[node]
    if node.op == "placeholder":
        return Line(f"input {name}", _value(node.meta.get("example_value")))
    layer = module_name(node) if node.meta.get("nn_module_stack") else ""
    args: Any = map_arg(node.args, names.__getitem__)
    kwargs: Any = map_arg(node.kwargs, names.__getitem__)
    given = [repr(arg) for arg in args] + [f"{key}={arg!r}" for key, arg in kwargs.items()]
    if node.op == "output":
        return Line(f"return {', '.join(given)}")
    if node.op == "get_attr":
        text = f"self.{node.target}"
    elif node.op == "call_method":
        text = f"{given[0]}.{node.target}({', '.join(given[1:])})"
    elif node.target is operator.getitem:
        text = f"{given[0]}[{_index(args[1])}]"
    elif node.target in _SIGNS and len(given) == 2:
        text = f"{given[0]} {_SIGNS[node.target]} {given[1]}"
    else:
        text = f"{_callee(node.target)}({', '.join(given)})"
    return Line(
        f"{name} = {text}", _value(node.meta.get("example_value")), layer, source_line(node)
    )


def _index(index: Any) -> str:
    if isinstance(index, tuple):
        return ", ".join(map(_index, index))
    if isinstance(index, slice):
        ends = ("" if end is None else str(end) for end in (index.start, index.stop))
        return ":".join(ends) + ("" if index.step is None else f":{index.step}")
    return "..." if index is Ellipsis else repr(index)


def _callee(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        sizes = ", ".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(filter(None, map(_value, value)))})"
    return "int" if isinstance(value, torch.SymInt) else ""
