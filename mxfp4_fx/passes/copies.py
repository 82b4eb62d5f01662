"""Copies of graphs, which passes may change."""

from __future__ import annotations

from torch import fx

from mxfp4_fx.core import torch_private


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph module: a new graph, the same submodules, and what Dynamo recorded on it."""
    graph = torch_private.empty_graph_like(gm.graph)
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    old_output, output = (g.output_node() for g in (gm.graph, graph))
    output.meta = dict(old_output.meta)
    copy = torch_private.LazyGraphModule(gm, graph)  # passes change it before anyone calls it
    copy.meta = dict(gm.meta)
    torch_private.copy_notes(gm, copy, copies)
    return copy
