"""From a graph of ATen's ops, as AOTAutograd hands it to a compiler, to a native program.

The graph of a decoded token has this package's ops, and between them norms, rotations and sums of
a few thousand values. Where a graph is made of these alone, and its sizes are fixed, it becomes a
program, which one native call runs (``ops/program.py``). All other graphs are Inductor's. Arguments
may have symbolic sizes if only attention reads them: keys, values and masks.

An instruction between the ops computes in float32 and rounds to the dtype that its result has, as
PyTorch does uncompiled. Inductor leaves such roundings out.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mxfp4_fx.ops import cpu_structs, program
from mxfp4_fx.ops.cpu_structs import DTYPES
from mxfp4_fx.ops.program import Program
from mxfp4_fx.passes import native_ops
from mxfp4_fx.passes.native_ops import Translation
from mxfp4_fx.passes.native_values import VIEWS, NoProgram, Value, Values

_aten, _prims = torch.ops.aten, torch.ops.prims
# One thread computes what lies between the ops.
_MOST_ELEMENTS = 1 << 16
_COPY, _ADD, _SUB, _MUL, _RSQRT, _MEAN = range(6)  # api.h: mxfp4_operation
_BINARY = {_aten.add.Tensor: _ADD, _aten.sub.Tensor: _SUB, _aten.mul.Tensor: _MUL}


def program_of(gm: fx.GraphModule, examples: Sequence[Any]) -> Program:
    """Make a program of a graph for inference.

    Args:
        gm: a graph of ATen's ops; each node has its fake values as ``meta["val"]``.
        examples: its arguments: tensors, fake ones too, and numbers.

    Raises:
        NoProgram: the graph has another op, device, dtype or size, or no op of this package.
    """
    *nodes, output = gm.graph.nodes
    returned: Any = output.args[0]
    if not all("val" in node.meta for node in nodes):
        raise NoProgram("a pass has left a node without its fake value")
    values = Values(nodes, [node for node in returned if isinstance(node, fx.Node)])
    for at, node in enumerate(nodes):
        if node.op == "placeholder":
            values.add_argument(node, at, examples[at])
        else:
            _add(values, node)
        values.release(node, at)
    if not any(node.target in native_ops.TRANSLATIONS for node in nodes):
        raise NoProgram("it has no op of this package")
    return Program(values.builder, [values.result(node) for node in returned])


def _add(values: Values, node: fx.Node) -> None:
    args: Any = node.args
    if node.target is operator.getitem:
        values.add_item(node, *args)
    elif node.target in VIEWS:
        values.add_view(node)
    else:
        translate = _TRANSLATIONS.get(node.target)
        if translate is None:
            raise NoProgram(f"there is no instruction for {node.target}")
        translate(values, node)


def _copy(values: Values, node: fx.Node) -> None:
    """Add a conversion to another dtype."""
    _add_elementwise(values, _COPY, values.of(node.args[0]), None, values.make(node))


def _binary(values: Values, node: fx.Node) -> None:
    args: Any = node.args
    a, b = args
    operation = _BINARY[node.target]  # type: ignore[index]
    if node.kwargs.get("alpha", 1) != 1 or not isinstance(a, fx.Node):
        raise NoProgram("a number is the first of two operands, or a factor")
    right = values.of(b) if isinstance(b, fx.Node) else b
    left, dtype = values.of(a), node.meta["val"].dtype
    for one in (left, right):
        is_number = not isinstance(one, Value) or (not one.shape and one.dtype != dtype)
        if is_number and dtype != torch.float32:
            raise NoProgram("PyTorch rounds a number beside 16 bits for some operations only")
    if not isinstance(right, Value) and not abs(right) <= torch.finfo(torch.float32).max:
        raise NoProgram(f"{right} is no number of float32")
    _add_elementwise(values, operation, left, right, values.make(node))


def _square(values: Values, node: fx.Node) -> None:
    x = values.of(node.args[0])
    if node.args[1] != 2:
        raise NoProgram(f"a power of {node.args[1]}")
    _add_elementwise(values, _MUL, x, x, values.make(node))


def _rsqrt(values: Values, node: fx.Node) -> None:
    _add_elementwise(values, _RSQRT, values.of(node.args[0]), None, values.make(node))


def _mean(values: Values, node: fx.Node) -> None:
    x = values.of(node.args[0])
    is_of_rows = node.args[1:] in (([-1], True), ([len(x.shape) - 1], True))
    if not is_of_rows or node.kwargs:
        raise NoProgram("a mean over other dimensions than the last")
    _add_elementwise(values, _MEAN, x, None, values.make(node))


def _matmul(values: Values, node: fx.Node) -> None:
    """Add a linear that is too small for ``lower_linears``, as ATen has it: x @ weight.T + bias."""
    args: Any = node.args
    *bias, x, transposed = args
    weight = values.of(transposed)
    if (
        node.kwargs
        or weight.stride[0] != 1
        or any(values.of(b).shape != weight.shape[1:] for b in bias)
    ):
        raise NoProgram("a matrix product is no linear")
    rows = weight._replace(shape=weight.shape[::-1], stride=weight.stride[::-1])
    native_ops.add_linears(
        values, values.of(x), [rows], bias or [None], lambda: [values.make(node)]
    )


def _cat(values: Values, node: fx.Node) -> None:
    args: Any = node.args
    parts, out = values.all_of(args[0]), values.make(node)
    dim = (args[1] if len(args) > 1 else 0) % len(out.shape)
    at = 0
    for part in parts:
        if len(part.shape) != len(out.shape) or part.dtype != out.dtype:
            raise NoProgram("tensors of several dtypes, or numbers of dimensions, are joined")
        target = out._replace(offset=at * out.stride[dim], shape=part.shape)
        _add_elementwise(values, _COPY, part, None, target)
        at += part.shape[dim]


_TRANSLATIONS: dict[Any, Translation] = {
    **native_ops.TRANSLATIONS,
    **dict.fromkeys(_BINARY, _binary),
    _aten.addmm.default: _matmul,
    _aten.cat.default: _cat,
    _aten.mean.dim: _mean,
    _aten.mm.default: _matmul,
    _aten.pow.Tensor_Scalar: _square,
    _aten.rsqrt.default: _rsqrt,
    _prims.convert_element_type.default: _copy,
}


def _add_elementwise(
    values: Values, operation: int, a: Value, b: Value | float | None, out: Value
) -> None:
    """Add ``out = operation(a, b)``, where ``b`` may be a number, or None for one operand."""
    right = b if isinstance(b, Value) else None
    tensors = [a, out, *([right] if right else [])]
    if any(tensor.dtype not in DTYPES for tensor in tensors):
        raise NoProgram(f"operands are {', '.join(str(tensor.dtype) for tensor in tensors)}")
    if any(tensor.elements > _MOST_ELEMENTS for tensor in tensors):
        raise NoProgram("one thread would take long for such large tensors")
    if any(len(tensor.shape) > 4 for tensor in tensors):
        raise NoProgram("a tensor has more than four dimensions")
    shape = a.shape if operation == _MEAN else out.shape
    sizes = (*(1,) * (4 - len(shape)), *shape)
    values.builder.add(
        program.ELEMENTWISE,
        cpu_structs.ELEMENTWISE,
        *(a.place, right.place if right else 0, out.place, *sizes),
        *(*_strides(a), *_strides(right or a), *_strides(out)),
        *(operation, DTYPES[a.dtype], DTYPES[right.dtype] if right else 0, DTYPES[out.dtype]),
        0.0 if right or b is None else b,
    )


def _strides(value: Value) -> tuple[int, ...]:
    """Return four strides, 0 where one element stands for all."""
    strides = (0 if n == 1 else s for n, s in zip(value.shape, value.stride, strict=True))
    return (*(0,) * (4 - len(value.shape)), *strides)
