"""How many floating-point operations the ops take, for ``torch.utils.flop_counter``.

As torch does for its own ops, a formula counts multiplications and additions of matmuls alone:
2*M*N*K, with the rows that there are and not those that a kernel pads. Decoding weights,
activations, routing and sums count nothing. Shape letters as in ``reference.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mxfp4_fx.ops import reference
from mxfp4_fx.ops.operands import Rows, operands_of


def register() -> None:
    """Tell torch the formulas of the ops, which must be defined."""

    def matmul_ogs(*flat: Any, out_val: Any = None, **named: Any) -> int:
        _, weight, rows, _, _ = operands_of(*flat, **named)
        return 2 * _rows_here(rows) * weight.n * weight.k

    def matmul_ogs_backward(grad: Tensor, *flat: Any, out_val: Any = None, **named: Any) -> int:
        # The product of the forward is computed again, then the gradient of x.
        return 2 * matmul_ogs(*flat, **named)

    formulas: dict[Any, Any] = {
        torch.ops.mxfp4.moe: _moe,
        torch.ops.mxfp4.matmul_ogs: matmul_ogs,
        torch.ops.mxfp4.matmul_ogs_backward: matmul_ogs_backward,
        torch.ops.mxfp4.grouped_linear: _grouped_linear,
        torch.ops.mxfp4.grouped_outer: _grouped_outer,
        torch.ops.mxfp4.linears: _linears,
        torch.ops.mxfp4.linears_mxfp8: _linears_mxfp8,
        torch.ops.mxfp4.linears_mxfp8_backward: _linears_mxfp8_backward,
        torch.ops.mxfp4.attention_with_sinks: _attention_with_sinks,
    }
    for op, formula in formulas.items():
        register_flop_formula(op, get_raw=True)(formula)


def _rows_here(rows: Rows) -> int:
    """Return the number of rows whose experts are held here.

    Their offsets say so. Where these have no values, as under fake tensors, all rows count.
    """
    return _sorted_rows(rows.offsets, rows.total)


def _sorted_rows(offsets: Tensor, total: int) -> int:
    return int(offsets[-1]) if _has_values(offsets) else total


def _has_values(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not tensor.is_meta


def _moe(*flat: Any, out_val: Any = None, **named: Any) -> int:
    """Count both overloads: with logits, and with given routes."""
    # The sixth argument is the number of choices, or a bias, which may be None.
    meaning = reference.moe if isinstance(flat[6], int) else reference.moe_from_routes
    bound = inspect.signature(meaning).bind(*flat, **named)
    bound.apply_defaults()
    given = bound.arguments
    experts = given["gate_up"].shape[0]
    chosen = given.get("indices")
    if chosen is None:
        chosen = torch.topk(given["router_logits"], given["top_k"]).indices
    total = chosen.numel()
    if _has_values(chosen):
        first = given["first_expert"]
        total = int(((chosen >= first) & (chosen < first + experts)).sum())
    # A token meets each value of an expert once. A byte of blocks has two values.
    values = sum(
        given[name].numel() * (1 if given[f"{name}_scales"] is None else 2)
        for name in ("gate_up", "down")
    )
    return 2 * total * values // max(experts, 1)


def _grouped_linear(
    x: Tensor, weight: Tensor, expert_offsets: Tensor, *, out_val: Any = None
) -> int:
    return 2 * _sorted_rows(expert_offsets, x.shape[0]) * weight.shape[1] * weight.shape[2]


def _grouped_outer(grad: Tensor, x: Tensor, expert_offsets: Tensor, *, out_val: Any = None) -> int:
    return 2 * _sorted_rows(expert_offsets, x.shape[0]) * grad.shape[1] * x.shape[1]


def _linears(
    x: Tensor, weights: Sequence[Tensor], *others: Any, out_val: Any = None, **named: Any
) -> int:
    return sum(2 * x.numel() * weight.shape[0] for weight in weights)


def _linears_mxfp8(
    x: Tensor, codes: Sequence[Tensor], *others: Any, out_val: Any = None, **named: Any
) -> int:
    return sum(2 * x.numel() * code.shape[1] for code in codes)


def _linears_mxfp8_backward(
    grads: Sequence[Tensor], codes: Sequence[Tensor], *others: Any, out_val: Any = None
) -> int:
    return sum(2 * grad.numel() * code.shape[2] for grad, code in zip(grads, codes, strict=True))


def _attention_with_sinks(
    query: Tensor, key: Tensor, *others: Any, out_val: Any = None, **named: Any
) -> int:
    """Count two products for each pair of a query and a key, masked or not, as torch does."""
    return 4 * query.numel() * key.shape[2]
