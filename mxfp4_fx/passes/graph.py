"""Canonical calls: what the nodes of a Dynamo graph compute.

Dynamo captures torch IR. One computation may be a method or a function, with positional or keyword
arguments, with defaults left out or not. :func:`read_call` removes these differences, so that one
pattern serves every spelling.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.torch_private import OpOverload, OpOverloadPacket, schema_of

Number = (int, float, torch.SymInt, torch.SymFloat)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call in canonical spelling: every argument by name, every default filled in.

    Tensor arguments are nodes. Scalar arguments are numbers (Python's or symbolic), even where a
    node computes them. A *view* and an *expand* have the argument ``shape``, the shape of their
    result.
    """

    op: str
    args: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Signature:
    """The names of the arguments in order, their defaults, and which of them are dimensions."""

    names: tuple[str, ...]
    defaults: dict[str, Any]
    dims: tuple[str, ...] = ()


def _signature(like: Callable[..., Any], *dims: str) -> _Signature:
    """Read a signature from the parameters of ``like``."""
    parameters = inspect.signature(like).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return _Signature(tuple(p.name for p in parameters), defaults, dims)


# Arguments that do not change the value are not in the canonical call: those of _IGNORED that a
# signature lacks, and those of _IGNORED_OF.
_SIGNATURES = {
    "add": _signature(lambda input, other, alpha=1: ...),
    "sub": _signature(lambda input, other, alpha=1: ...),
    "mul": _signature(lambda input, other: ...),
    "neg": _signature(lambda input: ...),
    **dict.fromkeys(
        ("eq", "ne", "lt", "gt", "ge", "mod", "fmod"), _signature(lambda input, other: ...)
    ),
    "where": _signature(lambda condition, input, other: ...),
    "floordiv": _signature(lambda input, other: ...),
    "clamp": _signature(lambda input, min=None, max=None: ...),
    "sigmoid": _signature(lambda input: ...),
    "silu": _signature(lambda input, inplace=False: ...),
    "gelu": _signature(lambda input, approximate="none": ...),
    "relu": _signature(lambda input, inplace=False: ...),
    "square": _signature(lambda input: ...),
    "chunk": _signature(lambda input, chunks, dim=0: ..., "dim"),
    "cat": _signature(lambda tensors, dim=0: ..., "dim"),
    "transpose": _signature(lambda input, dim0, dim1: ..., "dim0", "dim1"),
    "contiguous": _signature(lambda input, memory_format=torch.contiguous_format: ...),
    "max": _signature(lambda input, dim, keepdim=False: ..., "dim"),
    "dropout": _signature(lambda input, p=0.5, training=True, inplace=False: ...),
    "masked_fill": _signature(lambda input, mask, value: ...),
    "getitem": _signature(lambda input, index: ...),
    "cast": _signature(lambda input, dtype: ...),
    "sort": _signature(lambda input, dim=-1, descending=False, stable=False: ..., "dim"),
    "histc": _signature(lambda input, bins=100, min=0, max=0: ...),
    "cumsum": _signature(lambda input, dim, dtype=None: ..., "dim"),
    "topk": _signature(lambda input, k, dim=-1, largest=True, sorted=True: ..., "dim"),
    "softmax": _signature(lambda input, dim=None, dtype=None: ..., "dim"),
    "sum": _signature(lambda input, dim=None, keepdim=False, dtype=None: ..., "dim"),
    "repeat_interleave": _signature(lambda input, repeats, dim=None, output_size=None: ..., "dim"),
    "bmm": _signature(lambda input, mat2: ...),
    "matmul": _signature(lambda input, other: ...),
    "baddbmm": _signature(lambda input, batch1, batch2, beta=1, alpha=1: ...),
    "einsum": _signature(lambda equation, *operands: ...),
    "linear": _signature(lambda input, weight, bias=None: ...),
    "grouped_mm": _signature(lambda input, mat2, offs=None, bias=None, out_dtype=None: ...),
    "empty_like": _signature(lambda input: ...),
    "arange": _signature(lambda end: ...),
    "index_put": _signature(lambda input, indices, values, accumulate=False: ...),
}
_IGNORED = {"device", "memory_format", "_stacklevel"}
_IGNORED_OF = {"sort": {"stable"}, "repeat_interleave": {"output_size"}}

_VIEWS = {"view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"}
_CASTS = {"float": torch.float32, "int": torch.int32, "long": torch.int64}
_CASTS |= {"half": torch.float16, "bfloat16": torch.bfloat16}

_MOVES = {"to", "cpu", "cuda", "xpu"}

_FUNCTIONS: dict[Any, str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.neg: "neg",
    operator.eq: "eq",
    operator.ne: "ne",
    operator.lt: "lt",
    operator.gt: "gt",
    operator.ge: "ge",
    operator.floordiv: "floordiv",
    operator.mod: "mod",
    operator.getitem: "getitem",
    operator.matmul: "matmul",
    torch.floor_divide: "floordiv",
    torch.remainder: "mod",
    torch.where: "where",  # the method has its arguments in another order
    torch.clip: "clamp",
    torch.nn.functional.softmax: "softmax",
    torch.nn.functional.silu: "silu",
    torch.nn.functional.gelu: "gelu",
    torch.nn.functional.relu: "relu",
    torch.nn.functional.dropout: "dropout",  # torch.dropout has other arguments
    torch.nn.functional.linear: "linear",
    torch_private.linear: "linear",
}
# Ops that have a torch function or a Tensor method of the same name.
_SAME_NAME = set(_SIGNATURES) - {"getitem", "cast", "grouped_mm", "linear", "floordiv", "dropout"}
_SAME_NAME -= {"mod", "where"}
_FUNCTIONS |= {getattr(torch, n): n for n in _SAME_NAME | _VIEWS if hasattr(torch, n)}
_METHODS = {n: n for n in _SAME_NAME | _VIEWS} | {"floor_divide": "floordiv", "clip": "clamp"}
_METHODS |= {"remainder": "mod", "expand": "expand"}
# The grouped matmuls that the installed torch has.
_GROUPED_MM = {
    torch_private.grouped_mm,
    getattr(torch.nn.functional, "grouped_mm", None),
} - {None}
_GROUPED_MM_OPS = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
_OWN = "mxfp4."  # ops of this package, which packed experts call; their names are canonical


def op_name(node: fx.Node) -> str | None:
    """Return the canonical name of what a node calls, or None if no pattern uses it."""
    if node.op == "call_method":
        if node.target in _CASTS or node.target == "to":
            return "cast"
        return _METHODS.get(str(node.target))
    if node.op != "call_function":
        return None
    if is_op(node.target):
        named = str(node.target).removesuffix(".default")
        if named.startswith(_OWN):
            return named
        return "grouped_mm" if named in _GROUPED_MM_OPS else None
    return "grouped_mm" if node.target in _GROUPED_MM else _FUNCTIONS.get(node.target)


def read_call(node: fx.Node) -> Call | None:
    """Return the canonical call of a node, or None if it has none or its spelling is unknown."""
    name = op_name(node)
    if name is None:
        return None
    if name in _VIEWS:
        return _read_shape(node, "view")
    if name == "expand":
        return _read_shape(node, "expand")
    if name == "cast":
        return _read_cast(node)
    if name.startswith(_OWN):
        return _read_own(node)
    signature = _SIGNATURES[name]
    if len(node.args) > len(signature.names):
        return None
    given = dict(zip(signature.names, node.args, strict=False))
    if "self" in node.kwargs or given.keys() & node.kwargs.keys():
        return None
    ignored = _IGNORED - set(signature.names)
    given |= {k: v for k, v in node.kwargs.items() if k not in ignored}
    if given.keys() - set(signature.names):
        return None
    if signature.names[0] not in given:
        return None
    args = {**signature.defaults, **given}
    if args.keys() != set(signature.names):
        return None
    for without_effect in _IGNORED_OF.get(name, set()):
        del args[without_effect]
    args = {k: fx.node.map_arg(v, scalar_or_node) for k, v in args.items()}
    _normalize(args, signature.dims)
    return Call(name, args)


def _normalize(args: dict[str, Any], dims: tuple[str, ...]) -> None:
    """Make dims non-negative and drop a ``dtype`` that changes nothing, in place."""
    several = args.get("tensors")
    first = several[0] if isinstance(several, list | tuple) and several else None
    value = tensor_of(args.get("input", first))
    for dim in dims:
        if isinstance(args[dim], list | tuple) and len(args[dim]) == 1:
            args[dim] = args[dim][0]
        if value is not None and isinstance(args[dim], int) and args[dim] < 0:
            args[dim] += value.ndim
    if "dim0" in dims and all(isinstance(args[dim], int) for dim in dims):
        args["dim0"], args["dim1"] = sorted((args["dim0"], args["dim1"]))  # of a transposition
    if value is not None and value.is_floating_point() and args.get("dtype") == value.dtype:
        args["dtype"] = None


def _read_shape(node: fx.Node, op: str) -> Call | None:
    """Read any change of shape that keeps the order of the elements, or that repeats them."""
    base = node.args[0] if node.args else node.kwargs.get("input")
    before, after = tensor_of(base), tensor_of(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None  # `x.view(dtype)` reinterprets the bits
    return Call(op, {"input": base, "shape": tuple(after.shape)})


def _read_cast(node: fx.Node) -> Call | None:
    dtype = _CASTS.get(str(node.target))
    if dtype is None:
        rest = {k: v for k, v in node.kwargs.items() if k != "dtype"}
        dtypes = [*node.args[1:], *(v for k, v in node.kwargs.items() if k == "dtype")]
        if rest or len(dtypes) != 1 or not isinstance(dtypes[0], torch.dtype):
            return None
        dtype = dtypes[0]
    elif len(node.args) != 1 or node.kwargs:
        return None
    return Call("cast", {"input": node.args[0], "dtype": dtype})


def _read_own(node: fx.Node) -> Call | None:
    """Read a call of an op of this package, by its schema."""
    assert is_op(node.target)
    args = {a.name: a.default_value for a in schema_of(overloads(node.target)[0]).arguments}
    args |= dict(zip(args, node.args, strict=False)) | node.kwargs
    args = {k: fx.node.map_arg(v, scalar_or_node) for k, v in args.items()}
    return Call(op_name(node) or "", args)


def scalar_or_node(node: fx.Node) -> Any:
    """Return the number (Python's or symbolic) that a node computes, or else the node itself."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Number) else node


def tensor_of(node: object) -> Tensor | None:
    """Return the fake tensor of a node, or None if it has none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def known_tensor(node: fx.Node) -> Tensor:
    """Return the fake tensor of a node that has one."""
    value = tensor_of(node)
    assert value is not None
    return value


def before_moves(node: fx.Node) -> fx.Node:
    """Return the node whose value ``node`` has on another device; ``node`` itself if it has none.

    A move is a call of ``to``, ``cpu`` or the like that changes the device and nothing else.
    """
    while node.op == "call_method" and node.target in _MOVES and node.args:
        before, after = tensor_of(node.args[0]), tensor_of(node)
        if before is None or after is None or before.dtype != after.dtype:
            break
        if before.device == after.device:
            break
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node


def is_known(number: Any) -> bool:
    """Return whether a number is known at compile time; a float of ``.item()`` is not."""
    return not isinstance(number, torch.SymFloat) or number.node.hint is not None


def fixed(number: Any) -> int | None:
    """Return a whole number as an int, or None if it is none or computed from data.

    A symbolic one is fixed to its value by a guard.
    """
    if isinstance(number, torch.SymInt):
        return None if number.node.hint is None else int(number)
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def equal(a: Any, b: Any) -> bool:
    """Return whether two numbers are equal in every run of the graph, without a guard on a size.

    A symbolic *float* (a module attribute under ``dynamic=True``) is fixed to its value first. That
    adds a guard, so that another value compiles another graph.
    """
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, torch.SymFloat | float) or isinstance(b, torch.SymFloat | float):
        return float(a) == float(b)
    return bool(statically_known_true(a == b))


def equal_or_guard(a: Any, b: Any) -> bool:
    """Return :func:`equal`; if two sizes are equal now but maybe not in every run, add a guard."""
    if equal(a, b):
        return True
    if not any(isinstance(size, torch.SymInt) for size in (a, b)):
        return False
    hints = [size.node.hint if isinstance(size, torch.SymInt) else size for size in (a, b)]
    return None not in hints and hints[0] == hints[1] and bool(a == b)


def same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Return whether two shapes are the same in every run of the graph."""
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def is_op(target: object) -> TypeGuard[OpOverload | OpOverloadPacket]:
    """Return whether a call's target is an op of torch's dispatcher, and so has schemas."""
    return isinstance(target, OpOverload | OpOverloadPacket)


def overloads(
    target: OpOverload | OpOverloadPacket,
) -> list[OpOverload]:
    """Return the overload itself, or all overloads of a packet."""
    if isinstance(target, OpOverload):
        return [target]
    return [getattr(target, name) for name in target.overloads()]
