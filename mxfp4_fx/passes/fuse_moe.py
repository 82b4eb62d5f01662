"""Second pass: find GPT-OSS experts, prove it, put the logical op ``mxfp4::moe`` in their place.

A region is rewritten only when everything is proven: its dataflow and numbers (``patterns.py``),
then what the dataflow does not show (``checks.py``). Whatever looked like experts and was not is
reported with its reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

import torch
from torch import fx

import mxfp4_fx.ops.schemas  # noqa: F401  (defines torch.ops.mxfp4)
from mxfp4_fx import verification
from mxfp4_fx.ops import reference
from mxfp4_fx.passes.checks import SCALES, WEIGHTS, check_region, is_parameter
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.effects import modes
from mxfp4_fx.passes.graph import op_name, tensor_of
from mxfp4_fx.passes.matcher import Match, Mismatch
from mxfp4_fx.passes.memory import Memory
from mxfp4_fx.passes.origin import comes_from, module_name, source_line
from mxfp4_fx.passes.patterns import (
    FOREIGN_EXPERTS,
    FORMS,
    ROUTER_INDICES,
    ROUTER_SCORES,
    ROUTER_SHAPES,
    Form,
)
from mxfp4_fx.passes.report import Miss, Rewrite
from mxfp4_fx.weights import is_kept_dense

_MATMULS = {"grouped_mm", "bmm", "matmul", "baddbmm", "einsum", "mxfp4.matmul_ogs"}


def fuse_moe(gm: fx.GraphModule, ctx: Context) -> None:
    """Replace every proven MoE MLP by one ``mxfp4::moe``; report the rest."""
    suspects = _suspects(gm, ctx)
    misses: dict[str, Mismatch] = {}
    roots = {form.result.op for form in FORMS}
    memory, modes_at = Memory(gm.graph, ctx.inputs), modes(gm.graph)
    inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), ctx.inputs, strict=True))
    for root in list(gm.graph.nodes):
        if op_name(root) not in roots:
            continue
        try:
            form, match = _match_experts(root)
            has_router = _match_router(match, form)
            check_region(root, match, ctx, memory, modes_at)
        except Mismatch as mismatch:
            for layer in _layers_near(root, mismatch, suspects):
                if layer not in misses or misses[layer].matched < mismatch.matched:
                    misses[layer] = mismatch
            continue
        layers = [suspects.pop(node) for node in match.nodes.values() if node in suspects]
        layer = layers[0] if layers else module_name(root)
        if _is_skipped(layer, ctx):
            ctx.report.misses.append(_skipped(layer))
            continue
        if any(is_kept_dense(inputs[match.leaves[name]]) for name in ("gate_up", "down")):
            reason = "kept dense: skip= or modules_to_not_convert named it when it was loaded"
            ctx.report.misses.append(Miss(layer, reason, skipped=True))
            continue
        ctx.report.rewrites.append(_rewrite(layer, form, match))
        if not has_router:
            match.leaves["indices"] = _insert_ids(root, match, form)
        moe = _insert_moe(gm, root, match, has_router)
        if ctx.verifying:
            _keep_and_compare(layer, root, moe, match)
        else:
            _erase(gm, match)
    left = {layer: node for node, layer in reversed(suspects.items())}  # a layer's first
    found = [
        *(_explain_miss(layer, node, misses.get(layer)) for layer, node in reversed(left.items())),
        *_in_subgraphs(gm),
        *_of_transformers(gm.graph),
    ]
    ctx.report.misses += [_skipped(m.layer) if _is_skipped(m.layer, ctx) else m for m in found]


def _is_skipped(layer: str, ctx: Context) -> bool:
    return any(fnmatch.fnmatch(layer, pattern) for pattern in ctx.options.skip)


def _skipped(layer: str) -> Miss:
    return Miss(layer, "skipped by options['skip']", skipped=True)


def _match_experts(root: fx.Node) -> tuple[Form, Match]:
    failures: list[Mismatch] = []
    for form in FORMS:
        match = Match()
        try:
            match.expect(form.result, root)
            match.solve(form.shapes)
            return form, match
        except Mismatch as mismatch:
            mismatch.reason = f"not the {form.name} form: {mismatch.reason}"
            failures.append(mismatch)
    raise max(failures, key=lambda m: m.matched)


def _match_router(match: Match, form: Form) -> bool:
    """Prove the router, too; False where the routes are inputs of the graph, and may be.

    The router's values may have other users (models return the scores): they stay in the graph.
    """
    scores, indices = match.leaves["scores"], match.leaves["indices"]
    if scores.op == indices.op == "placeholder" and not form.needs_router:
        return False
    try:
        match.expect(ROUTER_SCORES, scores)
        match.expect(ROUTER_INDICES, indices)
        match.solve(ROUTER_SHAPES)
    except Mismatch as mismatch:
        mismatch.reason = (
            "the experts are GPT-OSS's, the router is not (softmax over the top-k logits): "
            f"{mismatch.reason}"
        )
        raise
    return True


def _rewrite(layer: str, form: Form, match: Match) -> Rewrite:
    letters = match.letters
    names = ("gate_up", "down", *SCALES)
    weights = [t for name in names if (t := tensor_of(match.leaves.get(name))) is not None]
    return Rewrite(
        layer=layer,
        form=form.name,
        experts=letters["E"],
        top_k=letters["A"],
        hidden=letters["H"],
        intermediate=letters["I"],
        alpha=float(letters["alpha"]),
        limit=float(letters["limit"]),
        bytes_before=sum(w.numel() * w.element_size() for w in weights),
    )


def _insert_ids(root: fx.Node, match: Match, form: Form) -> fx.Node:
    """Nothing is known of ids that are inputs: the logical op gets those that the form makes of
    them."""
    indices = match.leaves["indices"]
    if (form.below, form.above) == ("skip", "skip"):
        return indices
    value = tensor_of(indices)
    assert value is not None
    with root.graph.inserting_before(root):
        args = (indices, match.letters["E"], form.below, form.above)
        ids = root.graph.call_function(torch.ops.mxfp4.expert_ids.default, args)
    with value.fake_mode:  # type: ignore[attr-defined]
        ids.meta = {**root.meta, "example_value": torch.empty_like(value)}
    return ids


def _insert_moe(gm: fx.GraphModule, root: fx.Node, match: Match, has_router: bool) -> fx.Node:
    """Put the logical op behind the region and hand it the region's users."""
    weights = [match.leaves[name] for name in WEIGHTS]
    constants = float(match.letters["alpha"]), float(match.letters["limit"])
    scales = [match.leaves[name] for name in SCALES if name in match.leaves]
    hidden = match.leaves["hidden"]
    with gm.graph.inserting_after(root):
        if has_router:
            logits, top_k = match.leaves["router_logits"], match.letters["A"]
            args = (hidden, logits, *weights, top_k, *constants, *scales)
            moe = gm.graph.call_function(torch.ops.mxfp4.moe.default, args)
        else:
            routes = match.leaves["indices"], match.leaves["scores"]
            args = (hidden, *routes, *weights, *constants, *scales)
            moe = gm.graph.call_function(torch.ops.mxfp4.moe.routes, args)
    moe.meta = dict(root.meta)
    root.replace_all_uses_with(moe)
    return moe


def _erase(gm: fx.GraphModule, match: Match) -> None:
    """Erase what matched and nobody else reads.

    Only that: sweeping the graph for dead code would take in-place calls along.
    """
    for node in sorted(match.nodes.values(), reverse=True):
        if not node.users:
            gm.graph.erase_node(node)


def _keep_and_compare(layer: str, root: fx.Node, moe: fx.Node, match: Match) -> None:
    """``verify``: the region stays, on the weights that MXFP4 holds, and its result is compared."""
    graph, inside = root.graph, list(match.nodes.values())
    held: dict[str, fx.Node] = {}
    for name, scales in zip(("gate_up", "down"), SCALES, strict=True):
        weight = match.leaves[name]
        with graph.inserting_before(min(inside)):
            if scales in match.leaves:
                args = (weight, match.leaves[scales])
                held[name] = graph.call_function(verification.unpacked, args)
                continue
            held[name] = graph.call_function(verification.requantize, (weight,))
        for node in inside:
            node.replace_input_with(weight, held[name])
    leaves = {**match.leaves, **held}
    with graph.inserting_after(moe):
        routes = graph.call_function(
            reference.routing_from_routes,
            (leaves["indices"], leaves["scores"], match.letters["E"]),
        )
    with graph.inserting_after(routes):
        alpha, limit = (float(match.letters[name]) for name in ("alpha", "limit"))
        constants = match.letters["A"], alpha, limit
        weights = [leaves[name] for name in WEIGHTS]
        args = (layer, root, moe, routes, leaves["hidden"], *weights, *constants)
        graph.call_function(verification.compare, args)


def _suspects(gm: fx.GraphModule, ctx: Context) -> dict[fx.Node, str]:
    """What looks like experts, with its module: a matmul with a parameter of stacked matrices."""
    inputs = zip(gm.graph.find_nodes(op="placeholder"), ctx.inputs, strict=True)
    parameters = {node for node, value in inputs if is_parameter(node, value)}
    # Where Dynamo is told not to lift parameters they are attributes.
    parameters |= set(gm.graph.find_nodes(op="get_attr"))
    return _matmuls_with(gm.graph, {node for node in parameters if _is_stack(node)})


def _is_stack(node: fx.Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.ndim == (4 if value.dtype == torch.uint8 else 3)


def _matmuls_with(graph: fx.Graph, stacks: set[fx.Node]) -> dict[fx.Node, str]:
    """Every matmul that reads one of ``stacks``, and every grouped one, with its module's name."""
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        name = op_name(node)
        reads = name in _MATMULS and not stacks.isdisjoint(_weights_of(node))
        if name == "grouped_mm" or reads:
            found[node] = module_name(node)
    return found


def _weights_of(node: fx.Node) -> Iterator[fx.Node]:
    """The inputs of a matmul, and what they are picked from (``weight[expert_ids]``)."""
    for value in node.all_input_nodes:
        yield value
        yield from _picked_from(value)


def _picked_from(value: fx.Node) -> Iterator[fx.Node]:
    while op_name(value) in ("getitem", "cast", "view") and value.all_input_nodes:
        value = value.all_input_nodes[0]
        yield value


def _layers_near(root: fx.Node, mismatch: Mismatch, suspects: dict[fx.Node, str]) -> set[str]:
    """The suspects that a failed match speaks of: of the root's, or of the mismatch's, module."""
    names = {module_name(root)}
    if mismatch.node is not None:
        names.add(module_name(mismatch.node))
    return names & set(suspects.values())


def _explain_miss(layer: str, node: fx.Node, mismatch: Mismatch | None) -> Miss:
    if mismatch is None:
        reason = "no weighted sum over the chosen experts, as GPT-OSS has it, was found behind it"
        return Miss(layer, reason, source_line(node))
    at = mismatch.node if mismatch.node is not None else node
    return Miss(layer, mismatch.reason, source_line(at))


def _of_transformers(graph: fx.Graph) -> list[Miss]:
    """MXFP4 experts that transformers itself has put into the model; their matmuls are no nodes."""
    reason = (
        "transformers holds its weights in MXFP4 for kernels of its own (Mxfp4GptOssMLP): load the "
        "model with mxfp4_fx.from_pretrained(...) instead"
    )
    nodes = [node for node in graph.nodes if comes_from(node, FOREIGN_EXPERTS)]
    return [Miss(name, reason) for name in dict.fromkeys(map(module_name, nodes))]


def _in_subgraphs(gm: fx.GraphModule) -> list[Miss]:
    """Experts inside higher-order ops, which the passes do not enter."""
    reason = (
        "it is inside a subgraph (activation checkpointing or a nested compile region), "
        "which is not searched"
    )
    found: dict[str, Miss] = {}
    for name, module in gm.named_modules():
        if name and isinstance(module, fx.GraphModule):
            # Inputs of a subgraph are not known to be parameters; one that a matmul picks matrices
            # from is.
            picked = {
                weight
                for node in module.graph.nodes
                if op_name(node) == "bmm"
                for weight in _picked_from(node.all_input_nodes[-1])
                if weight.op == "placeholder" and _is_stack(weight)
            }
            for node, layer in _matmuls_with(module.graph, picked).items():
                found.setdefault(layer, Miss(layer, reason, source_line(node)))
    return list(found.values())
