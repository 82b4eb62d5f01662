"""Sixth pass: ``options["linears"] = "mxfp8"``: linears read their weights in MXFP8.

The weights are bound as those of experts are (``weights/bindings.py``): quantized once, shared by
graphs, noticed when they change, and freed with ``free_weights``. The router's linear stays exact,
because a small error there chooses other experts. Every other linear of a parameter that stays is
reported with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import mxfp4_fx.ops.schemas  # noqa: F401  (defines torch.ops.mxfp4)
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.core.hardware import DTYPES
from mxfp4_fx.core.layouts import MXFP8_ROWS
from mxfp4_fx.core.skip import WHY_SKIPPED, Skip
from mxfp4_fx.core.torch_private import is_wrapper
from mxfp4_fx.ops import target
from mxfp4_fx.passes import linear_verification
from mxfp4_fx.passes.checks import is_parameter
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.effects import modes
from mxfp4_fx.passes.graph import known_tensor, op_name, read_call, tensor_of
from mxfp4_fx.passes.lower_linears import Linear, groups_of, is_contiguous_of, replace
from mxfp4_fx.passes.lower_moe import erase_unread, swizzled_inputs
from mxfp4_fx.passes.memory import Memory, is_transformed, may_share, needed
from mxfp4_fx.passes.origin import module_name, owner_name, source_line
from mxfp4_fx.passes.report import Miss, QuantizedLinear
from mxfp4_fx.weights.source import LINEAR

_OPS = torch.ops.mxfp4
# Calls that choose experts -> their arguments that a router computes.
_CHOICES = {
    _OPS.routing.default: (0,),
    _OPS.routing.routes: (0, 1),
    _OPS.moe.adapted: (1, 2),
}
_MATMULS = {"matmul", "linear", "bmm", "baddbmm", "addmm", "grouped_mm", "einsum"}


class _Stays(Exception):
    """A linear stays exact, for the reason in the message."""


def quantize_linears(gm: fx.GraphModule, ctx: Context) -> None:
    """Let linears read MXFP8, if the option says so; report each, and each that stays.

    Raises:
        KernelsUnavailableError: there are no kernels for the device.
    """
    if ctx.options.linears != "mxfp8":
        return
    found = linears_of_parameters(gm.graph, ctx)
    if not found:
        return
    memory = Memory(gm.graph, ctx.values(gm.graph), ctx.around)
    routers = _routers(gm.graph)
    chosen = []
    for linear in found:
        if linear.node in routers:
            continue
        try:
            _check(linear, memory, ctx)
        except _Stays as stays:
            reason = str(stays)
            ctx.report.linear_misses.append(
                Miss(
                    layer_of(linear),
                    reason,
                    source_line(linear.node),
                    skipped=reason == WHY_SKIPPED,
                    inputs=(ctx.slots(gm.graph)[linear.weight],),
                )
            )
            continue
        chosen.append(linear)
    # Those that nobody reads have calls of their own, which compilers drop.
    read = needed(gm.graph)
    parts = [[one for one in chosen if (one.node in read) == is_read] for is_read in (True, False)]
    for group in [group for part in parts for group in groups_of(part, memory)]:
        _quantize(group, ctx)
    erase_unread(gm.graph, ctx)


def linears_of_parameters(graph: fx.Graph, ctx: Context) -> list[Linear]:
    """Return the linears whose weights are parameters among the graph's inputs.

    Those that nobody reads are among them, because their weights may be freed; compilers drop them.
    """
    modes_at, inputs = modes(graph, ctx.begin), ctx.values(graph)
    found = []
    for node in graph.nodes:
        call = read_call(node)
        if call is None or call.op != "linear":
            continue
        linear = Linear(
            node, call.args["input"], call.args["weight"], call.args["bias"], modes_at[node]
        )
        if linear.weight in inputs and is_parameter(linear.weight, inputs[linear.weight]):
            found.append(linear)
    return found


def layer_of(linear: Linear) -> str:
    """Return the name of the module that holds a linear's weight, as far as the graph tells."""
    return owner_name(linear.weight) or module_name(linear.node)


def _routers(graph: fx.Graph) -> set[fx.Node]:
    """Return the linears whose results choose experts.

    They are found from the choice backwards, up to the first matmul.
    """
    todo: list[Any] = []
    for node in graph.nodes:
        at = _CHOICES.get(node.target, (0,) if op_name(node) == "topk" else ())
        todo += [node.args[i] for i in at if i < len(node.args)]
    seen, found = set(), set()
    while todo:
        node = todo.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if op_name(node) in _MATMULS:
            found.add(node)
        else:
            todo += node.all_input_nodes
    return found


def _check(linear: Linear, memory: Memory, ctx: Context) -> None:
    """Check that the op computes the linear, but for its weight's rounding.

    Raises:
        _Stays: it does not, or the user wants the linear left as it is.
    """
    if _why_left(linear, ctx):
        raise _Stays(WHY_SKIPPED)
    tensors = [tensor_of(node) for node in (linear.node, *linear.operands)]
    known = [tensor for tensor in tensors if tensor is not None]
    if len(known) < len(tensors) or any(map(is_transformed, known)):
        raise _Stays("it is inside a function transform, such as vmap")
    if any(map(is_wrapper, known)):
        raise _Stays("an operand is of a subclass of Tensor")
    y, x, weight, *bias = known
    dtypes = {tensor.dtype for tensor in known}
    if len(dtypes) > 1 or y.dtype not in DTYPES:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise _Stays(f"its dtypes must be one of float32, bfloat16 and float16; they are {names}")
    sizes = weight.shape
    if len(sizes) != 2 or not all(isinstance(size, int) and size for size in sizes) or not x.ndim:
        raise _Stays(f"its weight must be [N, K]; it is {tuple(sizes)}")
    if sizes[1] % BLOCK:
        raise _Stays(f"MXFP8 needs a multiple of {BLOCK} input features, and it has {sizes[1]}")
    if linear.modes.gradients and any(one.requires_grad for one in (weight, *bias)):
        raise _Stays(
            "its weight requires a gradient, which MXFP8 has none of: run under torch.no_grad(), "
            "or freeze it with requires_grad_(False)"
        )
    if not is_contiguous_of(y, (*x.shape[:-1], sizes[0])):
        raise _Stays("its result is not contiguous")
    if any(map(memory.reshaper, (linear.node, *linear.operands))):
        raise _Stays("an operand or its result is reshaped in place")
    mine = memory.of(linear.weight)
    if any(may_share(mine, written) for _, written in memory.writes):
        raise _Stays("the graph may write to its weight")
    if any(may_share(mine, written) for _, written, _ in memory.writes_outside):
        raise _Stays("the graph around its region may write to its weight")


def _why_left(linear: Linear, ctx: Context) -> bool:
    """Return whether ``options["skip"]`` names the linear's module."""
    at = ctx.slots(linear.weight.graph)[linear.weight]
    if at in ctx.left:
        return ctx.left[at] is not None
    return Skip(ctx.options.skip).names(layer_of(linear))


def _quantize(group: list[Linear], ctx: Context) -> None:
    """Put one call of the op in the place of linears of one input."""
    device = known_tensor(group[0].weight).device
    kernels = target.mxfp8_kernels(ctx.target_for(device), device)
    slots = ctx.slots(group[0].node.graph)
    parts = []
    for linear in group:
        layer = layer_of(linear)
        held = swizzled_inputs((linear.weight,), LINEAR, MXFP8_ROWS, f"weight of {layer}", ctx)
        weight = known_tensor(linear.weight)
        n, k = weight.shape
        ctx.report.mxfp8.append(
            QuantizedLinear(
                layer,
                n,
                k,
                kernels,
                bytes_before=weight.numel() * weight.element_size(),
                bytes_after=sum(known_tensor(part).numel() for part in held),
                inputs=(slots[linear.weight],),
            )
        )
        parts.append(held)
    codes, scales = [part[0] for part in parts], [part[1] for part in parts]
    biases = [linear.bias for linear in group]
    call, results = replace(
        group,
        _OPS.linears_mxfp8.default,
        (codes, scales, biases, kernels),
        is_kept=ctx.verifying,
    )
    if not ctx.verifying:
        return
    graph = call.graph
    for linear, result in zip(group, results, strict=True):
        now = read_call(linear.node)
        assert now is not None
        operands = (now.args["input"], linear.weight, linear.bias)
        with graph.inserting_after(max(result, linear.node)):
            graph.call_function(
                linear_verification.compare, (layer_of(linear), linear.node, result, *operands)
            )
