"""``verify=True``: on the first call, each rewritten region runs beside the original one.

The original gets the weights that MXFP4 holds, so the two results differ by rounding alone. This
module derives a bound for the rounding of both, for each element, by a running error analysis in
float64. The bound covers the float32 sums of each matmul, each value that the original rounds to
the activations' dtype, and the effect of errors before SwiGLU on its result.

Shape letters as in ``ops/reference.py``; u is the unit roundoff of the activations' dtype,
or of the coarsest if there are several.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from mxfp4_fx.core.errors import VerificationError
from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER
from mxfp4_fx.core.orders import GPT_OSS, Order, alternate
from mxfp4_fx.ops import reference
from mxfp4_fx.ops.operands import Activation
from mxfp4_fx.weights.source import Source, encoding_of
from mxfp4_fx.weights.swizzle import swizzle_weight

_U32 = 2.0**-24
# max |d/dg g*sigmoid(alpha*g)| = max |s + z s (1-s)| over z, and max |z^2 s (1-s)|, rounded up.
_SWISH_SLOPE = 1.1
_SWISH_CURVE = 0.44
# GELU's tanh form is g*sigmoid(z) with z = 2 sqrt(2/pi) (g + 0.044715 g^3): the same maxima, of
# |s + g s (1-s) dz/dg| and, for an error of z relative to it, of |g z s (1-s)|.
_GELU_SLOPE = 1.13
_GELU_CURVE = 0.28
# Roundings of an elementwise chain in SwiGLU: alpha*g, sigmoid, the two products, up + offset.
_ROUNDINGS = 5


def requantize(weight: Tensor, is_transposed: bool = True) -> Tensor:
    """Return the values that MXFP4 holds of a weight [E, K, N], or [E, N, K] if not transposed."""
    held = torch.empty_like(weight)
    order = Order(is_transposed)
    for expert in range(weight.shape[0]):
        parts = quantize(order.rows_of(weight.detach()[expert]))
        dequantize(*parts, weight.dtype, out=order.rows_of(held[expert]))
    return held


def unpacked(blocks: Tensor, scales: Tensor, layout: str) -> Tensor:
    """Return the values, float32 [E, K, N], of a packed weight that the model holds in a layout."""
    parts = swizzle_weight(Source((blocks, scales), encoding_of(GPT_OSS, layout)), CHECKPOINT_ORDER)
    return dequantize(*parts, torch.float32).transpose(1, 2)


@torch.no_grad()
def compare(
    layer: str,
    original: Tensor,
    rewritten: Tensor,
    routes: reference.Routes,
    hidden: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    top_k: int,
    activation: tuple[str, float, float, float],
    order: tuple[bool, bool],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Check that two results of one region, each [T, H], differ by rounding alone.

    Args:
        layer: the region's name, for the error.
        original, rewritten: the two results.
        routes: the result of ``reference.routing`` for the region.
        hidden, ..., down_bias: the region's inputs; the weights are requantized. ``hidden`` is in
            the dtype in which the rewritten region computes.
        top_k: A.
        activation: an ``operands.Activation``.
        order: the ``orders.Order`` of the weights. Weights of ``unpacked`` have GPT-OSS's.
        dtypes: what the original rounds to, which may be several dtypes.

    Raises:
        VerificationError: the results differ by more than the bound.
    """
    gammas, gather_index, scatter_index, offsets = routes
    u = max(torch.finfo(dtype).eps / 2 for dtype in dtypes)
    tiny = max(torch.finfo(dtype).tiny for dtype in dtypes)
    # Autocast may round the rows of hidden, in the original alone.
    rows_u = u if u > torch.finfo(hidden.dtype).eps / 2 else 0.0

    first = _Linear(gate_up, gate_up_bias, Order(*order), offsets)
    second = _Linear(down, down_bias, Order(*order)._replace(is_concatenated=False), offsets)
    x = hidden[gather_index].double()
    h = x.shape[1]
    pre, size = first(x), first.magnitude(x)
    # Both sum in float32. The original rounds the sum, and again after it adds the bias.
    pre_error = 2 * _sum_error(h + 1) * size + (2 * u + rows_u) * size
    act, act_error = _activate_with_error(pre, pre_error, Activation(*activation), u)
    # The original rounds each step of the activation to the activations' dtype, the rewritten one
    # only the result.
    act_error = act_error + (_ROUNDINGS + 1) * (u + _U32) * act.abs() + tiny

    row, size = second(act), second.magnitude(act)
    row_error = second.magnitude(act_error, with_bias=False)
    row_error = row_error + 2 * _sum_error(act.shape[1] + 1) * size + 2 * u * size
    # The original rounds the result of the softmax, and the product with it.
    factor = gammas.double()[:, None].abs()
    error = factor * row_error + 3 * (u + 8 * _U32) * factor * (row.abs() + row_error)
    # Both round the sum over a token's rows.
    total = reference.combine(factor * row.abs(), scatter_index, top_k)
    bound = reference.combine(error, scatter_index, top_k)
    bound = bound + 2 * (u + _sum_error(top_k)) * (total + bound) + tiny

    difference = (original.double() - rewritten.double()).abs()
    # An element that is NaN or infinite in the original cannot be compared.
    wrong = original.isfinite() & ~(difference <= bound)
    if wrong.any():
        worst = (difference / bound).nan_to_num(float("inf")).argmax()
        token, column = divmod(int(worst), original.shape[1])
        raise VerificationError(
            f"verify=True: {layer} differs from its original by more than rounding, in "
            f"{int(wrong.sum())} of {wrong.numel()} values; worst at token {token}, column "
            f"{column}: {original[token, column]:.6g} became {rewritten[token, column]:.6g}, "
            f"bound {bound[token, column]:.3g}. Please report this."
        )


def _sum_error(n: int) -> float:
    """Return gamma_n: the bound of a float32 sum's relative error, n products in any order."""
    return n * _U32 / (1 - n * _U32)


def _activate_with_error(
    pre: Tensor, error: Tensor, activation: Activation, u: float
) -> tuple[Tensor, Tensor]:
    """Return the activation and its error from an error of its input.

    Clamping never enlarges an error.
    """
    kind, alpha, limit, up_offset = activation
    act = reference.activate(pre, activation)
    if kind == "relu2":
        return act, 2 * torch.relu(pre) * error + error.square()
    gate = pre[..., 0::2].clamp(max=limit)
    up = pre[..., 1::2].clamp(-limit, limit) + up_offset
    gate_error, up_error = error[..., 0::2], error[..., 1::2]
    # The second terms are for the rounding of the sigmoid's argument.
    if kind == "geglu_tanh":
        swish = torch.nn.functional.gelu(gate, approximate="tanh")
        gate_error = gate_error * _GELU_SLOPE + u * _GELU_CURVE
    else:
        swish = gate * torch.sigmoid(alpha * gate)
        gate_error = gate_error * _SWISH_SLOPE + u * _SWISH_CURVE / (abs(alpha) or 1.0)
    return act, up.abs() * gate_error + (swish.abs() + gate_error) * up_error


class _Linear:
    """A grouped linear in float64, and the sums of the magnitudes of its terms.

    Args:
        weight: [E, K, N] or [E, N, K], in an order.
        bias: [E, N] in that order, or None.
        order: the order.
        offsets: [E+1]; expert e has the rows ``offsets[e]:offsets[e+1]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, order: Order, offsets: Tensor) -> None:
        self._weight, self._order = weight, order
        self._bias = alternate(bias) if bias is not None and order.is_concatenated else bias
        self._bounds = offsets.tolist()

    def __call__(self, rows: Tensor) -> Tensor:
        return self._sum(rows, lambda part: part, with_bias=True)

    def magnitude(self, rows: Tensor, with_bias: bool = True) -> Tensor:
        return self._sum(rows.abs(), torch.abs, with_bias)

    def _sum(self, rows: Tensor, of: Callable[[Tensor], Tensor], with_bias: bool) -> Tensor:
        n = self._weight.shape[2 if self._order.is_transposed else 1]
        y = rows.new_zeros((rows.shape[0], n))
        for expert, (start, stop) in enumerate(itertools.pairwise(self._bounds)):
            if start < stop:
                matrix = self._order.rows_of(self._weight[expert]).reshape(n, -1)
                y[start:stop] = rows[start:stop] @ of(matrix.double()).T
                if self._bias is not None and with_bias:
                    y[start:stop] += of(self._bias[expert].double())
        return y
