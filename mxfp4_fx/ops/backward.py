"""Gradients through frozen experts: with respect to activations and routing weights.

Fine-tuning the rest of a model (for example LoRA on attention) needs these. MXFP4 weights have no
gradient, and an expert bias that requires one raises an error. Shape letters as in
``reference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core import mxfp8
from mxfp4_fx.ops.operands import Activation, Rows, Weight
from mxfp4_fx.ops.reference import activate, matrix


def activate_backward(grad: Tensor, y: Tensor, activation: Activation | None) -> Tensor:
    """Return the gradient [.., N] of ``reference.activate``'s input, from ``grad`` [.., N']."""
    if activation is None:
        return grad
    kind, alpha, limit, up_offset = activation
    if kind == "relu2":
        return (grad * 2 * y).masked_fill(y <= 0, 0)
    gate, up = y[..., 0::2], y[..., 1::2]
    g, u = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if kind == "geglu_tanh":
        acted = torch.nn.functional.gelu(g, approximate="tanh")
        slope = torch.ops.aten.gelu_backward(torch.ones_like(g), g, approximate="tanh")
    else:
        s = torch.sigmoid(alpha * g)
        acted, slope = g * s, s + alpha * g * s * (1 - s)
    # where() and no product with a mask: values beyond the limit may be infinite.
    grad_gate = (grad * (u + up_offset) * slope).where(gate <= limit, 0)
    grad_up = (grad * acted).where(up.abs() <= limit, 0)
    return torch.stack((grad_gate, grad_up), dim=-1).flatten(-2)


def matmul_ogs_backward(
    grad: Tensor, x: Tensor, weight: Weight, rows: Rows, activation: Activation | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``matmul_ogs`` with respect to x and gammas.

    The intermediate values of the forward are computed again.

    Args:
        grad: the gradient of the op's result, of the same shape.
        x, weight, rows, activation: the op's operands; ``weight`` may have any layout.

    Returns:
        grad_x, of x's shape and dtype; grad_gammas [R] float32 (zeros without ``gammas``).
    """
    inputs = (x if rows.gather is None else x[rows.gather]).float()
    grad = grad.float()
    if rows.scatter is not None:
        grad = grad[rows.scatter // rows.per_token]
    grad_rows = inputs.new_zeros(inputs.shape)
    grad_gammas = inputs.new_zeros(inputs.shape[0])
    for expert, (start, stop) in enumerate(pairwise(rows.offsets.tolist())):
        if start == stop:
            continue
        w = matrix(weight, expert)
        y = inputs[start:stop] @ w.T
        if weight.bias is not None:
            y = y + weight.bias[expert].float()
        g = grad[start:stop]
        if rows.gammas is not None:
            grad_gammas[start:stop] = (g * activate(y, activation)).sum(dim=-1)
            g = g * rows.gammas[start:stop, None]
        grad_rows[start:stop] = activate_backward(g, y, activation) @ w
    if rows.gather is None:
        return grad_rows.to(x.dtype), grad_gammas
    grad_x = x.new_zeros(x.shape, dtype=torch.float32)
    return grad_x.index_add_(0, rows.gather, grad_rows).to(x.dtype), grad_gammas


# Positions among the op's arguments.
_BIAS, _GAMMAS = 3, 8


def save_matmul_ogs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the arguments: ``setup_context`` of matmul_ogs.

    Raises:
        RuntimeError: the bias requires a gradient.
    """
    bias = inputs[_BIAS]
    if bias is not None and bias.requires_grad:
        raise RuntimeError(
            "mxfp4::matmul_ogs has no gradient for an expert bias; call bias.requires_grad_(False)"
        )
    flat = inputs[:-1]  # without the kernels' name: all kernels share one backward
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in flat))
    ctx.constants = [None if isinstance(value, Tensor) else value for value in flat]


def matmul_ogs_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return one gradient or None for each argument: ``backward`` of matmul_ogs."""
    saved = ctx.saved_tensors  # read once: activation checkpointing returns them only once
    flat = [b if a is None else a for a, b in zip(saved, ctx.constants, strict=True)]
    grad_x, grad_gammas = torch.ops.mxfp4.matmul_ogs_backward(grad, *flat)
    gradients: list[Tensor | None] = [None] * (len(flat) + 1)
    gradients[0] = grad_x
    if flat[_GAMMAS] is not None:
        gradients[_GAMMAS] = grad_gammas
    return tuple(gradients)


def linears_mxfp8_backward(
    grads: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]
) -> Tensor:
    """Return the gradient of ``linears_mxfp8`` with respect to x, [..., K].

    Args:
        grads: the gradients [..., N] of its results, at least one, of one dtype.
        codes, scales: the op's operands; ``operands_around`` has checked all.
    """
    total = None
    for grad, code, scale in zip(grads, codes, scales, strict=True):
        part = grad.float() @ mxfp8.dequantize(code[0], scale[0], torch.float32)
        total = part if total is None else total + part
    assert total is not None
    return total.to(grads[0].dtype)


def save_linears_mxfp8(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    """Save the weights: ``setup_context`` of linears_mxfp8.

    Raises:
        RuntimeError: a bias requires a gradient.
    """
    _, codes, scales, biases, ctx.kernels = inputs
    if any(bias is not None and bias.requires_grad for bias in biases):
        raise RuntimeError(
            "mxfp4::linears_mxfp8 has no gradient for a bias; call bias.requires_grad_(False)"
        )
    ctx.save_for_backward(*codes, *scales)


def linears_mxfp8_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Return one gradient or None for each argument: ``backward`` of linears_mxfp8."""
    saved = ctx.saved_tensors
    codes, scales = saved[: len(grads)], saved[len(grads) :]
    of_x = torch.ops.mxfp4.linears_mxfp8_backward(grads, codes, scales, ctx.kernels)
    return of_x, None, None, None, None


def save_routing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the routes: ``setup_context`` of routing. Index outputs have no gradient."""
    logits, ctx.top_k, first_expert, num_experts, ctx.kernels = inputs
    gammas, _, scatter_index, expert_offsets = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.shape, ctx.dtype = logits.shape, logits.dtype
    ctx.is_whole = first_expert == 0 and num_experts in (None, logits.shape[1])
    # Of experts elsewhere the result has neither weights nor ids.
    ctx.save_for_backward(gammas if ctx.is_whole else logits, scatter_index, expert_offsets)


def routing_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Return the logits' gradient, through the softmax of the chosen: ``backward`` of routing.

    The gradient of a gamma counts if its expert is held here. It reaches the logits of all chosen.
    """
    saved, scatter_index, expert_offsets = ctx.saved_tensors
    if ctx.is_whole:
        gammas, dp = saved, _to_slots(grad, scatter_index, ctx.top_k)
    else:
        dp = _to_slots(_of_rows_here(grad, expert_offsets), scatter_index, ctx.top_k)
        # Once more for all experts. The same kernels choose the same of equal logits.
        gammas, _, scatter_index, expert_offsets = torch.ops.mxfp4.routing(
            saved, ctx.top_k, kernels=ctx.kernels
        )
    rows = torch.arange(gammas.shape[0], device=gammas.device, dtype=expert_offsets.dtype)
    expert = torch.searchsorted(expert_offsets[1:].contiguous(), rows, right=True)
    p, expert = (_to_slots(v, scatter_index, ctx.top_k) for v in (gammas, expert))
    grad_chosen = p * (dp - (p * dp).sum(dim=-1, keepdim=True))
    grad_logits = grad_chosen.new_zeros(ctx.shape).scatter(1, expert, grad_chosen)
    return grad_logits.to(ctx.dtype), None, None, None, None


def save_routing_from_routes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the sorted order: ``setup_context`` of routing.routes."""
    _, _, scatter_index, expert_offsets = output
    ctx.save_for_backward(scatter_index, expert_offsets)
    ctx.mark_non_differentiable(*output[1:])
    ctx.top_k, ctx.dtype = inputs[1].shape[1], inputs[1].dtype


def routing_from_routes_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Return the weights' gradient [T, A]: ``backward`` of routing.routes.

    It is zero in slots whose expert is not held here.
    """
    scatter_index, expert_offsets = ctx.saved_tensors
    grad = _of_rows_here(grad, expert_offsets)
    return None, _to_slots(grad, scatter_index, ctx.top_k).to(ctx.dtype), None, None, None


def _of_rows_here(grad: Tensor, expert_offsets: Tensor) -> Tensor:
    """Return a gradient [R] with zeros in the rows whose expert is not held here."""
    rows = torch.arange(grad.shape[0], device=grad.device)
    return grad.where(rows < expert_offsets[-1], 0)


def _to_slots(rows: Tensor, scatter_index: Tensor, top_k: int) -> Tensor:
    """Bring sorted rows [R] back into their slots [T, A]."""
    return torch.empty_like(rows).index_put((scatter_index,), rows).view(-1, top_k)
