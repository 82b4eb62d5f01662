"""Fifth pass: prove attention with sinks on a CPU and replace it by one op.

transformers has no other attention with sinks for a CPU than its eager one, which makes weights
[B, H, Q, T] and repeats keys and values for each head of queries. ``mxfp4::attention_with_sinks``
computes the same in memory that is linear in T.

The pass rewrites what it has proven: the dataflow (``attention_patterns.py``), and below what the
dataflow does not show. All else that looks like attention with sinks stays, with a reason.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

import mxfp4_fx.ops.schemas  # noqa: F401  (defines torch.ops.mxfp4)
from mxfp4_fx.core import torch_private
from mxfp4_fx.core.hardware import DTYPES
from mxfp4_fx.core.torch_private import is_wrapper
from mxfp4_fx.ops import target
from mxfp4_fx.passes import attention_verification
from mxfp4_fx.passes.attention_patterns import ATTENTION_FORMS
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.effects import Modes, modes
from mxfp4_fx.passes.graph import known_tensor, op_name, read_call, tensor_of
from mxfp4_fx.passes.matcher import Match, Mismatch
from mxfp4_fx.passes.memory import Memory, is_transformed, may_share, needed
from mxfp4_fx.passes.origin import module_name, source_line
from mxfp4_fx.passes.report import Attention, Miss

# Calls between the logits with their sinks and the softmax, and between the softmax and the result.
_BEFORE = {"add", "cast", "clamp", "masked_fill", "mul", "sub"}
_BEHIND = {"cast", "dropout", "getitem", "matmul", "mul", "transpose", "view"}


def fuse_attention(gm: fx.GraphModule, ctx: Context) -> None:
    """Replace every proven attention with sinks by one op; report the rest."""
    if not ctx.options.attention or not target.has_attention(ctx.options.kernels):
        return
    read = needed(gm.graph)
    suspects = [node for node in gm.graph.nodes if node in read and _is_suspect(node)]
    if not suspects:
        return
    slots = ctx.slots(gm.graph)
    memory = Memory(gm.graph, ctx.values(gm.graph), ctx.around)
    modes_at = modes(gm.graph, ctx.begin)
    why_not = target.why_no_attention()
    for weights in suspects:
        layer = module_name(weights)
        try:
            if why_not is not None:
                raise _failure(why_not, weights)
            root, match = _match(weights)
            _check(root, match, memory, modes_at, read)
        except Mismatch as mismatch:
            at = mismatch.node if mismatch.node is not None else weights
            ctx.report.attention_misses.append(Miss(layer, mismatch.reason, source_line(at)))
            continue
        sinks = match.leaves["sinks"]
        ctx.report.attention.append(Attention(layer, (slots[sinks],) if sinks in slots else ()))
        _lower(layer, root, match, is_kept=ctx.verifying)


def _is_suspect(node: fx.Node) -> bool:
    """Return whether a node looks like the softmax of attention with sinks, on a CPU.

    That is a softmax of what a concatenation has made, of four dimensions.
    """
    value = tensor_of(node)
    if op_name(node) != "softmax" or value is None or value.device.type != "cpu" or value.ndim != 4:
        return False
    todo, seen = [*node.all_input_nodes], set()
    while todo:
        before = todo.pop()
        if op_name(before) == "cat":
            return True
        if op_name(before) in _BEFORE and before not in seen:
            seen.add(before)
            todo += before.all_input_nodes
    return False


def _results(weights: fx.Node) -> list[fx.Node]:
    """Return the calls behind a softmax that may be the result of its attention."""
    todo, seen, found = [weights], {weights}, []
    while todo:
        for user in todo.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if op_name(user) == "contiguous":
                found.append(user)
            elif op_name(user) in _BEHIND:
                todo.append(user)
    return sorted(found)


def _match(weights: fx.Node) -> tuple[fx.Node, Match]:
    """Return the result of attention with the given weights, and the proof."""
    failures: list[Mismatch] = []
    for root in _results(weights):
        for form in ATTENTION_FORMS:
            match = Match()
            try:
                match.expect(form.result, root)
                match.solve(form.shapes)
            except Mismatch as mismatch:
                failures.append(mismatch)
                continue
            if match.nodes[form.weights] is weights:
                return root, match
    if not failures:
        raise _failure("no values follow that its weights are multiplied with", weights)
    raise max(failures, key=lambda m: m.matched)


def _check(
    root: fx.Node,
    match: Match,
    memory: Memory,
    modes_at: dict[fx.Node, Modes],
    read: set[fx.Node],
) -> None:
    """Check what the dataflow does not show.

    Raises:
        Mismatch: the op would not compute the same, or not be seen to.
    """
    inside = set(match.nodes.values())
    for node in inside - {root}:
        for user in node.users:
            if user in read and user not in inside:
                raise _failure(f"the intermediate {node} is used elsewhere, by {user}", node)
    for name, node in match.leaves.items():
        _check_leaf(name, node, known_tensor(match.leaves["query"]).dtype)
    for node in inside:
        _check_inside(node, known_tensor(root).dtype)
        needs_gradient = any(known_tensor(leaf).requires_grad for leaf in match.leaves.values())
        if modes_at[node].gradients and needs_gradient:
            reason = "its gradients are recorded, which it needs its weights for"
            raise _failure(f"{reason}: run under torch.no_grad() or inference_mode()", node)
    _check_writes(root, match, memory)


def _check_leaf(name: str, node: fx.Node, dtype: torch.dtype) -> None:
    value = tensor_of(node)
    if value is None:
        raise _failure(f"the {name} is not a tensor", node)
    if is_transformed(value):
        raise _failure("it is inside a function transform, such as vmap", node)
    if is_wrapper(value) or value.layout is not torch.strided:
        raise _failure(f"the {name} is not a plain tensor, but {_kind(value)}", node)
    if value.device.type != "cpu":
        raise _failure(f"the {name} is on {value.device}, the weights on the CPU", node)
    if dtype not in DTYPES or value.dtype != dtype:
        raise _failure(f"the {name} is {value.dtype}, and the query {dtype}", node)


def _kind(value: Tensor) -> str:
    return type(value).__name__ if value.layout is torch.strided else str(value.layout)


def _check_inside(node: fx.Node, dtype: torch.dtype) -> None:
    """Check that a call rounds to the dtype of the result, and that a dropout drops nothing."""
    value, call = tensor_of(node), read_call(node)
    assert call is not None  # the matcher has read it
    if value is not None and value.dtype != dtype:
        raise _failure(f"{node} is computed in {value.dtype}, and the result is {dtype}", node)
    if call.op == "dropout" and call.args["training"] is not False and call.args["p"] != 0:
        raise _failure(f"its weights have a dropout of {call.args['p']}", node)


def _check_writes(root: fx.Node, match: Match, memory: Memory) -> None:
    """Check that nothing changes in place between the first call of the attention and its result.

    The op reads all that the attention reads where the result is.
    """
    first = min(match.nodes.values())
    for node in {*match.leaves.values(), *match.nodes.values()}:
        reshaper = memory.reshaper(node)
        if reshaper is not None:
            raise _failure(f"{node} is reshaped or detached in place, by {reshaper}", reshaper)
        mine = memory.of(node)
        for writer, written in memory.writes:
            if first < writer < root and may_share(mine, written):
                raise _failure(f"{node} may be written to meanwhile, by {writer}", writer)


def _failure(reason: str, node: fx.Node) -> Mismatch:
    return Mismatch(reason, node, 0)


def _lower(layer: str, root: fx.Node, match: Match, is_kept: bool) -> None:
    """Put the op in the place of a proven attention, which stays beside it if they are compared."""
    graph, leaves = root.graph, match.leaves
    names = ("query", "key", "value", "sinks", "mask")
    # ``float`` guards a scale that is symbolic.
    operands = (*(leaves.get(name) for name in names), float(match.letters["scale"]))
    with graph.inserting_after(root):
        op = graph.call_function(
            torch.ops.mxfp4.attention_with_sinks.default, (*operands, target.ATTENTION)
        )
    op.meta = {**root.meta, "example_value": _fake_result(root)}
    root.replace_all_uses_with(op)
    if is_kept:
        with graph.inserting_after(op):
            graph.call_function(attention_verification.compare, (layer, root, op, *operands))
        return
    for node in sorted({*match.nodes.values()}, reverse=True):
        for user in [*node.users]:
            if not user.users and op_name(user) == "getitem":
                graph.erase_node(user)  # the indices of the maximum, which nobody reads
        if not node.users:
            graph.erase_node(node)


def _fake_result(root: fx.Node) -> Tensor:
    value = known_tensor(root)
    with torch_private.without_saved_tensor_hooks(), value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
