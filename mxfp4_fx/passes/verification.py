"""``verify=True``: on the first call, each rewritten region runs beside the original one.

The original gets the weights that MXFP4 holds, so the two results differ by rounding alone. This
module derives a bound for the rounding of both, for each element, by a running error analysis in
float64. The bound covers the float32 sums of each matmul, each value that the original rounds to
the activations' dtype, and the effect of errors before SwiGLU on its result.

Shape letters as in ``ops/reference.py``; u is the unit roundoff of the activations' dtype,
or of the coarsest if there are several.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mxfp4_fx.core.errors import VerificationError
from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER
from mxfp4_fx.core.orders import GPT_OSS
from mxfp4_fx.ops import reference
from mxfp4_fx.weights.source import Source, encoding_of
from mxfp4_fx.weights.swizzle import swizzle_weight

_U32 = 2.0**-24
# max |d/dg g*sigmoid(alpha*g)| = max |s + z s (1-s)| over z, and max |z^2 s (1-s)|, rounded up.
_SWISH_SLOPE = 1.1
_SWISH_CURVE = 0.44
# Roundings of an elementwise chain in SwiGLU: alpha*g, sigmoid, the two products, up + 1.
_SWIGLU_ROUNDINGS = 5


def requantize(weight: Tensor) -> Tensor:
    """Return the values [E, K, N] that MXFP4 holds of a weight; one expert at a time."""
    held = torch.empty_like(weight)
    for expert in range(weight.shape[0]):
        dequantize(*quantize(weight.detach()[expert].T), weight.dtype, out=held[expert].T)
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
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    top_k: int,
    alpha: float,
    limit: float,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Check that two results of one region, each [T, H], differ by rounding alone.

    Args:
        layer: the region's name, for the error.
        original, rewritten: the two results.
        routes: the result of ``reference.routing`` for the region.
        hidden, gate_up, ..., limit: the region's inputs; the weights are requantized. ``hidden`` is
            in the dtype in which the rewritten region computes.
        dtypes: what the original rounds to, which may be several dtypes.

    Raises:
        VerificationError: the results differ by more than the bound.
    """
    gammas, gather_index, scatter_index, offsets = routes
    u = max(torch.finfo(dtype).eps / 2 for dtype in dtypes)
    tiny = max(torch.finfo(dtype).tiny for dtype in dtypes)
    # Autocast may round the rows of hidden, in the original alone.
    rows_u = u if u > torch.finfo(hidden.dtype).eps / 2 else 0.0

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _grouped(x, lambda e: weight[e].T, bias, offsets)

    def magnitude(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _grouped(x.abs(), lambda e: weight[e].T.abs(), bias.abs(), offsets)

    x = hidden[gather_index].double()
    h, i = x.shape[1], down.shape[1]
    pre, size = linear(x, gate_up, gate_up_bias), magnitude(x, gate_up, gate_up_bias)
    # Both sum in float32. The original rounds the sum, and again after it adds the bias.
    pre_error = 2 * _sum_error(h + 1) * size + (2 * u + rows_u) * size
    act, act_error = _swiglu_with_error(pre, pre_error, alpha, limit, u)
    # The original rounds each step of SwiGLU to the activations' dtype, the rewritten one only the
    # result.
    act_error = act_error + (_SWIGLU_ROUNDINGS + 1) * (u + _U32) * act.abs() + tiny

    zero = torch.zeros_like(down_bias)
    row = linear(act, down, down_bias)
    size = magnitude(act, down, down_bias)
    row_error = magnitude(act_error, down, zero) + 2 * _sum_error(i + 1) * size + 2 * u * size
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


def _swiglu_with_error(
    pre: Tensor, error: Tensor, alpha: float, limit: float, u: float
) -> tuple[Tensor, Tensor]:
    """Return SwiGLU and its error from an error of its input. Clamping never enlarges an error."""
    gate = pre[..., 0::2].clamp(max=limit)
    up = pre[..., 1::2].clamp(-limit, limit)
    swish = gate * torch.sigmoid(alpha * gate)
    gate_error, up_error = error[..., 0::2], error[..., 1::2]
    # The second term is for the rounding of alpha*gate.
    gate_error = gate_error * _SWISH_SLOPE + u * _SWISH_CURVE / (abs(alpha) or 1.0)
    reach = (up + 1).abs() * gate_error + (swish.abs() + gate_error) * up_error
    return swish * (up + 1), reach


def _grouped(
    rows: Tensor, weight: Callable[[int], Tensor], bias: Tensor, offsets: Tensor
) -> Tensor:
    """Compute ``rows @ weight(e)^T + bias[e]`` in float64, each row with its expert e."""
    y = rows.new_zeros((rows.shape[0], bias.shape[1]))
    bounds = offsets.tolist()
    for expert in range(bias.shape[0]):
        part = slice(bounds[expert], bounds[expert + 1])
        if part.start < part.stop:
            y[part] = rows[part] @ weight(expert).T.double() + bias[expert].double()
    return y
