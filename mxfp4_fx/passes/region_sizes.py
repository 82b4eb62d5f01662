"""Numbers that a graph gives its regions, in the form that Inductor can take.

Dynamo learns while it captures that two sizes are equal, and then has one symbol for both. A region
may still be given the other. Inductor names a region's inputs by the symbols that they were made
as, and does not find the one that the sizes of tensors have. A symbolic float is refused.
"""

from __future__ import annotations

from typing import Any

from torch import SymFloat, fx

from mxfp4_fx.core import torch_private_capture
from mxfp4_fx.passes.regions import region_of


def settle_sizes(gm: fx.GraphModule) -> None:
    """Give each nested compile region sizes by the symbols in use; inline one that takes floats.

    The graph changes in place. It computes the same.
    """
    made: dict[Any, fx.Node] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        symbol = torch_private_capture.symbol(node.meta.get("example_value"))
        if symbol is not None:
            made.setdefault(symbol[0], node)
    is_changed = False
    for node in [n for n in gm.graph.nodes if n.target is torch_private_capture.invoke_subgraph()]:
        region = region_of(node)
        if region is None:
            continue
        if any(isinstance(_value(operand), SymFloat | float) for operand in region.operands):
            torch_private_capture.inline(gm, node)
            is_changed = True
            continue
        for operand in region.operands:
            symbol = torch_private_capture.symbol(_value(operand))
            used = made.get(symbol[1]) if symbol is not None and symbol[0] != symbol[1] else None
            if used is not None and used is not operand:
                node.replace_input_with(operand, used)
                is_changed = True
    if is_changed:
        gm.recompile()


def _value(operand: Any) -> Any:
    return operand.meta.get("example_value") if isinstance(operand, fx.Node) else operand
