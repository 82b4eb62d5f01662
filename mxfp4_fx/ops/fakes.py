"""The fake impls of the ops: the shapes, dtypes and strides of their results, without values.

Each has the signature of its op in ``schemas.py``. Shape letters as in ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.ops import adapters, operands, operands_around
from mxfp4_fx.ops.operands import operands_of


def _routes(like: Tensor, rows: Any, num_experts: int) -> tuple[Tensor, ...]:
    return (
        like.new_empty((rows,), dtype=torch.float32),
        like.new_empty((rows,), dtype=torch.int32),
        like.new_empty((rows,), dtype=torch.int32),
        like.new_empty((num_experts + 1,), dtype=torch.int32),
    )


def routing(
    logits: Tensor,
    top_k: int,
    first_expert: int = 0,
    num_experts: int | None = None,
    kernels: str = "reference",
) -> tuple[Tensor, ...]:
    held = operands.check_routing(logits, top_k, num_experts)
    return _routes(logits, logits.shape[0] * top_k, held)


def routing_routes(
    indices: Tensor,
    weights: Tensor,
    num_experts: int,
    first_expert: int = 0,
    kernels: str = "reference",
) -> tuple[Tensor, ...]:
    operands.check_routes(indices, weights, num_experts)
    return _routes(weights, indices.shape[0] * indices.shape[1], num_experts)


def matmul_ogs(*flat: Any) -> Tensor:
    x, weight, rows, activation, _ = operands_of(*flat)
    return x.new_empty(operands.result_shape(weight, rows, activation))


def matmul_ogs_backward(grad: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    x, _, rows, _, _ = operands_of(*flat)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, x.new_empty((rows.total,), dtype=torch.float32)


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kernels: str = "reference",
) -> list[Tensor]:
    operands_around.check_linears(x, weights, biases)
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def linears_mxfp8(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kernels: str = "reference",
) -> list[Tensor]:
    operands_around.check_linears_mxfp8(x, codes, scales, biases)
    return [x.new_empty((*x.shape[:-1], code.shape[1])) for code in codes]


def linears_mxfp8_backward(
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    kernels: str = "reference",
) -> Tensor:
    operands_around.check_linears_mxfp8_backward(grads, codes, scales)
    return grads[0].new_empty((*grads[0].shape[:-1], codes[0].shape[2]))


def attention_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    mask: Tensor | None,
    scale: float,
    kernels: str = "reference",
) -> Tensor:
    operands_around.Attention(query, key, value, sinks, mask, scale).check()
    batch, heads, queries, size = query.shape
    return query.new_empty((batch, queries, heads, size))


def moe(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def expert_ids(indices: Tensor, num_experts: int, below: str, above: str) -> Tensor:
    return torch.empty_like(indices)


def grouped_linear(x: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    adapters.check_grouped(x, weight, expert_offsets)
    return x.new_empty((x.shape[0], weight.shape[1]))


def grouped_outer(grad: Tensor, x: Tensor, expert_offsets: Tensor) -> Tensor:
    return x.new_empty((expert_offsets.shape[0] - 1, grad.shape[1], x.shape[1]))
