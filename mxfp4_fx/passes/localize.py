"""First pass: let the graph take the shard of a DTensor where it reads nothing else of it.

Under expert and tensor parallelism a rank's part of a weight is the local tensor in a DTensor, and
the model calls ``to_local()`` to compute with it. That makes another view at each call. Where such
calls are all that a graph does with an input, the input becomes the local tensor itself: the
backend hands it over at each call (``weights/bindings.py``), and all other passes see a parameter.

A region that does only this with an operand is given the local tensor, too. Then ``to_local()`` has
moved to the graph around it, in which the pass goes on. In regions inside of regions it stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.torch_private_distributed import is_dtensor, shard_of, why_no_shard
from mxfp4_fx.passes.checks import is_parameter
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.copies import copy_graph
from mxfp4_fx.passes.effects import Effect
from mxfp4_fx.passes.graph import tensor_of
from mxfp4_fx.passes.memory import Effects, effects_on, tensors_in
from mxfp4_fx.passes.regions import region_of


def localize(gm: fx.GraphModule, ctx: Context) -> None:
    """Replace ``input.to_local()`` by the input; note which inputs are shards now."""
    wholes = {node: value for node, value in ctx.values(gm.graph).items() if is_dtensor(value)}
    if not wholes:
        return
    slots = ctx.slots(gm.graph)
    is_body = ctx.around is not None  # its calls give it DTensors, which this pass has left
    if not is_body:
        _call_before_regions(gm, ctx, wholes)
    effects = effects_on(gm.graph)
    for node, whole in wholes.items():
        calls = [user for user in node.users if _is_to_local(user)]
        reason = why_no_shard(whole) or _why_not(node, effects)
        if reason or is_body:
            reason = reason or "it is given to a region inside of another one"
            ctx.no_shards |= dict.fromkeys(calls, reason)
            continue
        is_weight = is_parameter(node, whole)
        _take_shard(node, calls)
        torch_private.note_on_weight(node, is_weight)
        ctx.shards[slots[node]] = shard_of(whole)


def _is_to_local(node: fx.Node) -> bool:
    """Return whether a node calls ``to_local()``, which may be told the placements of gradients."""
    is_method = node.op == "call_method" and node.target == "to_local"
    return is_method and len(node.args) == 1 and not node.kwargs


def _why_not(whole: fx.Node, effects: Effects) -> str:
    """Return why a graph's input cannot become its local tensor, or "" if it can."""
    for call in whole.users:
        if not _is_to_local(call):
            return f"the graph reads the DTensor itself, too, by {call}"
        for reader in call.users:
            if reader.op == "output":
                return "the graph returns its local tensor, which is a view of its own then"
            if effects[reader].get(call, Effect.READS) & (Effect.RESHAPES | Effect.REPOINTS):
                return f"{reader} changes the shape or the memory of its local tensor in place"
        if _wants_gradient(call) and any(map(_may_record, call.users)):
            return (
                "it requires a gradient, which MXFP4 experts do not have: run under "
                "torch.no_grad(), or freeze the experts with requires_grad_(False)"
            )
    return "" if whole.users else "nothing reads it"


def _wants_gradient(node: fx.Node) -> bool:
    return any(value.requires_grad for value in tensors_in(node))


def _may_record(reader: fx.Node) -> bool:
    return "example_value" not in reader.meta or _wants_gradient(reader)


def _take_shard(node: fx.Node, calls: Iterable[fx.Node]) -> None:
    """Give an input the type of its shard, and what reads its shard the input."""
    for call in calls:
        # The same object as in the graphs below, by which weights are followed into them.
        node.meta = {**node.meta, "example_value": tensor_of(call)}
        call.replace_all_uses_with(node)
        node.graph.erase_node(call)


def _call_before_regions(gm: fx.GraphModule, ctx: Context, wholes: dict[fx.Node, Any]) -> None:
    """Let regions take the shards of ``wholes`` where they do nothing with one but to_local()."""
    made: dict[tuple[fx.GraphModule, tuple[int, ...]], str] = {}
    for node in list(gm.graph.nodes):
        region = region_of(node)
        if region is None or wholes.keys().isdisjoint(region.operands):
            continue
        effects = effects_on(region.body.graph)
        inside = region.body.graph.find_nodes(op="placeholder")
        at = tuple(
            index
            for index, (operand, own) in enumerate(zip(region.operands, inside, strict=True))
            if operand in wholes and not (why_no_shard(wholes[operand]) or _why_not(own, effects))
        )
        if not at:
            continue
        key = region.body, at
        if key not in made:
            made[key] = f"mxfp4_local_body_{next(ctx.numbers)}"
            body = copy_graph(region.body)
            inside = body.graph.find_nodes(op="placeholder")
            for index in at:
                _take_shard(inside[index], [*inside[index].users])
            body.recompile()
            gm.add_submodule(made[key], body)
        _call_with_shards(gm, node, made[key], at)


def _call_with_shards(gm: fx.GraphModule, call: fx.Node, name: str, at: tuple[int, ...]) -> None:
    """Let a region run the body ``name``, on ``to_local()`` of the operands at ``at``."""
    region = region_of(call)
    assert region is not None
    inside = getattr(gm, name).graph.find_nodes(op="placeholder")
    operands, old = [*region.operands], call.args[0]
    assert isinstance(old, fx.Node)
    with gm.graph.inserting_before(call):
        for index in at:
            local = gm.graph.call_method("to_local", (operands[index],))
            local.meta = {**call.meta, "example_value": tensor_of(inside[index])}
            operands[index] = local
        new = gm.graph.get_attr(name)
        new.meta = dict(old.meta)
        call.args = (new, *torch_private.names_of_body(call.target, name), *operands)
    if not old.users:
        gm.graph.erase_node(old)
