"""Eighth pass: rewrite the bodies of regions, and bind the weights that each call gives them.

A body is rewritten once for all calls that are alike: the user left the same of their weights,
the same of their operands are parameters, torch's modes and what else the outer graph does to the
operands agree (:class:`memory.Around`). Other calls get a body of their own. A rewritten body reads
swizzled weights; these become inputs of the outer graph, bound for each call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import fx

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.skip import WHY_SKIPPED, Skip
from mxfp4_fx.passes.checks import is_parameter
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.effects import Modes, modes
from mxfp4_fx.passes.graph import Number, equal, known_tensor, same_shape, tensor_of
from mxfp4_fx.passes.lower_moe import erase_unread, swizzled_inputs
from mxfp4_fx.passes.memory import ANY, Around, Memory, may_share
from mxfp4_fx.passes.origin import owner_name
from mxfp4_fx.passes.quantize_linears import layer_of, linears_of_parameters
from mxfp4_fx.passes.regions import Region, region_of
from mxfp4_fx.passes.report import Attention, Miss, QuantizedLinear, Rewrite
from mxfp4_fx.passes.suspects import find_suspects

# Runs the pipeline on a copy of a body and returns the copy.
Rewriter = Callable[[fx.GraphModule, Context], fx.GraphModule]
_UNLIKE = "its region is called with other types or sizes than it was captured with"
_Item = TypeVar("_Item", Rewrite, Miss, Attention, QuantizedLinear)


@dataclasses.dataclass(frozen=True)
class _Site:
    """One call of a body.

    Attributes:
        region: the call.
        slots: for each operand, which of the outer graph's captured inputs it is; None if none.
        weights: for each operand, whether it is a parameter or buffer of the model.
        around: what else the outer graph does to the operands.
    """

    region: Region
    slots: tuple[int | None, ...]
    weights: tuple[bool, ...]
    around: Around


def enter_regions(gm: fx.GraphModule, ctx: Context, run: Rewriter) -> None:
    """Rewrite the body of every region in the graph; regions in a body come with it.

    Args:
        run: runs the pipeline on a copy of a body, in the body's own context.
    """
    groups: dict[Hashable, list[_Site]] = {}
    for site in _sites(gm.graph, ctx):
        groups.setdefault(_likeness(site, ctx), []).append(site)
    for sites in groups.values():
        body, inner = sites[0].region.body, _inside(sites[0], ctx)
        if _is_as_captured(sites[0]):
            rewritten = run(body, inner)
            if inner.report.changes_graph:
                _install(gm, rewritten, sites, inner, ctx)
        else:
            inner.report.misses += _unlike_captured(body, inner)
            inner.report.linear_misses += _linears_unlike_captured(body, inner)
        for site in sites:
            ctx.report.rewrites += [_named(rewrite, site) for rewrite in inner.report.rewrites]
            ctx.report.misses += [_named(miss, site) for miss in inner.report.misses]
            ctx.report.linears += inner.report.linears
            ctx.report.mxfp8 += [_named(one, site) for one in inner.report.mxfp8]
            ctx.report.linear_misses += [_named(miss, site) for miss in inner.report.linear_misses]
            ctx.report.attention += [_named(one, site) for one in inner.report.attention]
            ctx.report.attention_misses += [
                _named(miss, site) for miss in inner.report.attention_misses
            ]
    erase_unread(gm.graph, ctx)


def _sites(graph: fx.Graph, ctx: Context) -> list[_Site]:
    regions = [region for node in graph.nodes if (region := region_of(node)) is not None]
    if not regions:
        return []
    memory = Memory(graph, ctx.values(graph), ctx.around)
    modes_at = modes(graph, ctx.begin)
    slots = ctx.slots(graph)
    found = []
    for region in regions:
        at = tuple(slots.get(operand) for operand in region.operands)
        weights = tuple(
            slot is not None and is_parameter(operand, ctx.value(slot))
            for slot, operand in zip(at, region.operands, strict=True)
        )
        found.append(_Site(region, at, weights, _around(region, memory, modes_at[region.call])))
    return found


def _around(region: Region, memory: Memory, modes: Modes) -> Around:
    keys = [memory.of(o) if isinstance(o, fx.Node) else set() for o in region.operands]
    outside = [(writer, written, region.call < writer) for writer, written in memory.writes]
    return Around(
        modes=modes,
        memory=tuple(
            None if ANY in mine else next((i for i, k in enumerate(keys) if may_share(mine, k)), at)
            for at, mine in enumerate(keys)
        ),
        reshapers=tuple(
            memory.reshaper(o) if isinstance(o, fx.Node) else None for o in region.operands
        ),
        writes=tuple(
            (writer, at, later)
            for writer, written, later in [*outside, *memory.writes_outside]
            if writer is not region.call
            for at, mine in enumerate(keys)
            if may_share(mine, written)
        ),
    )


def _likeness(site: _Site, ctx: Context) -> Hashable:
    """Return what decides how a body is rewritten; calls for which it is equal share the result."""
    own = site.region.call if ctx.verifying else None  # a comparison names its layer
    left = tuple(_left(site, ctx).items())
    return id(site.region.body), own, left, site.weights, site.around, _is_as_captured(site)


def _is_as_captured(site: _Site) -> bool:
    """Return whether operands have the types that the body was captured with: it is proven so."""
    inputs = site.region.body.graph.find_nodes(op="placeholder")
    return all(_is_like(o, node) for o, node in zip(site.region.operands, inputs, strict=True))


def _is_like(operand: Any, captured: fx.Node) -> bool:
    given = operand.meta.get("example_value") if isinstance(operand, fx.Node) else operand
    own = captured.meta.get("example_value")
    if isinstance(given, Number) and isinstance(own, Number):
        return equal(given, own)
    a, b = tensor_of(operand), tensor_of(captured)
    if a is None or b is None:
        return given is None and own is None
    return (
        (a.dtype, a.device, a.layout, a.requires_grad)
        == (b.dtype, b.device, b.layout, b.requires_grad)
        and same_shape(tuple(a.shape), tuple(b.shape))
        and (a.layout is not torch.strided or same_shape(a.stride(), b.stride()))
    )


def _unlike_captured(body: fx.GraphModule, inner: Context) -> list[Miss]:
    suspects, weights, _ = find_suspects(body, inner)
    layers = dict.fromkeys(suspects.values())
    return [Miss(layer, _UNLIKE, inputs=weights.get(layer, ())) for layer in layers]


def _linears_unlike_captured(body: fx.GraphModule, inner: Context) -> list[Miss]:
    if inner.options.linears != "mxfp8":
        return []
    slots = inner.slots(body.graph)
    return [
        Miss(layer_of(linear), _UNLIKE, inputs=(slots[linear.weight],))
        for linear in linears_of_parameters(body.graph, inner)
    ]


def _inside(site: _Site, ctx: Context) -> Context:
    """Return the context of a body, as one of its calls has it: None for what is no weight."""
    values = [
        ctx.value(slot) if slot is not None and is_weight else None
        for slot, is_weight in zip(site.slots, site.weights, strict=True)
    ]
    return ctx.within(values, _left(site, ctx), site.around)


def _left(site: _Site, ctx: Context) -> dict[int, str | None]:
    """Return :attr:`Context.left` for the body: also for weights whose module is not known."""
    found: dict[int, str | None] = {}
    least = 2 if ctx.options.linears == "mxfp8" else 3  # axes of a weight that can be left
    for at, (slot, operand) in enumerate(zip(site.slots, site.region.operands, strict=True)):
        if slot is None or not site.weights[at] or known_tensor(operand).ndim < least:
            continue
        if slot in ctx.left:
            found[at] = ctx.left[slot]
        elif ctx.options.skip and (name := owner_name(operand)):
            found[at] = WHY_SKIPPED if Skip(ctx.options.skip).names(name) else None
    return found


def _install(
    gm: fx.GraphModule, body: fx.GraphModule, sites: list[_Site], inner: Context, ctx: Context
) -> None:
    """Let calls run a rewritten body, on the swizzled weights of each."""
    name = f"mxfp4_body_{next(ctx.numbers)}"
    gm.add_submodule(name, body)
    for site in sites:
        call, old = site.region.call, site.region.call.args[0]
        operands = _operands(body.graph, site, inner, ctx)
        with gm.graph.inserting_before(call):
            if ctx.verifying:
                # Verification compares real values. The op would trace the body instead.
                plain = gm.graph.call_module(name, tuple(operands))
                plain.meta = dict(call.meta)
                call.replace_all_uses_with(plain)
                gm.graph.erase_node(call)
            else:
                assert isinstance(old, fx.Node)
                new = gm.graph.get_attr(name)
                new.meta = dict(old.meta)
                call.args = (new, *torch_private.names_of_body(call.target, name), *operands)
        if isinstance(old, fx.Node) and not old.users:
            gm.graph.erase_node(old)
            if not any(n.target == old.target for n in gm.graph.find_nodes(op="get_attr")):
                delattr(gm, str(old.target))


def _operands(body: fx.Graph, site: _Site, inner: Context, ctx: Context) -> list[Any]:
    """Return what a call gives a rewritten body: swizzled weights in the place of captured ones."""
    given = site.region.operands
    parts: dict[str, fx.Node] = {}
    for binding in inner.bindings:
        held = tuple(given[at] for at in binding.slots)
        name = f"{binding.name.partition(' of ')[0]} of {owner_name(held[0]) or binding.name}"
        swizzled = swizzled_inputs(held, binding.encoding, binding.layout, name, ctx)
        parts.update(zip(binding.inputs, swizzled, strict=True))
    slots = inner.slots(body)
    return [
        given[slots[node]] if node in slots else parts[node.name]
        for node in body.find_nodes(op="placeholder")
    ]


def _named(item: _Item, site: _Site) -> _Item:
    """Return what a body reports as that of one call: with its inputs and module's name."""
    inputs = tuple(sorted(slot for at in item.inputs if (slot := site.slots[at]) is not None))
    names = {owner_name(site.region.operands[at]) for at in item.inputs} - {""}
    name = min(names) if len(names) == 1 else item.layer
    return dataclasses.replace(item, layer=name, inputs=inputs)
