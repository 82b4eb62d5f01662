"""The side effects of a call: on its arguments and on torch's modes."""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
import types
from typing import Any

import torch
from torch import fx

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.torch_private import OpOverload, schema_of
from mxfp4_fx.passes.graph import is_op, overloads, read_call


class Effect(enum.Flag):
    """What a call may do in place to its tensor arguments."""

    READS = 0
    WRITES = enum.auto()  # change values
    RESHAPES = enum.auto()  # change a tensor's shape, strides or autograd history
    REPOINTS = enum.auto()  # give a tensor other memory
    UNKNOWN = enum.auto()  # anything


def effect(node: fx.Node) -> Effect:
    """Return all that a call may do, from the schema of its op; UNKNOWN for a call without one.

    Schemas decide because no list of calls that write would be complete: ``inplace`` may be
    positional, and Dynamo does not trace into some functions.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return Effect.READS
    if "out" in node.kwargs:
        return Effect.WRITES | Effect.RESHAPES
    if is_op(node.target):
        return _of_overloads(overloads(node.target))
    if node.target in _OPERATORS:
        return _OPERATORS[node.target]
    if node.target is torch.nn.functional.embedding:  # with a largest norm it rescales its rows
        largest = [*node.args[3:4], node.kwargs.get("max_norm")]
        return Effect.WRITES if any(norm is not None for norm in largest) else Effect.READS
    if meant := _aten(node):
        return _of_overloads(meant)
    call = read_call(node)
    if call is not None:
        return Effect.WRITES if call.args.get("inplace") is True else Effect.READS
    return Effect.READS if node.target is torch.norm else Effect.UNKNOWN


_OPERATORS: dict[Any, Effect] = {
    getattr(operator, name): Effect.READS
    for name in (
        *("abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "invert", "le", "lshift"),
        *("lt", "matmul", "mod", "mul", "ne", "neg", "or_", "pos", "pow", "rshift", "sub"),
        *("truediv", "xor"),
    )
} | {
    getattr(operator, name): Effect.WRITES
    for name in (
        *("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow"),
        *("irshift", "isub", "itruediv", "ixor", "setitem"),
    )
}


def _aten(node: fx.Node) -> list[OpOverload]:
    """Return the ATen ops that a Tensor method or a builtin of torch may call without ``out``."""
    if node.op == "call_method":
        name = str(node.target)
    elif isinstance(node.target, types.BuiltinFunctionType):
        name = node.target.__name__
        if node.target not in [getattr(module, name, None) for module in torch_private.BUILTINS]:
            return []
    else:
        return []
    packet = getattr(torch.ops.aten, name, None)
    found = [op for op in overloads(packet) if not _is_out(op)] if packet else []
    # Some overloads are TorchScript's methods of Python lists, such as ``sort``.
    of_tensors = [op for op in found if str(schema_of(op).arguments[0].type) == "Tensor"]
    return of_tensors or found


# In-place ops that reshape or repoint a tensor although no tag of theirs says so.
_RESHAPE = {"requires_grad_", "retain_grad", "_coalesced_", "_mkldnn_transpose_"}
_REPOINT = {"set_", "set_data"}
# Ops that write running statistics although their schemas do not say so.
_STATISTICS = ("batch_norm", "instance_norm")


def _of_overloads(ops: list[OpOverload]) -> Effect:
    return functools.reduce(operator.or_, map(_of_overload, ops))


@functools.cache
def _of_overload(op: OpOverload) -> Effect:
    name = schema_of(op).name.partition("::")[2]
    if any(part in name for part in _STATISTICS):
        return Effect.UNKNOWN
    if not any(_is_written(argument) for argument in schema_of(op).arguments):
        return Effect.READS
    if op.namespace != "aten":
        return Effect.UNKNOWN
    if name in _REPOINT:
        return Effect.REPOINTS | Effect.RESHAPES
    if _is_out(op):
        return Effect.WRITES | Effect.RESHAPES
    if torch.Tag.inplace_view in op.tags or name in _RESHAPE or "resize" in name:
        return Effect.RESHAPES
    return Effect.WRITES


def _is_out(op: OpOverload) -> bool:
    return any(argument.is_out for argument in schema_of(op).arguments)


def _is_written(argument: Any) -> bool:
    info = argument.alias_info
    return info is not None and info.is_write and "Tensor" in str(argument.type)


@dataclasses.dataclass(frozen=True)
class Modes:
    """Torch's modes at one node, as far as autograd reads them.

    Autocast is none of them: the nodes themselves show what dtypes it gives them.

    Attributes:
        gradients: whether autograd records gradients.
        inference: whether ``torch.inference_mode`` is on.
    """

    gradients: bool
    inference: bool


def modes(graph: fx.Graph, begin: Modes | None = None) -> dict[fx.Node, Modes]:
    """Return the modes at each node.

    Args:
        begin: the modes that the graph begins in. Dynamo calls the backend in those of the graph
            that it captured, so the present ones are taken by default.
    """
    now = begin or Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    before: dict[fx.Node, Modes] = {}  # node that enters a mode -> the modes that its exit restores
    found: dict[fx.Node, Modes] = {}
    for node in graph.nodes:
        found[node] = now
        if node.target is torch_private.set_grad_enabled:
            now = dataclasses.replace(now, gradients=node.args[0])
        elif node.target is torch_private.enter_inference_mode:
            before[node], on = now, node.args[0]
            now = Modes(gradients=not on, inference=on)
        elif node.target is torch_private.exit_inference_mode:
            now = before[node.args[0]]
    return found
