"""Seventh pass: lower linears on a CPU to ``mxfp4::linears``, which is fast for few rows.

A linear of few rows takes the time in which its weight is read, and the native kernel reads faster
than torch's. The op looks at the number of rows when it runs, and calls torch's linear for many.
Linears that share their input, as q, k and v do, become one call.

The op reads a weight as the model holds it at that moment. So weights may be tied and may change.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mxfp4_fx.core import hardware, torch_private_dynamo
from mxfp4_fx.core.torch_private import is_wrapper
from mxfp4_fx.ops import target
from mxfp4_fx.passes.checks import is_parameter
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.effects import Modes, modes
from mxfp4_fx.passes.graph import known_tensor, read_call, same_shape, tensor_of
from mxfp4_fx.passes.memory import Memory, is_transformed, may_share, needed


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear in the graph: its node, input, weight and bias, and torch's modes there."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    modes: Modes

    @property
    def operands(self) -> list[fx.Node]:
        return [self.x, self.weight, *([] if self.bias is None else [self.bias])]


def lower_linears(gm: fx.GraphModule, ctx: Context) -> None:
    """Replace linears by ``mxfp4::linears``; report how many.

    A linear stays where it needs gradients, where Inductor packs its weight, and in a graph whose
    regions are compared with their rewrites.
    """
    options = ctx.options
    if not options.linears or ctx.verifying:
        return
    if options.inner == "inductor" and torch_private_dynamo.inductor_freezes(
        options.mode, options.inductor
    ):
        return
    found = _linears(gm.graph, ctx)
    if not found:
        return
    memory = Memory(gm.graph, ctx.values(gm.graph), ctx.around)
    found = [one for one in found if not any(map(memory.reshaper, (one.node, *one.operands)))]
    groups = [
        group
        for group in groups_of(found, memory)
        if target.linears_pay([known_tensor(linear.weight) for linear in group])
    ]
    if groups and target.has_native_linears(options.kernels):
        for group in groups:
            weights, biases = [one.weight for one in group], [one.bias for one in group]
            replace(group, torch.ops.mxfp4.linears.default, (weights, biases, "cpu"))
            ctx.report.linears += len(group)


def _linears(graph: fx.Graph, ctx: Context) -> list[Linear]:
    """Return the linears of a graph that the op can compute."""
    modes_at, inputs, read = modes(graph, ctx.begin), ctx.values(graph), needed(graph)
    found = []
    for node in graph.nodes:
        call = read_call(node) if node in read else None
        if call is None or call.op != "linear":
            continue
        operands = call.args["input"], call.args["weight"], call.args["bias"]
        linear = Linear(node, *operands, modes_at[node])
        weights = linear.operands[1:]
        are_held = all(held in inputs and is_parameter(held, inputs[held]) for held in weights)
        if are_held and _is_for_op(linear):
            found.append(linear)
    return found


def _is_for_op(linear: Linear) -> bool:
    """Return whether the op computes what a linear computes, in every run of the graph."""
    tensors = [tensor_of(node) for node in (linear.node, *linear.operands)]
    known = [tensor for tensor in tensors if tensor is not None and _is_plain(tensor)]
    if len(known) < len(tensors):
        return False
    y, x, weight, *bias = known
    if any(tensor.dtype != y.dtype for tensor in known):
        return False  # autocast casts the operands
    if linear.modes.gradients and any(tensor.requires_grad for tensor in known):
        return False
    sizes = weight.shape
    if len(sizes) != 2 or not all(isinstance(size, int) and size for size in sizes) or not x.ndim:
        return False
    if weight.stride(1) != 1 or any(one.stride() != (1,) for one in bias):
        return False
    if not is_contiguous_of(y, (*x.shape[:-1], sizes[0])):
        return False
    rows = math.prod(x.shape[:-1])
    return not statically_known_true(rows > target.linear_rows(y.dtype))


def _is_plain(value: Tensor) -> bool:
    return (
        value.device.type == "cpu"
        and value.dtype in hardware.LINEAR_BYTES
        and value.layout is torch.strided
        and not is_transformed(value)
        and not is_wrapper(value)
    )


def is_contiguous_of(y: Tensor, shape: tuple[Any, ...]) -> bool:
    """Return whether a tensor has a shape and is contiguous."""
    strides = tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))
    return same_shape(tuple(y.shape), shape) and same_shape(y.stride(), strides)


def groups_of(linears: list[Linear], memory: Memory) -> list[list[Linear]]:
    """Return linears that can be one call at the place of the first of them.

    They share input and modes, and between the first and any other nothing may write to what that
    one reads.
    """
    open_: dict[Hashable, list[Linear]] = {}
    found = []
    for linear in linears:
        key = linear.x, linear.modes
        group = open_.get(key)
        if group is None or _is_written(linear, group[0].node, memory):
            group = open_[key] = []
            found.append(group)
        group.append(linear)
    return found


def _is_written(linear: Linear, since: fx.Node, memory: Memory) -> bool:
    mine = [memory.of(operand) for operand in linear.operands]
    return any(
        since < writer < linear.node and any(may_share(keys, written) for keys in mine)
        for writer, written in memory.writes
    )


def replace(
    group: list[Linear],
    op: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    is_kept: bool = False,
) -> tuple[fx.Node, list[fx.Node]]:
    """Put one call in the place of linears of one input, where the first of them is.

    Args:
        group: the linears.
        op: returns the result of each.
        arguments: its arguments behind the input.
        is_kept: the linears stay in the graph, without users.

    Returns:
        The call, and the nodes of its results.
    """
    first = group[0].node
    graph = first.graph
    call_now = read_call(first)
    assert call_now is not None
    x = call_now.args["input"]  # another group may have replaced the one that was found
    with graph.inserting_before(first):
        call = graph.call_function(op, (x, *arguments))
        results = [graph.call_function(operator.getitem, (call, at)) for at in range(len(group))]
    call.meta = dict(first.meta)
    call.meta["example_value"] = [known_tensor(linear.node) for linear in group]
    for linear, result in zip(group, results, strict=True):
        result.meta = dict(linear.node.meta)
        linear.node.replace_all_uses_with(result)
        if not is_kept:
            graph.erase_node(linear.node)
    return call, results
