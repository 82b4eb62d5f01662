"""The conditions for the rewrite of a matched region, besides its dataflow."""

from __future__ import annotations

import functools
from typing import NoReturn

import torch
from torch import Tensor, fx

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.errors import KernelsUnavailableError
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.core.hardware import DTYPES
from mxfp4_fx.core.torch_private import is_wrapper
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.effects import Effect, Modes, effect
from mxfp4_fx.passes.expressions import Op, Rounded
from mxfp4_fx.passes.graph import before_moves, read_call, tensor_of
from mxfp4_fx.passes.matcher import Match, Mismatch
from mxfp4_fx.passes.memory import Memory, is_transformed, may_share
from mxfp4_fx.passes.patterns import OUTPUTS
from mxfp4_fx.passes.routers import ROUTERS

WEIGHTS = ("gate_up", "gate_up_bias", "down", "down_bias")
# Packed weights only: gate_up and down are blocks then.
SCALES = ("gate_up_scales", "down_scales")
# The weights that are swizzled. Biases remain graph inputs.
_SWIZZLED = ("gate_up", "down", *SCALES)
# The inputs that the device ops save for the backward. The original experts save copies of them.
_KEPT = ("hidden", "gate_up_bias", "down_bias")
_MATMULS = {"grouped_mm", "bmm", "mxfp4.matmul_ogs"}
_INDEX_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)
# Ops whose result has the dtype of the arithmetic. Under autocast that is not the inputs' dtype.
_ARITHMETIC = {*_MATMULS, "add", "mul", "sigmoid", "clamp", "sum", "softmax", "cast"}


def check_region(
    root: fx.Node, match: Match, ctx: Context, memory: Memory, modes: dict[fx.Node, Modes]
) -> None:
    """Run every check on a matched region.

    Args:
        root: the node of the region's result.
        match: the solved proof of the region's dataflow.
        ctx: the state of the pipeline.
        memory: aliases and writes in the whole graph.
        modes: torch's modes at each node of the graph.

    Raises:
        Mismatch: a check fails; the reason is for the user.
    """
    _check_users(root, match)
    _check_shards(match, ctx)
    _check_types(match)
    _check_sizes(match)
    _check_device(match, ctx)
    _check_weights(match, ctx)
    records = _check_gradients(root, match, ctx, modes)
    _check_writes(root, match, memory, records)


def is_parameter(node: fx.Node, value: object) -> bool:
    """Return whether an input is a parameter, or a tensor that Dynamo marks as static.

    Dynamo marks buffers and other tensors that are the same object at every call.
    """
    return isinstance(value, torch.nn.Parameter) or torch_private.is_noted_as_weight(node)


def _check_users(root: fx.Node, match: Match) -> None:
    """Check that only the region reads its intermediates, except for those of the router."""
    inside = set(match.nodes.values())
    for expr, node in match.nodes.items():
        if node is root or expr in _ROUTER_OPS:
            continue
        for user in node.users:
            if user not in inside:
                _fail(match, f"the intermediate {node} is used elsewhere, by {user}", node)


def compute_dtype(match: Match) -> torch.dtype:
    """Return the dtype in which the logical op computes: that of its activations and its result.

    Autocast and casts may give a region several dtypes, which its nodes show. The op must not round
    where the region does not. It rounds its input, the rows between the matmuls and its result. The
    region rounds the same three at least as much: to the dtype of the first matmul, of the second,
    and of the experts' outputs, before their sum. So the op takes the widest of these.
    """
    inside = [
        value.dtype
        for expr, node in match.nodes.items()
        if (expr.op in _MATMULS or (isinstance(expr, Rounded) and expr.role == OUTPUTS))
        and (value := tensor_of(node)) is not None
    ]
    return functools.reduce(torch.promote_types, inside) if inside else _leaf(match, "hidden").dtype


def are_routes_moved(match: Match) -> bool:
    """Return whether the router is on another device, from which its routes are moved."""
    return before_moves(match.leaves["scores"]) is not match.leaves["scores"]


def dtypes_inside(match: Match) -> tuple[torch.dtype, ...]:
    """Return the dtypes that a checked region rounds to."""
    inside = {
        value.dtype
        for expr, node in match.nodes.items()
        if expr.op in _ARITHMETIC and (value := tensor_of(node)) is not None
    }
    return tuple(dtype for dtype in DTYPES if dtype in {*inside, compute_dtype(match)})


def _check_shards(match: Match, ctx: Context) -> None:
    """Check that no weight is a shard that ``localize`` could not let the graph take."""
    for name in _SWIZZLED:
        node = match.leaves.get(name)
        if node in ctx.no_shards:
            reason = f"{name} is a shard of a DTensor that cannot be read as it is: "
            _fail(match, reason + ctx.no_shards[node], node)


def _check_types(match: Match) -> None:
    hidden = _leaf(match, "hidden")
    supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    for name in ("hidden", *match.leaves):
        node, value = match.leaves[name], _leaf(match, name)
        if is_transformed(value):
            _fail(match, "it is inside a function transform, such as vmap", node)
        if is_wrapper(value):
            _fail(match, f"{name} is a {type(value).__name__}, not a plain tensor", node)
        is_packed = SCALES[0] in match.leaves and name in _SWIZZLED
        if is_packed and value.dtype != torch.uint8:
            _fail(match, f"{name} is {value.dtype}, not uint8", node)
        if not is_packed and name != "indices" and value.dtype not in DTYPES:
            what = "activations are" if name == "hidden" else f"{name} is"
            _fail(match, f"{what} {value.dtype}; supported are {supported}", node)
        if name == "indices" and value.dtype not in _INDEX_DTYPES:
            _fail(match, f"expert ids are {value.dtype}, not whole numbers", node)
        if value.device != hidden.device and not (
            name == "router_logits" and are_routes_moved(match)
        ):
            where = f"on {value.device}, the activations on {hidden.device}"
            _fail(match, f"{name} is {where}", node)
    for expr, node in match.nodes.items():
        result = tensor_of(node)
        if expr.op == "grouped_mm":
            _check_grouped(match, node)
        if expr.op not in _ARITHMETIC or result is None or result.dtype in DTYPES:
            continue
        if result.is_floating_point() or isinstance(expr, Rounded):
            _fail(match, f"computed in {result.dtype}; supported are {supported}", node)


def _check_grouped(match: Match, node: fx.Node) -> None:
    """Check what torch's fake tensors do not: no autocast casts for a grouped matmul."""
    call = read_call(node)
    assert call is not None  # the matcher has read it
    rows, weights = (tensor_of(call.args[name]) for name in ("input", "mat2"))
    if rows is None or weights is None or rows.dtype != weights.dtype:
        _fail(match, "it multiplies rows by weights of another dtype, which torch refuses", node)


def _check_sizes(match: Match) -> None:
    sizes = match.letters
    for letter in "AEHI":
        # The size of an input may be symbolic. `int` adds a guard that fixes it.
        sizes[letter] = int(sizes[letter])
    for letter, name in (("H", "hidden size"), ("I", "intermediate size")):
        if sizes[letter] % BLOCK:
            reason = f"the {name} {sizes[letter]} is not a multiple of {BLOCK}, MXFP4's block"
            _fail(match, reason, None)


def _check_device(match: Match, ctx: Context) -> None:
    try:
        ctx.target_for(_leaf(match, "hidden").device)
    except KernelsUnavailableError as error:
        _fail(match, str(error), None)


def _check_weights(match: Match, ctx: Context) -> None:
    """Check that each weight to swizzle is an input that is the same object at every call."""
    inputs = ctx.values(match.leaves["gate_up"].graph)
    for name in _SWIZZLED:
        node = match.leaves.get(name)
        if node is None:
            continue
        if node.op == "get_attr":
            reason = (
                f"{name} is a constant of the graph (TORCHINDUCTOR_FREEZING=1 makes it one): leave "
                "that out, and set options={'inductor': {'freezing': True}} instead"
            )
            _fail(match, reason, node)
        if node.op != "placeholder":
            call = getattr(node.target, "__name__", str(node.target))
            reason = f"{name} is not a parameter or buffer of the model: it is what {call} makes"
            _fail(match, reason, node)
        if not is_parameter(node, inputs[node]):
            _fail(match, f"{name} is not a parameter or buffer of the model", node)


def _check_gradients(
    root: fx.Node, match: Match, ctx: Context, modes: dict[fx.Node, Modes]
) -> bool:
    """Check that the region has one gradient mode and needs no gradient that MXFP4 lacks.

    Returns:
        Whether autograd records gradients in the region.
    """
    if not any(_leaf(match, name).requires_grad for name in match.leaves):
        return False
    for node in match.nodes.values():
        if modes[node] != modes[root]:
            reason = (
                "gradients are recorded for one part of it and not for another: put all of it "
                "under torch.no_grad() (or inference_mode), or none of it"
            )
            _fail(match, reason, node)
    if not modes[root].gradients:
        return False
    for name in WEIGHTS:
        if name in match.leaves and _leaf(match, name).requires_grad:
            reason = (
                f"{name} requires a gradient, which MXFP4 experts do not have: run under "
                "torch.no_grad(), or freeze the experts with requires_grad_(False)"
            )
            _fail(match, reason, match.leaves[name])
    inputs = ctx.values(match.leaves["gate_up"].graph)
    for name in (name for name in _KEPT if name in match.leaves):
        value = inputs.get(match.leaves[name])
        if isinstance(value, Tensor) and value.is_inference():
            reason = (
                f"{name} was made under torch.inference_mode(), and cannot be kept for gradients: "
                "make it outside, or run under torch.no_grad()"
            )
            _fail(match, reason, match.leaves[name])
    return True


def _check_writes(root: fx.Node, match: Match, memory: Memory, records: bool) -> None:
    """Check that no call writes to what the rewritten region reads.

    Weights must not change anywhere in the graph, all other values not between the region's first
    node and its root. Intermediates count as well: those of the router may have other readers,
    which may write to them. Where autograd records gradients, the inputs that it saves must not
    change after the region either.
    """
    first = min(match.nodes.values())
    values = match.leaves | {str(node): node for node in match.nodes.values()}
    for name, value in values.items():
        reshaper = memory.reshaper(value)
        if reshaper is not None:
            _fail(match, f"{name} is reshaped or detached in place, by {reshaper}", reshaper)
        mine = memory.of(value)
        for writer, written in memory.writes:
            kept = records and name in _KEPT and first < writer
            watched = name in _SWIZZLED or first < writer < root or kept
            if watched and may_share(mine, written):
                how = "may be" if effect(writer) & Effect.UNKNOWN else "is"
                _fail(match, f"{name} {how} written to in the graph, by {writer}", writer)
        for writer, written, later in memory.writes_outside:
            watched = name in _SWIZZLED or (later and records and name in _KEPT)
            if watched and may_share(mine, written):
                _fail(match, f"{name} may be written to outside of its region, by {writer}", None)


def _fail(match: Match, reason: str, node: fx.Node | None) -> NoReturn:
    raise Mismatch(reason, node, len(match.nodes))


def _leaf(match: Match, name: str) -> Tensor:
    value = tensor_of(match.leaves[name])
    assert value is not None  # Match.solve has read its shape
    return value


def _ops_of(*results: Op) -> set[Op]:
    found: set[Op] = set()
    todo: list[object] = list(results)
    while todo:
        expr = todo.pop()
        if isinstance(expr, Op):
            found.add(expr)
            todo += expr.args.values()
    return found


_ROUTER_OPS = _ops_of(*(op for router in ROUTERS for op in (router.scores, router.indices)))
