"""Third pass: prove that regions are experts and replace each by ``mxfp4::moe``.

The pass rewrites a region only after it has proven the region's dataflow and numbers
(``patterns.py``) and what the dataflow does not show (``checks.py``). It reports all other nodes
that look like experts (``suspects.py``), each with its reason.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

import mxfp4_fx.ops.schemas  # noqa: F401  (defines torch.ops.mxfp4)
from mxfp4_fx.core import torch_private
from mxfp4_fx.core.orders import GPT_OSS
from mxfp4_fx.core.skip import WHY_SKIPPED, Skip
from mxfp4_fx.core.version import why_other_experts
from mxfp4_fx.ops import reference
from mxfp4_fx.ops.operands import UP_OFFSET
from mxfp4_fx.passes import verification
from mxfp4_fx.passes.checks import (
    SCALES,
    WEIGHTS,
    are_routes_moved,
    check_region,
    compute_dtype,
    dtypes_inside,
)
from mxfp4_fx.passes.context import REWRITE, Context
from mxfp4_fx.passes.effects import modes
from mxfp4_fx.passes.graph import before_moves, known_tensor, op_name, tensor_of
from mxfp4_fx.passes.logical import ADAPTED, OP, is_logical, match_logical
from mxfp4_fx.passes.matcher import Match, Mismatch
from mxfp4_fx.passes.memory import Memory
from mxfp4_fx.passes.origin import is_of_gpt_oss, module_name, source_line
from mxfp4_fx.passes.patterns import FORMS, Form, activation_of, order_of
from mxfp4_fx.passes.report import Miss, Rewrite
from mxfp4_fx.passes.routes import Routes, find_routes, insert_ids
from mxfp4_fx.passes.suspects import LOGICAL, find_suspects


def fuse_moe(gm: fx.GraphModule, ctx: Context) -> None:
    """Replace every proven MoE MLP by one ``mxfp4::moe``; report the rest."""
    suspects, weights, in_subgraphs = find_suspects(gm, ctx)
    misses: dict[str, Mismatch] = {}
    slots = ctx.slots(gm.graph)
    roots = {OP, ADAPTED, *(form.result.op for form in FORMS)}
    memory = Memory(gm.graph, ctx.values(gm.graph), ctx.around)
    modes_at = modes(gm.graph, ctx.begin)
    for root in list(gm.graph.nodes):
        if op_name(root) not in roots:
            continue
        try:
            form, match = match_logical(root) if is_logical(root) else _match_experts(root)
            is_adapted = op_name(root) == ADAPTED
            routes = Routes(match, None, "") if is_adapted else find_routes(match, form, memory)
            match = routes.match
            check_region(root, match, ctx, memory, modes_at)
        except Mismatch as mismatch:
            for layer in _layers_near(root, mismatch, suspects):
                if layer not in misses or misses[layer].matched < mismatch.matched:
                    misses[layer] = mismatch
            continue
        layers = [suspects.pop(node) for node in match.nodes.values() if node in suspects]
        layer = layers[0] if layers else module_name(root)
        names = ("gate_up", "down", *SCALES)
        weights_here = (match.leaves[name] for name in names if name in match.leaves)
        inputs = tuple(sorted({slots[node] for node in weights_here if node in slots}))
        left = _why_left(layer, inputs, ctx)
        if left is not None:
            ctx.report.misses.append(Miss(layer, left, skipped=True, inputs=inputs))
            continue
        if is_adapted:  # it is its own logical op
            root.meta[REWRITE] = _rewrite(layer, form, routes, inputs)
            if ctx.options.verify:
                ctx.report.notes.append(f"verify=True compares no experts with adapters: {layer}")
            continue
        if routes.router is None:
            match.leaves["indices"] = insert_ids(root, match, form, memory)
        moe = _insert_moe(gm, root, routes, form.layout)
        moe.meta[REWRITE] = _rewrite(layer, form, routes, inputs)
        if ctx.verifying:
            _keep_and_compare(layer, root, moe, match, form.layout)
        else:
            _erase(gm, match)
    rest = {layer: node for node, layer in reversed(suspects.items())}  # each layer's first node
    found = [
        *(_explain_miss(layer, node, misses.get(layer)) for layer, node in reversed(rest.items())),
        *in_subgraphs,
    ]
    for miss in found:
        inputs = weights.get(miss.layer, ())
        left = _why_left(miss.layer, inputs, ctx)
        if left is not None:
            miss = Miss(miss.layer, left, skipped=True)
        ctx.report.misses.append(dataclasses.replace(miss, inputs=inputs))


def _why_left(layer: str, inputs: tuple[int, ...], ctx: Context) -> str | None:
    """Return why the user wants experts left as they are, from their module or else this name."""
    known = [ctx.left[at] for at in inputs if at in ctx.left]
    if known:
        return next((why for why in known if why is not None), None)
    return WHY_SKIPPED if Skip(ctx.options.skip).names(layer) else None


def _match_experts(root: fx.Node) -> tuple[Form, Match]:
    failures: list[Mismatch] = []
    for form in FORMS:
        match = Match()
        try:
            match.expect(form.result, root)
            match.solve(form.shapes(match.choices))
            return form, match
        except Mismatch as mismatch:
            mismatch.reason = f"not the {form.name} form: {mismatch.reason}"
            failures.append(mismatch)
    nearest = max(failures, key=lambda m: m.matched)
    nearest.reason = _of_old_transformers(root, nearest.reason)
    raise nearest


def _rewrite(layer: str, form: Form, routes: Routes, inputs: tuple[int, ...]) -> Rewrite:
    match = routes.match
    letters, activation = match.letters, activation_of(match)
    names = ("gate_up", "down", *SCALES)
    weights = [t for name in names if (t := tensor_of(match.leaves.get(name))) is not None]
    hidden = match.leaves["hidden"]
    home, device = (known_tensor(node).device for node in (before_moves(hidden), hidden))
    return Rewrite(
        layer=layer,
        form=form.name,
        experts=letters["E"],
        top_k=letters["A"],
        hidden=letters["H"],
        intermediate=letters["I"],
        activation=activation.kind,
        alpha=activation.alpha,
        limit=activation.limit,
        up_offset=activation.up_offset,
        bytes_before=sum(w.numel() * w.element_size() for w in weights),
        inputs=inputs,
        travel=f"hidden states travel from {home} to {device}" if home != device else "",
        router=routes.origin,
        why_own_router=routes.why,
        first_expert=routes.first_expert,
    )


def _insert_moe(gm: fx.GraphModule, root: fx.Node, routes: Routes, layout: str) -> fx.Node:
    """Insert the logical op after the region and let it replace the region's result.

    It takes the router's own ids; what makes a rank's of them goes with the region.
    """
    match = routes.match
    weights = [match.leaves.get(name) for name in WEIGHTS]
    activation = activation_of(match)
    scales = [match.leaves[name] for name in SCALES if name in match.leaves]
    rest: list[Any] = [activation.alpha, activation.limit, *((*scales, layout) if scales else ())]
    # What differs from GPT-OSS.
    family: dict[str, Any] = {"activation": activation.kind, "up_offset": activation.up_offset}
    family |= order_of(match)._asdict()
    usual = {"activation": "swiglu", "up_offset": UP_OFFSET, **GPT_OSS._asdict()}
    dtype = compute_dtype(match)
    hidden = _cast_after(root, match.leaves["hidden"], dtype)
    with gm.graph.inserting_after(max(root, hidden)):
        if routes.router is not None and not are_routes_moved(match):
            logits, top_k = match.leaves["router_logits"], match.letters["A"]
            args = (hidden, logits, *weights, top_k, *rest)
            moe = gm.graph.call_function(torch.ops.mxfp4.moe.default, args)
            family["first_expert"], usual["first_expert"] = routes.first_expert, 0
        else:
            given = match.leaves["indices"], match.leaves["scores"]
            moe = gm.graph.call_function(
                torch.ops.mxfp4.moe.routes, (hidden, *given, *weights, *rest)
            )
    moe.kwargs = {name: value for name, value in family.items() if value != usual[name]}
    moe.meta = {**root.meta, "example_value": _fake_cast(root, root, dtype)}
    result = known_tensor(root).dtype
    root.replace_all_uses_with(_cast_after(moe, moe, result))
    return moe


def _cast_after(place: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Insert a cast of ``value`` after ``place`` and return it; return ``value`` if it has none."""
    if known_tensor(value).dtype == dtype:
        return value
    with place.graph.inserting_after(place):
        cast = place.graph.call_method("to", (value, dtype))
    cast.meta = {**place.meta, "example_value": _fake_cast(place, value, dtype)}
    return cast


def _fake_cast(place: fx.Node, value: fx.Node, dtype: torch.dtype) -> torch.Tensor:
    """Return the fake tensor of a cast of ``value`` where gradients are recorded as at a node."""
    fake = known_tensor(value)
    recorded = torch.set_grad_enabled(known_tensor(place).requires_grad)
    with recorded, torch_private.without_saved_tensor_hooks(), fake.fake_mode:  # type: ignore[attr-defined]
        return fake.to(dtype)


def _erase(gm: fx.GraphModule, match: Match) -> None:
    """Erase the matched nodes that have no users left.

    Eliminating dead code in the whole graph would erase in-place calls as well.
    """
    for node in sorted({*match.nodes.values()}, reverse=True):
        if not node.users:
            gm.graph.erase_node(node)


def _keep_and_compare(layer: str, root: fx.Node, moe: fx.Node, match: Match, layout: str) -> None:
    """Keep the region, on the weights that MXFP4 holds, and compare its result (``verify``)."""
    graph, inside = root.graph, list(match.nodes.values())
    order = order_of(match)
    held: dict[str, fx.Node] = {}
    for name, scales in zip(("gate_up", "down"), SCALES, strict=True):
        weight = match.leaves[name]
        with graph.inserting_before(min(inside)):
            if scales in match.leaves:
                packed = (weight, match.leaves[scales], layout)
                held[name] = graph.call_function(verification.unpacked, packed)
                continue
            args = (weight, order.is_transposed)
            held[name] = graph.call_function(verification.requantize, args)
        for node in inside:
            node.replace_input_with(weight, held[name])
    leaves = {**match.leaves, **held}
    with graph.inserting_after(moe):
        routes = graph.call_function(
            reference.routing_from_routes,
            (leaves["indices"], leaves["scores"], match.letters["E"]),
        )
    with graph.inserting_after(routes):
        weights = [leaves.get(name) for name in WEIGHTS]
        values = root, moe, routes, moe.args[0], *weights
        given = GPT_OSS if SCALES[0] in leaves else order
        constants = match.letters["A"], tuple(activation_of(match)), tuple(given)
        args = (layer, *values, *constants, dtypes_inside(match))
        graph.call_function(verification.compare, args)


def _layers_near(root: fx.Node, mismatch: Mismatch, suspects: dict[fx.Node, str]) -> set[str]:
    """Return the suspect layers of a failed match: those of its root and of its mismatch."""
    names = {module_name(root)}
    if mismatch.node is not None:
        names.add(module_name(mismatch.node))
    return names & set(suspects.values())


def _explain_miss(layer: str, node: fx.Node, mismatch: Mismatch | None) -> Miss:
    if op_name(node) in LOGICAL - {OP, ADAPTED}:
        reason = (
            "it calls torch.ops.mxfp4.moe itself, which computes it as it is, in plain PyTorch: "
            "call torch.ops.mxfp4.moe.routes instead"
        )
        return Miss(layer, reason, source_line(node))
    if mismatch is None:
        reason = "no weighted sum over the chosen experts follows it"
        return Miss(layer, _of_old_transformers(node, reason), source_line(node))
    at = mismatch.node if mismatch.node is not None else node
    return Miss(layer, mismatch.reason, source_line(at))


def _of_old_transformers(node: fx.Node, reason: str) -> str:
    """Put a version of transformers that writes its experts otherwise before why they mismatch."""
    older = why_other_experts()
    return f"{older} ({reason})" if older and is_of_gpt_oss(node) else reason
