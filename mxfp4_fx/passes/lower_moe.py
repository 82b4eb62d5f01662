"""Fourth pass: lower logical ops to device ops, and expert weights to swizzled MXFP4 inputs.

``mxfp4::moe`` -> ``routing`` -> ``matmul_ogs`` (SwiGLU) -> ``matmul_ogs`` (gammas, scatter). The
parameters that only the experts read leave the graph's inputs; in their place come blocks and
scales, which are bound when the graph is called (``weights/bindings.py``).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.layouts import LAYOUTS
from mxfp4_fx.passes.context import REWRITE, Context
from mxfp4_fx.passes.graph import known_tensor
from mxfp4_fx.weights.bindings import Binding
from mxfp4_fx.weights.source import FLOATS, PACKED, Encoding

_MXFP4 = torch.ops.mxfp4


def lower_moe(gm: fx.GraphModule, ctx: Context) -> None:
    """Expand every ``mxfp4::moe`` for its device; report it with kernels, layout and bytes."""
    ctx.slots(gm.graph)  # before inputs come and go
    # A node without REWRITE is one that the model itself calls. Nothing is proven about it.
    for node in [node for node in gm.graph.nodes if REWRITE in node.meta]:
        rewrite = node.meta.pop(REWRITE)
        values = _arguments(node)
        chosen = ctx.target_for(known_tensor(node).device)
        found = []
        for name in ("gate_up", "down"):
            weight, scales = values[name], values.get(f"{name}_scales")
            held: tuple[fx.Node, ...] = (weight,)
            encoding: Encoding = FLOATS
            if scales is not None:
                held, encoding = (weight, scales), PACKED[values["layout"]]
            layout = chosen.layout_of(encoding.layouts)
            full_name = f"{name}_proj of {rewrite.layer}"
            found.append(swizzled_inputs(held, encoding, layout, full_name, ctx))
        gate_up, down = found
        _expand(node, values, gate_up, down, chosen.kernels, layout)
        lowered = dataclasses.replace(
            rewrite,
            kernels=chosen.kernels,
            layout=layout,
            reason=chosen.reason,
            bytes_after=sum(known_tensor(part).numel() for part in (*gate_up, *down)),
        )
        ctx.report.rewrites.append(lowered)
    erase_unread(gm.graph, ctx)


def _arguments(node: fx.Node) -> dict[str, Any]:
    assert isinstance(node.target, torch_private.OpOverload)
    names = (argument.name for argument in torch_private.schema_of(node.target).arguments)
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def swizzled_inputs(
    held: tuple[fx.Node, ...], encoding: Encoding, layout: str, name: str, ctx: Context
) -> tuple[fx.Node, fx.Node]:
    """Return the graph's inputs for the swizzled blocks and scales of a weight; bind new ones.

    Args:
        held: the captured inputs that are the weight's tensors. New inputs come behind them.
        encoding: how these hold the weight.
        layout: the layout that the graph reads.
        name: the weight's name, for users.
        ctx: gets the binding.
    """
    if (held, layout) not in ctx.swizzled:
        parts = ctx.swizzled[held, layout] = _new_inputs(held, encoding, layout)
        slots = ctx.slots(held[0].graph)
        at = tuple(slots[one] for one in held)
        ctx.bindings.append(Binding(at, encoding, layout, (parts[0].name, parts[1].name), name))
    return ctx.swizzled[held, layout]


def erase_unread(graph: fx.Graph, ctx: Context) -> None:
    """Erase the captured inputs that are read swizzled only."""
    present = set(graph.find_nodes(op="placeholder"))
    for source in dict.fromkeys(source for held, _ in ctx.swizzled for source in held):
        if source in present and not source.users:
            graph.erase_node(source)


def _new_inputs(
    held: tuple[fx.Node, ...], encoding: Encoding, layout: str
) -> tuple[fx.Node, fx.Node]:
    first = held[0]
    fakes = tuple(map(known_tensor, held))
    with fakes[0].fake_mode:  # type: ignore[attr-defined]
        parts = LAYOUTS[layout].empty(*encoding.sizes(fakes), fakes[0].device)
    nodes = []
    after = first
    for end, value in zip(("blocks", "scales"), parts, strict=True):
        with first.graph.inserting_after(after):
            stem = first.name.rstrip("_").removesuffix("_blocks")
            node = first.graph.placeholder(f"{stem}_{end}")
        # Two weights with the same blocks give the same stem; only the node's name is unique.
        node.target = node.name
        node.meta["example_value"] = value
        torch_private.note_as_weight(node)
        nodes.append(after := node)
    return nodes[0], nodes[1]


def _expand(
    node: fx.Node,
    values: dict[str, Any],
    gate_up: tuple[fx.Node, fx.Node],
    down: tuple[fx.Node, fx.Node],
    chosen: str,
    layout: str,
) -> None:
    graph = node.graph
    kernels = {"kernels": chosen}
    matmul = {**kernels, "layout": layout}
    first, experts = values.get("first_expert", 0), int(known_tensor(values["gate_up"]).shape[0])

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(function, args, kwargs)
        made.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        fakes = fx.node.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        # The graph may switch gradients off around the experts, so the node's own mode is set.
        # Hooks on saved tensors must not run now: activation checkpointing counts their calls.
        recorded = torch.set_grad_enabled(known_tensor(node).requires_grad)
        unhooked = torch_private.without_saved_tensor_hooks()
        with recorded, unhooked, known_tensor(node).fake_mode:  # type: ignore[attr-defined]
            made.meta["example_value"] = function(*fakes[0], **fakes[1])
        return made

    with graph.inserting_before(node):
        if node.target is _MXFP4.moe.default:
            top_k, logits = values["top_k"], values["router_logits"]
            is_whole = (first, experts) == (0, known_tensor(logits).shape[1])
            here = [] if is_whole else [first, experts]
            routes = call(_MXFP4.routing.default, logits, top_k, *here, **kernels)
        else:
            top_k = int(known_tensor(values["indices"]).shape[1])
            given = values["indices"], values["weights"]
            here = [experts, first] if first else [experts]
            routes = call(_MXFP4.routing.routes, *given, *here, **kernels)
        gammas, gather_index, scatter_index, offsets = (
            call(operator.getitem, routes, i) for i in range(4)
        )
        inner = call(
            _MXFP4.matmul_ogs.default,
            values["hidden"],
            *gate_up,
            values["gate_up_bias"],
            int(known_tensor(values["gate_up_bias"]).shape[1]),
            offsets,
            gather_index=gather_index,
            activation="swiglu",
            alpha=values["alpha"],
            limit=values["limit"],
            **matmul,
        )
        out = call(
            _MXFP4.matmul_ogs.default,
            inner,
            *down,
            values["down_bias"],
            int(known_tensor(values["down_bias"]).shape[1]),
            offsets,
            scatter_index=scatter_index,
            gammas=gammas,
            experts_per_token=top_k,
            **matmul,
        )
    node.replace_all_uses_with(out)
    graph.erase_node(node)
