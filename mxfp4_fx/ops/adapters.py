"""Low-rank adapters (LoRA) beside packed experts: what they add, and the gradients of that.

The experts stay as they are. An adapter adds ``(x @ A_e^T) @ B_e^T * scaling`` to a projection's
result: two grouped matmuls with rank r between them. Shape letters as in ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxfp4_fx.core.layouts import CHECKPOINT_ORDER
from mxfp4_fx.ops.operands import UP_OFFSET, Activation
from mxfp4_fx.ops.reference import activate, combine


class LowRank(NamedTuple):
    """What one adapter adds to one projection.

    Attributes:
        a: [E, r, K] float.
        b: [E, N, r], of the same dtype; gate in the even rows and up in the odd, as in a
            checkpoint's weight.
        scaling: the factor of the product.
    """

    a: Tensor
    b: Tensor
    scaling: float


def grouped_linear(x: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """Return ``x @ weight[e]^T`` for rows sorted by expert; zero for rows of no expert here.

    Args:
        x: [R, K] float.
        weight: [E, N, K], of the same dtype.
        expert_offsets: [E+1] int32; expert e has the rows ``expert_offsets[e]:[e+1]``.

    Returns:
        [R, N] in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    check_grouped(x, weight, expert_offsets)
    y = x.new_zeros((x.shape[0], weight.shape[1]))
    for expert, (start, stop) in enumerate(pairwise(expert_offsets.tolist())):
        if start < stop:
            torch.mm(x[start:stop], weight[expert].T, out=y[start:stop])
    return y


def grouped_outer(grad: Tensor, x: Tensor, expert_offsets: Tensor) -> Tensor:
    """Return ``grad[rows of e]^T @ x[rows of e]`` [E, N, K] of grad [R, N] and x [R, K]."""
    experts = expert_offsets.shape[0] - 1
    result = x.new_zeros((experts, grad.shape[1], x.shape[1]))
    for expert, (start, stop) in enumerate(pairwise(expert_offsets.tolist())):
        if start < stop:
            torch.mm(grad[start:stop].T, x[start:stop], out=result[expert])
    return result


def check_grouped(x: Tensor, weight: Tensor, expert_offsets: Tensor) -> None:
    """Raise ValueError unless the operands of :func:`grouped_linear` fit."""
    fits = x.ndim == 2 and weight.ndim == 3 and expert_offsets.ndim == 1
    fits = fits and x.shape[1] == weight.shape[2] and x.dtype == weight.dtype
    if not (fits and expert_offsets.shape[0] == weight.shape[0] + 1):
        raise ValueError(
            "mxfp4::grouped_linear: x must be [R, K], weight [E, N, K] of the same dtype and "
            f"expert_offsets [E+1]; they are {tuple(x.shape)} {x.dtype}, {tuple(weight.shape)} "
            f"{weight.dtype} and {tuple(expert_offsets.shape)}"
        )


def save_grouped_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save all arguments: ``setup_context`` of grouped_linear."""
    ctx.save_for_backward(*inputs)


def grouped_linear_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and weight: ``backward`` of grouped_linear."""
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    of_x, of_weight = ctx.needs_input_grad[:2]
    ops = torch.ops.mxfp4
    return (
        ops.grouped_linear(grad, weight.transpose(1, 2), offsets) if of_x else None,
        ops.grouped_outer(grad, x, offsets) if of_weight else None,
        None,
    )


def adapted_moe(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Callable[..., Tensor],
    down: Callable[..., Tensor],
    gate_up_adapters: Sequence[LowRank],
    down_adapters: Sequence[LowRank],
    num_experts: int,
    activation: Activation,
    kernels: str = "reference",
) -> Tensor:
    """Compute experts with adapters: [T, H] of hidden [T, H], in its dtype.

    What an adapter adds is computed in the adapter's dtype, and so is the activation after it.
    Without adapters, a projection is the one op that it always is.

    Args:
        hidden: [T, H] float.
        indices, weights: the routes [T, A]; an id of E or more counts nothing.
        gate_up, down: from ``x, expert_offsets`` and keywords to the projection, as
            ``mxfp4::matmul_ogs`` computes it.
        gate_up_adapters, down_adapters: the adapters that are on.
        num_experts: E.
        activation: of the experts.
        kernels: those of the routing.
    """
    routes = torch.ops.mxfp4.routing.routes(indices, weights, num_experts, kernels=kernels)
    gammas, gather_index, scatter_index, offsets = routes
    kind, alpha, limit, up_offset = activation
    if gate_up_adapters:
        y = gate_up(hidden, offsets, gather_index=gather_index)
        y = y + added(hidden[gather_index], gate_up_adapters, offsets)
        inner = activate(y, activation).to(hidden.dtype)
    else:
        constants = {"alpha": alpha, "limit": limit, "up_offset": up_offset}
        inner = gate_up(hidden, offsets, gather_index=gather_index, activation=kind, **constants)
    top_k = indices.shape[1]
    if not down_adapters:
        outer = {"scatter_index": scatter_index, "gammas": gammas, "experts_per_token": top_k}
        return down(inner, offsets, **outer)
    y = down(inner, offsets) + added(inner, down_adapters, offsets)
    return combine(y * gammas[:, None], scatter_index, top_k).to(hidden.dtype)


def added(rows: Tensor, adapters: Sequence[LowRank], expert_offsets: Tensor) -> Tensor:
    """Return what adapters add to a projection [R, N] of rows [R, K]."""
    total: Tensor | None = None
    for a, b, scaling in adapters:
        small = torch.ops.mxfp4.grouped_linear(rows.to(a.dtype), a, expert_offsets)
        part = torch.ops.mxfp4.grouped_linear(small, b, expert_offsets) * scaling
        total = part if total is None else total + part
    assert total is not None
    return total


def moe_adapted(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    intermediate: int,
    alpha: float,
    limit: float,
    gate_up_scales: Tensor,
    down_scales: Tensor,
    gate_up_factors: Sequence[Tensor],
    gate_up_scalings: Sequence[float],
    down_factors: Sequence[Tensor],
    down_scalings: Sequence[float],
    activation: str = "swiglu",
    up_offset: float = UP_OFFSET,
    layout: str = CHECKPOINT_ORDER,
    kernels: str = "reference",
) -> Tensor:
    """Compute ``mxfp4::moe.adapted``: :func:`adapted_moe` of packed experts, in flat arguments.

    Args:
        hidden, indices, weights: see :func:`adapted_moe`.
        gate_up, gate_up_scales, down, down_scales: blocks and scales in ``layout``.
        intermediate: I, which padded blocks do not show.
        gate_up_factors, down_factors: ``a`` and ``b`` of each :class:`LowRank`, in turn.
        gate_up_scalings, down_scalings: its ``scaling``.
        alpha, limit, activation, up_offset: see ``operands.Activation``; a gated one.
    """
    by = {"layout": layout, "kernels": kernels}
    first = projection(gate_up, gate_up_scales, gate_up_bias, 2 * intermediate, by)
    second = projection(down, down_scales, down_bias, hidden.shape[1], by)
    return adapted_moe(
        hidden,
        indices,
        weights,
        first,
        second,
        _adapters(gate_up_factors, gate_up_scalings),
        _adapters(down_factors, down_scalings),
        gate_up.shape[0],
        Activation(activation, alpha, limit, up_offset),
        kernels,
    )


def projection(
    blocks: Tensor, scales: Tensor, bias: Tensor | None, n: int, by: dict[str, str]
) -> Callable[..., Tensor]:
    """Return ``mxfp4::matmul_ogs`` of a weight, by the kernels and in the layout of ``by``."""

    def multiply(x: Tensor, expert_offsets: Tensor, **changes: Any) -> Tensor:
        y: Tensor = torch.ops.mxfp4.matmul_ogs(
            x, blocks, scales, bias, n, expert_offsets, **changes, **by
        )
        return y

    return multiply


def _adapters(factors: Sequence[Tensor], scalings: Sequence[float]) -> list[LowRank]:
    if len(factors) != 2 * len(scalings):
        raise ValueError(
            f"mxfp4::moe.adapted: {len(scalings)} scalings need two factors each, and there are "
            f"{len(factors)}"
        )
    return [LowRank(*one) for one in zip(factors[::2], factors[1::2], scalings, strict=True)]
