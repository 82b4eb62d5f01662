"""Gradients of rewritten regions: the ops as formulas for float64, and how far float32 can be off.

Shape letters as in ``oracle.py``.
"""

from __future__ import annotations

from typing import Any

import oracle
import torch
from oracle import UNDERFLOW, Bounded, Matrices, roundings, times
from torch import Tensor

# The ops as formulas, in the dtype of their operands. Autograd knows their gradients.


def moe(**given: Any) -> Tensor:
    """``mxfp4::moe`` and ``moe.routes``, by their arguments' names; other ids count nothing."""
    x = given["hidden"]
    if "router_logits" in given:
        chosen, indices = torch.topk(given["router_logits"], given["top_k"], dim=-1)
        weights = torch.softmax(chosen, dim=-1)
    else:
        indices, weights = given["indices"], given["weights"]
    gate_up, down = (
        _dense(given[n], given.get(f"{n}_scales"), given["is_transposed"])
        for n in ("gate_up", "down")
    )
    bias = given["gate_up_bias"]
    if given["is_concatenated"]:
        gate_up, bias = (v if v is None else _alternating(v) for v in (gate_up, bias))
    ids = indices - given["first_expert"]
    here = (ids >= 0) & (ids < gate_up.shape[0])
    ids = ids.where(here, 0).long()
    y = _plus(torch.einsum("th,tanh->tan", x, gate_up[ids]), bias, ids)
    y = torch.einsum("tai,tahi->tah", activate(y, **_activation(given)), down[ids])
    y = _plus(y, given["down_bias"], ids)
    return (y.where(here[..., None], 0.0) * weights.where(here, 0.0)[..., None]).sum(dim=1)


def _plus(y: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    return y if bias is None else y + bias[expert]


def _dense(weight: Tensor, scales: Tensor | None, is_transposed: bool) -> Tensor:
    """[E, K, N], [E, N, K], or blocks and scales, as [E, N, K]."""
    if scales is None:
        return weight.transpose(1, 2) if is_transposed else weight
    return Matrices(weight, scales, scales).weight


def _alternating(x: Tensor) -> Tensor:
    """[E, 2I, ...], the gate's I and then those of up: the two alternate in the result."""
    return torch.stack(x.chunk(2, dim=1), dim=2).flatten(1, 2)


def _activation(given: dict[str, Any]) -> dict[str, Any]:
    names = ("alpha", "limit", "up_offset")
    return {"kind": given["activation"], **{name: given[name] for name in names}}


def activate(y: Tensor, kind: str, alpha: float, limit: float, up_offset: float) -> Tensor:
    if kind == "none":
        return y
    if kind == "relu2":
        return torch.relu(y).square()
    gate, up = y[..., 0::2].clamp(max=limit), y[..., 1::2].clamp(min=-limit, max=limit)
    if kind == "geglu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * (up + up_offset)
    return gate * torch.sigmoid(alpha * gate) * (up + up_offset)


def routing_routes(**given: Any) -> tuple[Tensor, ...]:
    indices, e = given["indices"], given["num_experts"]
    ids = indices.reshape(-1) - given["first_expert"]
    ids = ids.where((ids >= 0) & (ids < e), e)
    slots = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=e + 1)[:e]
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    gammas = given["weights"].reshape(-1)[slots]
    return gammas, *(v.int() for v in (slots // indices.shape[1], slots, offsets))


def matmul_ogs(**given: Any) -> Tensor:
    x, bias, offsets = given["x"], given["bias"], given["expert_offsets"]
    rows = x if given["gather_index"] is None else x[given["gather_index"]]
    numbers = torch.arange(rows.shape[0], dtype=offsets.dtype)
    expert = torch.searchsorted(offsets[1:].contiguous(), numbers, right=True)
    here = expert < given["blocks"].shape[0]
    expert = expert.where(here, 0)
    weight = Matrices(given["blocks"], given["scales"], given["scales"]).weight
    y = _plus(torch.einsum("rk,rnk->rn", rows, weight[expert]), bias, expert)
    y = activate(y, **_activation(given))
    if given["gammas"] is not None:
        y = y * given["gammas"][:, None]
    y = y.where(here[:, None], 0.0)
    if given["scatter_index"] is None:
        return y
    y = torch.zeros_like(y).index_put((given["scatter_index"],), y)
    return y.view(-1, given["experts_per_token"], y.shape[1]).sum(dim=1)


FORMULAS = {
    "mxfp4.moe": moe,
    "mxfp4.routing.routes": routing_routes,
    "mxfp4.matmul_ogs": matmul_ogs,
}


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: Tap) -> Tensor:
        ctx.tap = tap
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.tap._keep(gradient)
        return gradient, None


class Tap:
    """Keeps a gradient: one that passes between a value and one user, or all of a value's."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def watch(self, x: Tensor) -> None:
        if x.requires_grad:
            x.register_hook(self._keep)

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach().clone()

    def __call__(self, x: Tensor) -> Tensor:
        """The value for the user."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        return _Passing.apply(x, self)


def gradients(
    hidden: Tensor,
    indices: Tensor,
    weights: Bounded,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    activation: dict[str, Any],
    gradient: Tensor,
) -> tuple[Bounded, Bounded]:
    """Of ``oracle.experts``, not with GELU, for the exact ``gradient`` [T, H] of its result.

    Returns:
        The gradients of hidden [T, H] and of the routing weights [T, A], with bounds.
    """
    t, a = indices.shape
    expert = indices.reshape(-1)
    pre = oracle.grouped_linear(Bounded.exact(hidden.repeat_interleave(a, dim=0)), expert, *gate_up)
    y = oracle.grouped_linear(oracle.activate(pre, **activation), expert, *down)
    given = gradient.double().repeat_interleave(a, dim=0)
    of_weights = Bounded(
        (given * y.value).sum(-1),
        (given.abs() * y.error).sum(-1)
        + roundings(given.shape[1]) * (given.abs() * y.largest).sum(-1)
        + given.shape[1] * UNDERFLOW,
    )
    scaled = times(Bounded.exact(given), weights.view(t * a, 1))
    of_act = _grouped_backwards(scaled, expert, down[0])
    if activation["kind"] == "relu2":
        of_pre = times(of_act, pre.through(lambda v: 2 * torch.relu(v)))
    else:
        constants = (activation[name] for name in ("alpha", "limit", "up_offset"))
        of_pre = _swiglu_backwards(of_act, pre, *constants)
    of_rows = _grouped_backwards(of_pre, expert, gate_up[0])
    return oracle.combine(of_rows.view(t, a, hidden.shape[1])), of_weights.view(t, a)


def softmax_backwards(of_weights: Bounded, weights: Bounded) -> Bounded:
    """p * (dp - sum(p * dp)), [T, A]."""
    each = times(weights, of_weights)
    terms = each.value.shape[-1]
    total = each.error.sum(-1) + roundings(terms) * each.largest.sum(-1)
    off = Bounded(
        of_weights.value - each.value.sum(-1, keepdim=True), of_weights.error + total[:, None]
    )
    return times(weights, off.rounded(torch.float32))


def _grouped_backwards(y: Bounded, expert: Tensor, weight: Tensor) -> Bounded:
    """[R, N] with weights [E, N, K] -> [R, K]."""
    none = torch.zeros((weight.shape[0], weight.shape[2]), dtype=torch.float64)
    return oracle.grouped_linear(y, expert, weight.transpose(1, 2), none)


def _swiglu_backwards(
    grad: Bounded, pre: Bounded, alpha: float, limit: float, up_offset: float
) -> Bounded:
    gate_pre, up_pre = pre[..., 0::2], pre[..., 1::2]
    gate = gate_pre.through(lambda v: v.clamp(max=limit))
    up = up_pre.through(lambda v: v.clamp(min=-limit, max=limit))
    z, s = oracle.sigmoid_of(gate, alpha)
    rest = Bounded(1 - s.value, s.error).rounded(torch.float32)
    curve = times(times(z, s), rest)
    slope = Bounded(s.value + curve.value, s.error + curve.error).rounded(torch.float32)
    lifted = oracle.shifted(up, up_offset)
    of_gate = _where(gate_pre, lambda v: v <= limit, times(times(grad, lifted), slope))
    of_up = _where(up_pre, lambda v: v.abs() <= limit, times(times(grad, gate), s))
    return Bounded(
        torch.stack((of_gate.value, of_up.value), dim=-1).flatten(-2),
        torch.stack((of_gate.error, of_up.error), dim=-1).flatten(-2),
    )


def _where(x: Bounded, inside: Any, y: Bounded) -> Bounded:
    """y where x is inside, otherwise zero; either, where x is not known well enough."""
    value = y.value * inside(x.value)
    sure = inside(x.value - x.error) & inside(x.value + x.error) & inside(x.value)
    out = ~inside(x.value - x.error) & ~inside(x.value + x.error) & ~inside(x.value)
    error = torch.where(sure, y.error, torch.where(out, 0.0, y.largest))
    return Bounded(value, error)
