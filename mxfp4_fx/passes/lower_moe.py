"""Fourth pass: lower logical ops to device ops, and expert weights to swizzled MXFP4 inputs.

``mxfp4::moe`` -> ``routing`` -> ``matmul_ogs`` (SwiGLU) -> ``matmul_ogs`` (gammas, scatter). The
parameters that only the experts read leave the graph's inputs; in their place come blocks and
scales, which are bound when the graph is called (``weights/bindings.py``).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.layouts import STORED_LAYOUTS
from mxfp4_fx.core.orders import GPT_OSS, Order
from mxfp4_fx.ops.target import Target
from mxfp4_fx.passes.context import REWRITE, Context
from mxfp4_fx.passes.graph import known_tensor
from mxfp4_fx.weights.bindings import Binding
from mxfp4_fx.weights.source import Encoding, encoding_of

_MXFP4 = torch.ops.mxfp4
_NAMES = ("gate_up", "down")


def lower_moe(gm: fx.GraphModule, ctx: Context) -> None:
    """Expand every ``mxfp4::moe`` for its device; report it with kernels, layout and bytes."""
    ctx.slots(gm.graph)  # before inputs come and go
    # A node without REWRITE is one that the model itself calls. Nothing is proven about it.
    for node in [node for node in gm.graph.nodes if REWRITE in node.meta]:
        rewrite = node.meta.pop(REWRITE)
        values = _arguments(node)
        chosen = ctx.target_for(known_tensor(node).device)
        gate_up, down = (_projection(name, values, rewrite.layer, chosen, ctx) for name in _NAMES)
        lower = _rebind if node.target is _MXFP4.moe.adapted else _expand
        lower(node, values, gate_up, down, chosen.kernels)
        parts = *gate_up.parts, *down.parts
        lowered = dataclasses.replace(
            rewrite,
            kernels=chosen.kernels,
            layout=gate_up.layout,
            reason=chosen.reason,
            bytes_after=sum(known_tensor(part).numel() for part in parts),
        )
        ctx.report.rewrites.append(lowered)
    erase_unread(gm.graph, ctx)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return all arguments of a logical op, defaults included."""
    assert isinstance(node.target, torch_private.OpOverload)
    arguments = torch_private.schema_of(node.target).arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False))
    defaults = {argument.name: argument.default_value for argument in arguments}
    return GPT_OSS._asdict() | defaults | given | node.kwargs


class _Projection(NamedTuple):
    """One lowered weight of the experts.

    Attributes:
        parts: the graph's inputs that are its swizzled blocks and scales.
        layout: their layout.
        bias: [E, N] in the order of the kernels, or None.
        n: N.
    """

    parts: tuple[fx.Node, fx.Node]
    layout: str
    bias: fx.Node | None
    n: int


def _projection(
    name: str, values: dict[str, Any], layer: str, chosen: Target, ctx: Context
) -> _Projection:
    """Bind one weight of a logical op, whose arguments are ``values``."""
    weight, scales, bias = (values[f"{name}{part}"] for part in ("", "_scales", "_bias"))
    held = (weight,) if scales is None else (weight, scales)
    # Only gate_up can have gate and up one behind the other.
    is_concatenated = values["is_concatenated"] and name == "gate_up"
    order = Order(values["is_transposed"], is_concatenated)
    encoding = encoding_of(order, None if scales is None else values["layout"])
    layout = chosen.layout_of(encoding.layouts)
    parts = swizzled_inputs(held, encoding, layout, f"{name}_proj of {layer}", ctx)
    _, n, _ = encoding.sizes(tuple(map(known_tensor, held)))
    return _Projection(parts, layout, bias, n)


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
    key = held, encoding, layout
    if key not in ctx.swizzled:
        parts = ctx.swizzled[key] = _new_inputs(held, encoding, layout)
        slots = ctx.slots(held[0].graph)
        at = tuple(slots[one] for one in held)
        ctx.bindings.append(Binding(at, encoding, layout, (parts[0].name, parts[1].name), name))
    return ctx.swizzled[key]


def erase_unread(graph: fx.Graph, ctx: Context) -> None:
    """Erase the captured inputs that are read swizzled only."""
    present = set(graph.find_nodes(op="placeholder"))
    for source in dict.fromkeys(source for held, _, _ in ctx.swizzled for source in held):
        if source in present and not source.users:
            graph.erase_node(source)


def _new_inputs(
    held: tuple[fx.Node, ...], encoding: Encoding, layout: str
) -> tuple[fx.Node, fx.Node]:
    first = held[0]
    fakes = tuple(map(known_tensor, held))
    with fakes[0].fake_mode:  # type: ignore[attr-defined]
        parts = STORED_LAYOUTS[layout].empty(*encoding.sizes(fakes), fakes[0].device)
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


def _rebind(
    node: fx.Node,
    values: dict[str, Any],
    gate_up: _Projection,
    down: _Projection,
    chosen: str,
) -> None:
    """Let experts with adapters read swizzled weights. Compilers expand the op by themselves."""
    swizzled = {"gate_up": gate_up, "down": down}
    for name, weight in swizzled.items():
        values[name], values[f"{name}_scales"] = weight.parts
    values |= {"layout": gate_up.layout, "kernels": chosen}
    names = [argument.name for argument in torch_private.schema_of(_MXFP4.moe.adapted).arguments]
    node.args, node.kwargs = tuple(values[name] for name in names), {}


def _expand(
    node: fx.Node,
    values: dict[str, Any],
    gate_up: _Projection,
    down: _Projection,
    chosen: str,
) -> None:
    graph = node.graph
    kernels = {"kernels": chosen}
    first, experts = values["first_expert"], int(known_tensor(values["gate_up"]).shape[0])

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
        gate_up_bias = gate_up.bias
        if gate_up_bias is not None and values["is_concatenated"]:
            pairs = call(torch.unflatten, gate_up_bias, 1, (2, -1))  # as orders.alternate
            gate_up_bias = call(torch.flatten, call(torch.transpose, pairs, 1, 2), 1)
        inner = call(
            _MXFP4.matmul_ogs.default,
            values["hidden"],
            *gate_up.parts,
            gate_up_bias,
            gate_up.n,
            offsets,
            gather_index=gather_index,
            **{name: values[name] for name in ("activation", "alpha", "limit", "up_offset")},
            layout=gate_up.layout,
            **kernels,
        )
        out = call(
            _MXFP4.matmul_ogs.default,
            inner,
            *down.parts,
            down.bias,
            down.n,
            offsets,
            scatter_index=scatter_index,
            gammas=gammas,
            experts_per_token=top_k,
            layout=down.layout,
            **kernels,
        )
    node.replace_all_uses_with(out)
    graph.erase_node(node)
