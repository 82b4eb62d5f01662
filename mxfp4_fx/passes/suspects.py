"""Suspects: the calls that look like experts before matching. Each is rewritten or reported."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mxfp4_fx.passes.checks import is_parameter
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.graph import op_name
from mxfp4_fx.passes.memory import tensors_in
from mxfp4_fx.passes.origin import module_name, source_line
from mxfp4_fx.passes.regions import unsearched
from mxfp4_fx.passes.report import Miss

# The logical ops, where a model calls them itself.
LOGICAL = {"mxfp4.moe", "mxfp4.moe.routes", "mxfp4.moe.adapted"}
_MATMULS = {"grouped_mm", "bmm", "matmul", "baddbmm", "einsum", "mxfp4.matmul_ogs", *LOGICAL}


Inputs = frozenset[int]


def find_suspects(
    gm: fx.GraphModule, ctx: Context
) -> tuple[dict[fx.Node, str], dict[str, tuple[int, ...]], list[Miss]]:
    """Find every matmul with a parameter of stacked matrices, and every grouped matmul.

    Returns:
        The suspects of the graph itself -> their modules' names; a module's name -> the graph's
        inputs that its suspects read; and a miss for each module that has suspects in the subgraphs
        of higher-order ops that the passes do not enter.
    """
    parameters: list[tuple[fx.Node, Inputs]] = [
        (node, Inputs({at}))
        for node, at in ctx.slots(gm.graph).items()
        if is_parameter(node, ctx.value(at))
    ]
    # Parameters are attributes of the graph if an option of Dynamo keeps it from lifting them.
    parameters += [(node, Inputs()) for node in gm.graph.find_nodes(op="get_attr")]
    # A value is the same fake tensor in the graph and in the subgraphs that take it as an input.
    weights = {id(v): at for node, at in parameters for v in tensors_in(node) if _is_stack(v)}
    reason = (
        "it is inside a subgraph (the branch of a condition, or the body of a loop or of an "
        "autograd.Function), which is not searched"
    )
    inputs: dict[str, Inputs] = {}
    suspects: dict[fx.Node, str] = {}
    for node, (layer, read) in _multiplied(gm.graph, weights).items():
        suspects[node] = layer
        inputs[layer] = inputs.get(layer, Inputs()) | read
    misses: dict[str, Miss] = {}
    for body in unsearched(gm.graph):
        for module in body.modules():
            if not isinstance(module, fx.GraphModule):
                continue
            for node, (layer, read) in _multiplied(module.graph, weights).items():
                misses.setdefault(layer, Miss(layer, reason, source_line(node)))
                inputs[layer] = inputs.get(layer, Inputs()) | read
    return suspects, {layer: tuple(sorted(at)) for layer, at in inputs.items()}, [*misses.values()]


def _is_stack(value: Tensor) -> bool:
    return value.ndim in ((3, 4) if value.dtype == torch.uint8 else (3,))


def _multiplied(graph: fx.Graph, weights: dict[int, Inputs]) -> dict[fx.Node, tuple[str, Inputs]]:
    """Find the matmuls that read one of ``weights``, or a part or a copy of one, and grouped ones.

    The result of a call joins ``weights`` if a weight is the only tensor of numbers that the call
    reads: ``weight[expert_ids]``, ``weight.to_local()``, a collective.

    Args:
        graph: the graph, or a subgraph.
        weights: id of a fake tensor -> the graph's inputs that it comes from.

    Returns:
        Matmul -> the name of its module, and the graph's inputs that its weights come from.
    """
    found: dict[fx.Node, tuple[str, Inputs]] = {}
    for node in graph.nodes:
        read = [v for value in node.all_input_nodes for v in tensors_in(value) if _has_numbers(v)]
        held = [weights[id(value)] for value in read if id(value) in weights]
        inputs = Inputs().union(*held)
        name = op_name(node)
        if name == "grouped_mm" or (name in _MATMULS and held):
            found[node] = (module_name(node), inputs)
        elif held and len({id(value) for value in read}) == 1:
            weights |= {id(value): inputs for value in tensors_in(node)}
    return found


def _has_numbers(value: Tensor) -> bool:
    return value.is_floating_point() or value.dtype == torch.uint8
