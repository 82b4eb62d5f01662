"""Reading a Dynamo graph: what a node computes, what it aliases, what it writes, whence it came.

Dynamo hands out torch IR: methods and functions, positional and keyword arguments, defaults left
out or not. :func:`read_call` removes these differences, so that one pattern serves every spelling.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_TORCH = os.path.dirname(torch.__file__) + os.sep

Number = (int, float, torch.SymInt, torch.SymFloat)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call, spelled the canonical way: every argument by name, every default filled in.

    Scalar arguments are numbers (Python's or symbolic) also where the graph computes them; tensor
    arguments are nodes. A *view* has the argument ``shape``: the shape that comes out.
    """

    op: str
    args: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Signature:
    """Argument names in order, ``=default`` where there is one; which of them are dimensions."""

    names: tuple[str, ...]
    defaults: dict[str, Any]
    dims: tuple[str, ...] = ()


def _signature(like: Callable[..., Any], *dims: str) -> _Signature:
    """The signature of a function written for it."""
    parameters = inspect.signature(like).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return _Signature(tuple(p.name for p in parameters), defaults, dims)


# Arguments that do not change the value are left out of the canonical call (_IGNORED).
_SIGNATURES = {
    "add": _signature(lambda input, other, alpha=1: ...),
    "mul": _signature(lambda input, other: ...),
    "neg": _signature(lambda input: ...),
    "ge": _signature(lambda input, other: ...),
    "floordiv": _signature(lambda input, other: ...),
    "clamp": _signature(lambda input, min=None, max=None: ...),
    "sigmoid": _signature(lambda input: ...),
    "silu": _signature(lambda input, inplace=False: ...),
    "chunk": _signature(lambda input, chunks, dim=0: ..., "dim"),
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

_FUNCTIONS: dict[Any, str] = {
    operator.add: "add",
    operator.mul: "mul",
    operator.neg: "neg",
    operator.ge: "ge",
    operator.floordiv: "floordiv",
    operator.getitem: "getitem",
    operator.matmul: "matmul",
    torch.floor_divide: "floordiv",
    torch.clip: "clamp",
    torch.nn.functional.softmax: "softmax",
    torch.nn.functional.silu: "silu",
    torch.nn.functional.linear: "linear",
    torch._C._nn.linear: "linear",
}
# Names of torch functions and of Tensor methods that stand for the op of the same name.
_SAME_NAME = set(_SIGNATURES) - {"getitem", "cast", "grouped_mm", "linear", "floordiv"}
_FUNCTIONS |= {getattr(torch, n): n for n in _SAME_NAME | _VIEWS if hasattr(torch, n)}
_METHODS = {n: n for n in _SAME_NAME | _VIEWS} | {"floor_divide": "floordiv", "clip": "clamp"}
# Which grouped matmuls there are depends on the versions installed.
_GROUPED_MM = {
    getattr(torch, "_grouped_mm", None),
    getattr(torch.nn.functional, "grouped_mm", None),
} - {None}
_GROUPED_MM_OPS = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
_OWN = "mxfp4."  # ops of this package, which packed experts call; the names are their own


def op_name(node: fx.Node) -> str | None:
    """The canonical name of what a node calls, or None for everything no pattern speaks of."""
    if node.op == "call_method":
        if node.target in _CASTS or node.target == "to":
            return "cast"
        return _METHODS.get(str(node.target))
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        named = str(node.target).removesuffix(".default")
        if named.startswith(_OWN):
            return named
        return "grouped_mm" if named in _GROUPED_MM_OPS else None
    return "grouped_mm" if node.target in _GROUPED_MM else _FUNCTIONS.get(node.target)


def read_call(node: fx.Node) -> Call | None:
    """The canonical call of a node; None where it has none or is spelled in a way not known."""
    name = op_name(node)
    if name is None:
        return None
    if name in _VIEWS:
        return _read_view(node)
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
    given |= {k: v for k, v in node.kwargs.items() if k not in _IGNORED}
    if given.keys() - set(signature.names):
        return None
    if signature.names[0] not in given:
        return None
    args = {**signature.defaults, **given}
    if args.keys() != set(signature.names):
        return None
    for ignored in _IGNORED_OF.get(name, set()) | (_IGNORED & args.keys()):
        del args[ignored]
    args = {k: fx.node.map_arg(v, scalar_or_node) for k, v in args.items()}
    _normalize(args, signature.dims)
    return Call(name, args)


def _normalize(args: dict[str, Any], dims: tuple[str, ...]) -> None:
    """Non-negative dims; no ``dtype`` that changes nothing."""
    value = tensor_of(args.get("input"))
    for dim in dims:
        if isinstance(args[dim], list | tuple) and len(args[dim]) == 1:
            args[dim] = args[dim][0]
        if value is not None and isinstance(args[dim], int) and args[dim] < 0:
            args[dim] += value.ndim
    if value is not None and value.is_floating_point() and args.get("dtype") == value.dtype:
        args["dtype"] = None


def _read_view(node: fx.Node) -> Call | None:
    """Any rearrangement of the shape that keeps the order of the elements."""
    base = node.args[0] if node.args else node.kwargs.get("input")
    before, after = tensor_of(base), tensor_of(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None  # `x.view(dtype)` reads the bits anew
    return Call("view", {"input": base, "shape": tuple(after.shape)})


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
    """An op of this package, by its schema."""
    assert isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    args = {a.name: a.default_value for a in _schemas(node.target)[0].arguments}
    args |= dict(zip(args, node.args, strict=False)) | node.kwargs
    args = {k: fx.node.map_arg(v, scalar_or_node) for k, v in args.items()}
    return Call(op_name(node) or "", args)


def scalar_or_node(node: fx.Node) -> Any:
    """The number a node stands for (Python's or symbolic), or the node itself."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Number) else node


def tensor_of(node: object) -> Tensor | None:
    """The fake tensor of a node, or None where it has none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def equal(a: Any, b: Any) -> bool:
    """Whether two numbers are the same for every run of the graph; adds no guard on a size.

    A symbolic *float* (a module attribute under ``dynamic=True``) is fixed to its value first,
    which guards it: another value then compiles another graph, as it must.
    """
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, torch.SymFloat | float) or isinstance(b, torch.SymFloat | float):
        return float(a) == float(b)
    return bool(statically_known_true(a == b))


def equal_or_guard(a: Any, b: Any) -> bool:
    """:func:`equal`; two sizes that are equal now, but not for every run, become so by a guard."""
    if equal(a, b):
        return True
    if not any(isinstance(size, torch.SymInt) for size in (a, b)):
        return False
    hints = [size.node.hint if isinstance(size, torch.SymInt) else size for size in (a, b)]
    return None not in hints and hints[0] == hints[1] and bool(a == b)


def same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two shapes are the same for every run of the graph."""
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def tensors_in(node: fx.Node) -> Iterator[Tensor]:
    """The fake tensors that a node yields: one, or those of a tuple."""
    value = node.meta.get("example_value")
    for leaf in value if isinstance(value, list | tuple) else (value,):
        if isinstance(leaf, Tensor):
            yield leaf


def storages(node: fx.Node) -> set[object]:
    """Keys of the memory behind a node; nodes that may alias share one, or have :data:`UNKNOWN`.

    Dynamo propagates fake tensors, and a view's fake tensor shares its base's storage.
    """
    return {_storage(t) for t in tensors_in(node) if t.layout is torch.strided}


# The key of memory that cannot be told: of values inside function transforms such as vmap.
UNKNOWN = "unknown"


def _storage(value: Tensor) -> object:
    if is_transformed(value):
        return UNKNOWN
    return value.untyped_storage()._cdata


def is_transformed(value: Tensor) -> bool:
    """Whether a value is inside a function transform (``torch.func``: vmap, grad)."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


class Memory:
    """Who shares memory with whom in a graph, and who may write to it.

    Attributes:
        writes: each call that may write, in order, with the keys of the memory that it is given.
    """

    def __init__(self, graph: fx.Graph, inputs: list[Any]) -> None:
        # Inputs have fake storages of their own even where the real memory is one (a parameter and
        # a view of it, or an array of numpy's): the real memory is a second key.
        self._shared: dict[object, object] = {}
        areas = _areas([value for value in inputs if _has_memory(value)])
        for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
            if _has_memory(value):
                self._shared |= {key: ("input", areas[id(value)]) for key in storages(node)}
        self.writes = [(node, self._given(node)) for node in graph.nodes if may_write(node)]

    def _given(self, node: fx.Node) -> set[object]:
        given = {key for argument in node.all_input_nodes for key in self.of(argument)}
        # A transform's calls are many and nearly all read: only sure writes are suspected of all.
        return given if surely_writes(node) else given - {UNKNOWN}

    def of(self, node: fx.Node) -> set[object]:
        """Keys of the memory behind a node."""
        keys = storages(node)
        return keys | {self._shared[key] for key in keys if key in self._shared}


def _has_memory(value: object) -> bool:
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return False
    return value.layout is torch.strided and not is_traceable_wrapper_subclass(value)


def _areas(values: list[Tensor]) -> dict[int, int]:
    """id of a tensor -> number of the piece of memory that it is in; what overlaps is one piece."""
    spans = sorted(
        (value.device.type, value.device.index or 0, s.data_ptr(), s.data_ptr() + s.nbytes(), at)
        for at, value in enumerate(values)
        for s in (value.untyped_storage(),)
    )
    found: dict[int, int] = {}
    area, end, device = 0, 0, None
    for *where, start, stop, at in spans:
        if where != device or start >= end:
            area, end, device = area + 1, stop, where
        end = max(end, stop)
        found[id(values[at])] = area
    return found


# What models do with router scores besides: statistics, losses, masks. None takes ``inplace``.
_READS = {
    *("abs", "amax", "amin", "argmax", "bincount", "clone", "contiguous", "detach", "exp", "log"),
    *("logsumexp", "max", "mean", "min", "norm", "numel", "one_hot", "size", "std", "var"),
    *("eq", "ge", "gt", "le", "lt", "ne", "div", "pow", "sub", "truediv"),
    *("cat", "expand", "gather", "permute", "stack", "t", "transpose", "where"),
}


def may_write(node: fx.Node) -> bool:
    """Whether a call may write to its arguments: it may unless it is known not to.

    There are too many ways to write (``out=``, ``inplace`` by position, functions that Dynamo does
    not look into) for a list of them to be complete.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return any(schema.is_mutable for schema in _schemas(node.target))
    name = getattr(node.target, "__name__", str(node.target))
    spellings = (getattr(module, name, None) for module in (torch, operator, torch.nn.functional))
    if name in _READS and (node.op == "call_method" or node.target in spellings):
        return "out" in node.kwargs
    call = read_call(node)
    return call is None or call.args.get("inplace") is True


def surely_writes(node: fx.Node) -> bool:
    """Whether the call's name says that it writes; for the words of a report."""
    name = getattr(node.target, "__name__", str(node.target))
    return name.endswith("_") or name == "setitem"


def _schemas(target: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> list[Any]:
    if isinstance(target, torch._ops.OpOverload):
        return [target._schema]
    return [getattr(target, name)._schema for name in target.overloads()]


def module_name(node: fx.Node) -> str:
    """The qualified name of the module whose forward made a node, as ``named_modules`` has it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "(top level)"
    # Dynamo writes L['self'].model.layers[0].mlp or L['self']._modules['model']._modules['0'].
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"(?:\._modules)?\[['\"]?(\w+)['\"]?\]", r".\1", path)
    return re.sub(r"^L\.\w+\.?", "", path) or "(top level)"


def comes_from(node: fx.Node, file: str) -> bool:
    """Whether code in ``file``, the end of a path, made a node."""
    return f'{file}", line' in (node.meta.get("stack_trace") or "").replace("\\", "/")


def source_line(node: fx.Node) -> str:
    """The line of model code, not torch's, that made a node: ``file:line: code``, or ""."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    for at in range(len(lines) - 1, -1, -1):
        found = re.match(r'\s*File "(.*?)", line (\d+)', lines[at])
        if found and not found[1].startswith(_TORCH):
            code = lines[at + 1].strip() if at + 1 < len(lines) else ""
            file = found[1].replace("\\", "/").rpartition("/")[2]
            return f"{file}:{found[2]}: {code}"
    return ""
