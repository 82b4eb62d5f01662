"""Numbers that a graph gives its regions, in the form that Inductor can take.

Dynamo learns while it captures that two sizes are equal, and then has one symbol for both. Inductor
names a region's inputs by the symbols that they were made as, and does not find the one that the
sizes of tensors have. A symbolic float is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import SymFloat, fx

from mxfp4_fx.core import torch_private_capture
from mxfp4_fx.passes.regions import region_of


def settle_sizes(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Return a graph's example inputs, sizes in the symbols in use, if it has nested regions.

    Regions that take floats are inlined, in place.
    """
    calls = [n for n in gm.graph.nodes if n.target is torch_private_capture.invoke_subgraph()]
    if not calls:
        return list(inputs)
    for call in calls:
        region = region_of(call)
        if region is not None and any(map(_is_float, region.operands)):
            torch_private_capture.inline(gm, call)
            gm.recompile()
    return [torch_private_capture.settled(value) for value in inputs]


def _is_float(operand: Any) -> bool:
    if isinstance(operand, fx.Node):
        operand = operand.meta.get("example_value")
    return isinstance(operand, SymFloat | float)
