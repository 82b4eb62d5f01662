"""Regions: the calls of a graph that run another graph, their *body*, on their operands.

Nested compile regions and activation checkpoints are regions. A body is a submodule of the graph's
module, and many calls may share one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx

from mxfp4_fx.core import torch_private


@dataclasses.dataclass(frozen=True)
class Region:
    """One call of a body.

    Attributes:
        call: the call in the outer graph.
        body: the graph that it runs.
        operands: the values of the body's inputs, in order: nodes of the outer graph, or numbers.
    """

    call: fx.Node
    body: fx.GraphModule
    operands: tuple[Any, ...]


def region_of(node: fx.Node) -> Region | None:
    """Return the region that a node calls, or None if the passes do not enter what it calls."""
    first = torch_private.first_operand(node.target)
    body = _body(node.args[0]) if first is not None and node.args else None
    if body is None:
        return None
    operands = tuple(node.args[first:])
    inputs = body.graph.find_nodes(op="placeholder")
    return Region(node, body, operands) if len(operands) == len(inputs) else None


def unsearched(graph: fx.Graph) -> Iterator[fx.GraphModule]:
    """Yield the graphs that a graph calls in other ways than as a region's body."""
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        body = _body(node)
        if body is not None and any(region_of(user) is None for user in node.users):
            yield body


def _body(node: Any) -> fx.GraphModule | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner = node.graph.owning_module
    value = getattr(owner, str(node.target), None) if owner is not None else None
    return value if isinstance(value, fx.GraphModule) else None
