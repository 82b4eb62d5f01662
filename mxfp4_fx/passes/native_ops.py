"""This package's ops as instructions of a native program. The shape letters are the ops' own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mxfp4_fx.core import hardware, torch_private
from mxfp4_fx.ops import cpu_structs, program
from mxfp4_fx.ops.cpu_structs import ACTIVATIONS, DTYPES
from mxfp4_fx.ops.operands import operands_of
from mxfp4_fx.ops.program import Place
from mxfp4_fx.passes.native_values import NoProgram, Value, Values

_SET_BY_CALL = 0  # the number of threads


def linears(values: Values, node: fx.Node) -> None:
    x, weights, biases, kernels = _operands(node)
    _require_native(kernels)
    made = functools.partial(values.make_all, node)
    add_linears(values, values.of(x), values.all_of(weights), biases, made)


def add_linears(
    values: Values,
    x: Value,
    weights: Sequence[Value],
    biases: Sequence[fx.Node | None],
    make: Callable[[], Sequence[Value]],
) -> None:
    """Add linears of one input.

    Args:
        x: [.., K].
        weights: each [N, K].
        biases: each [N], or None.
        make: makes the results.
    """
    if _rows(x) > hardware.linear_rows(x.dtype):
        raise NoProgram("torch is the faster for so many rows of a linear")
    for weight in weights:
        if weight.stride[-1] != 1 or weight.dtype != x.dtype or weight.shape[1:] != x.shape[-1:]:
            raise NoProgram("torch computes a linear whose weight lies in another order")
    places = _biases(values, biases, x)
    parts: list[Any] = []
    for weight, bias, y in zip(weights, places, make(), strict=True):
        parts += weight.place, bias, y.place, weight.shape[0], weight.stride[0]
    _add_group(values, program.LINEARS, cpu_structs.linear_group, x, weights, parts)


def linears_mxfp8(values: Values, node: fx.Node) -> None:
    x_node, code_nodes, scale_nodes, bias_nodes, kernels = _operands(node)
    x, codes, scales = values.of(x_node), values.all_of(code_nodes), values.all_of(scale_nodes)
    _require_native(kernels)
    if _rows(x) > hardware.mxfp8_rows(x.dtype):
        raise NoProgram("MXFP8 is decoded first for so many rows of a linear")
    if not all(one.is_contiguous and one.dtype == torch.uint8 for one in (*codes, *scales)):
        raise NoProgram("a weight in MXFP8 lies in another order")
    biases = _biases(values, bias_nodes, x)
    parts: list[Any] = []
    for code, scale, bias, y in zip(codes, scales, biases, values.make_all(node), strict=True):
        parts += code.place, scale.place, bias, y.place, code.shape[1]
    _add_group(values, program.LINEARS_MXFP8, cpu_structs.mxfp8_group, x, codes, parts)


def routing(values: Values, node: fx.Node) -> None:
    logits_node, top_k, first, held, kernels = _operands(node)
    logits = values.of(logits_node)
    _require_native(kernels)
    if logits.stride[1] != 1 or logits.dtype not in DTYPES:
        raise NoProgram("a router's logits lie in another order, or have another dtype")
    tokens, experts = logits.shape
    held = experts if held is None else held
    results = [made.place for made in values.make_all(node)]
    values.builder.add(
        program.ROUTING,
        cpu_structs.ROUTER,
        *(logits.place, *results, tokens, logits.stride[0], experts, top_k, held, first),
        *(DTYPES[logits.dtype], _SET_BY_CALL),
    )


def matmul_ogs(values: Values, node: fx.Node) -> None:
    given = _operands(node)
    fakes = [each.meta["val"] if isinstance(each, fx.Node) else each for each in given]
    _, weight, rows, activation, kernels = operands_of(*fakes)
    _require_native(kernels)
    x, blocks, scales = values.all_of(given[:3])
    optional = [None if each is None else values.of(each) for each in (given[3], *given[5:9])]
    bias, offsets, gather, scatter, gammas = optional
    if weight.layout != "cpu_panels" or x.stride[1] != 1 or x.dtype not in DTYPES:
        raise NoProgram("experts, or what they read, lie in another order")
    if not all(one is None or one.is_contiguous for one in (blocks, scales, *optional)):
        raise NoProgram("an operand of the experts lies in another order")
    if bias is not None and bias.dtype not in DTYPES:
        raise NoProgram(f"a bias is {bias.dtype}")
    if gammas is not None and gammas.dtype != torch.float32:
        raise NoProgram(f"the experts' weights are {gammas.dtype}")
    if any(one is not None and one.dtype != torch.int32 for one in (offsets, gather, scatter)):
        raise NoProgram("the routing is of another dtype")
    y = values.make(node)
    places = [0 if one is None else one.place for one in optional]
    numbers = (0.0, 0.0, 0.0) if activation is None else activation[1:]
    values.builder.add(
        program.MATMUL_OGS,
        cpu_structs.MATMUL,
        *(x.place, blocks.place, scales.place, *places, y.place),
        *(x.shape[0], x.stride[0], rows.total, weight.experts, weight.n, weight.k, rows.per_token),
        *(DTYPES[x.dtype], 0 if bias is None else DTYPES[bias.dtype]),
        *(ACTIVATIONS["none" if activation is None else activation.kind], _SET_BY_CALL, *numbers),
        weights=_arguments([blocks]),
    )


def attention_with_sinks(values: Values, node: fx.Node) -> None:
    query_node, key, value, sinks_node, mask, scale, kernels = _operands(node)
    query, sinks = values.of(query_node), values.of(sinks_node)
    _require_native(kernels)
    batch, heads, queries, size = query.shape
    # What one native call computes on every path: see attention.h.
    if queries != 1 or size % 32 or size > 256 or query.stride[3] != 1:
        raise NoProgram("attention of several queries, or of heads of an uncommon size")
    keys = key.meta["val"].shape[2]
    strides = [values.stride(each, dim) for each in (key, value) for dim in range(3)]
    if not all(_is(values.stride(each, 3), 1) for each in (key, value)) or _is(keys, 0):
        raise NoProgram("keys or values lie in another order, or are none")
    mask_strides: list[int | Place] = [0, 0]
    if mask is not None:
        shape = mask.meta["val"].shape
        is_whole = len(shape) == 4 and _is(shape[2], 1) and statically_known_true(shape[3] == keys)
        if not is_whole or not _is(values.stride(mask, 3), 1):
            raise NoProgram("a mask lies in another order, or stands for several keys")
        mask_strides = [0 if _is(shape[dim], 1) else values.stride(mask, dim) for dim in (0, 1)]
    result = values.make(node)
    values.builder.add(
        program.ATTENTION,
        cpu_structs.ATTENTION,
        *(query.place, values.place_of(key), values.place_of(value), sinks.place),
        *(0 if mask is None else values.place_of(mask), result.place),
        *(batch, heads, key.meta["val"].shape[1], values.size(key, 2), size),
        *(*query.stride[:2], *strides, sinks.stride[0], *mask_strides),
        *(DTYPES[query.dtype], _SET_BY_CALL, scale),
        weights=_arguments([sinks]),
    )


Translation = Callable[[Values, fx.Node], None]
_ops = torch.ops.mxfp4
TRANSLATIONS: dict[Any, Translation] = {
    _ops.linears.default: linears,
    _ops.linears_mxfp8.default: linears_mxfp8,
    _ops.routing.default: routing,
    _ops.matmul_ogs.default: matmul_ogs,
    _ops.attention_with_sinks.default: attention_with_sinks,
}


def _operands(node: fx.Node) -> list[Any]:
    """Return an op's operands in the order of its schema, those left out too."""
    arguments = torch_private.schema_of(node.target).arguments  # type: ignore[arg-type]
    return [
        node.args[at] if at < len(node.args) else node.kwargs.get(one.name, one.default_value)
        for at, one in enumerate(arguments)
    ]


def _require_native(kernels: str) -> None:
    if kernels != "cpu":
        raise NoProgram(f"an op is computed by {kernels} kernels")


def _is(size: object, number: int) -> bool:
    """Return whether a size is this number for certain; symbolic ones are not."""
    return isinstance(size, int) and size == number


def _rows(x: Value) -> int:
    if not x.is_contiguous or x.dtype not in DTYPES or not x.elements:
        raise NoProgram("a linear's input lies in another order, has another dtype, or is empty")
    return x.elements // x.shape[-1]


def _biases(values: Values, nodes: Sequence[Any], x: Value) -> list[Place | int]:
    """Return where the biases of linears begin, 0 for none."""
    biases = [None if node is None else values.of(node) for node in nodes]
    for bias in biases:
        if bias is not None and (not bias.is_contiguous or bias.dtype != x.dtype):
            raise NoProgram("a linear's bias lies in another order, or has another dtype")
    return [0 if bias is None else bias.place for bias in biases]


def _add_group(
    values: Values,
    kind: int,
    form: Callable[[int], Any],
    x: Value,
    weights: Sequence[Value],
    parts: Sequence[Any],
) -> None:
    """Add linears of one input."""
    k, count = x.shape[-1], len(weights)
    numbers = _rows(x), k, k, count, DTYPES[x.dtype], _SET_BY_CALL
    named = _arguments(weights)
    values.builder.add(kind, form(count), x.place, *numbers, *parts, weights=named)


def _arguments(weights: Sequence[Value]) -> list[int]:
    """Return the numbers of the weights that are arguments, all or none."""
    found = [one.memory.argument for one in weights]
    return [] if None in found else [at for at in found if at is not None]
