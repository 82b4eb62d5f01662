"""``verify=True`` for attention with sinks: the original runs beside the op, within a bound.

The bound is derived for each element, by a running error analysis in float64. It covers, for the
original and for the op, the roundings of each logit, their effect on the weights, and the sums.

Shape letters as in ``ops/reference.py``; u is the unit roundoff of the operands' dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core.errors import VerificationError
from mxfp4_fx.ops.operands_around import Attention

_U32 = 2.0**-24
_LOGITS = 1 << 22  # how many are held at a time


@torch.no_grad()
def compare(layer: str, original: Tensor, rewritten: Tensor, *operands: Any) -> None:
    """Check that two results of one attention, each [B, Q, H, D], differ by rounding alone.

    Args:
        layer: the attention's name, for the error.
        original, rewritten: the two results.
        operands: of ``ops.operands_around.Attention``, in its order.

    Raises:
        VerificationError: the results differ by more than the bound.
    """
    query, key, value, sinks, mask, scale = Attention(*operands)
    batch, heads, queries, _ = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
    step = max(1, _LOGITS // max(1, keys))
    wrong, worst = 0, (0.0, "")
    for b in range(batch):
        for h in range(heads):
            for start in range(0, queries, step):
                rows = slice(start, start + step)
                bound = _bound(
                    query[b, h, rows],
                    key[b, h // groups],
                    value[b, h // groups],
                    sinks[h],
                    None if mask is None else mask[b, h, rows],
                    scale,
                )
                was, now = (y[b, rows, h].double() for y in (original, rewritten))
                excess = ((was - now).abs() / bound).nan_to_num(torch.inf)
                # An element that is NaN or infinite in the original cannot be compared.
                excess = torch.where(was.isfinite(), excess, 0.0)
                wrong += int((excess > 1).sum())
                if excess.max() > worst[0]:
                    at, column = divmod(int(excess.argmax()), excess.shape[1])
                    where = f"batch {b}, token {start + at}, head {h}, column {column}"
                    values = f"{was[at, column]:.6g} became {now[at, column]:.6g}"
                    worst = (
                        excess.max().item(),
                        f"{where}: {values}, bound {bound[at, column]:.3g}",
                    )
    if wrong:
        raise VerificationError(
            f"verify=True: the attention of {layer} differs from its original by more than "
            f"rounding, in {wrong} of {original.numel()} values; worst at {worst[1]}. Please "
            "report this."
        )


def _bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Return how far the two results [Q, D] of one head may be apart.

    Args:
        query, key, value, mask: [Q, D], [T, D], [T, D] and [Q, T].
        sink: a number.
    """
    u, tiny = torch.finfo(query.dtype).eps / 2, torch.finfo(query.dtype).tiny
    q, k, v, end = (x.double() for x in (query, key, value, sink))
    dot, size = q @ k.T * scale, q.abs() @ k.abs().T * abs(scale)
    logits = dot if mask is None else dot + mask.double()
    logits = torch.cat([logits, end.expand(len(q), 1)], dim=1)
    lse = logits.logsumexp(dim=1, keepdim=True)
    # The original rounds the product, its multiple, the sum with the mask, and the difference from
    # the maximum, which is between the largest logit and lse. The op rounds the logits in float32,
    # and lse. Both sum in float32.
    error = 3 * u * logits.abs() + 2 * u * (logits - lse).abs() + 4 * _U32 * lse.abs()
    error[:, :-1] += _sum_error(q.shape[1] + 2) * size + 3 * u * dot.abs()
    # exp(logit) / sum, where each logit is off by its error. The sum grows at most by the factor
    # sum(p * exp(error)), and, by Jensen's inequality, shrinks at most by the same.
    error = error.masked_fill(logits == -torch.inf, 0.0)
    weight, largest = (logits - lse).exp(), (logits + error - lse).exp()
    weight_error = (largest * largest.sum(dim=1, keepdim=True) - weight).clamp(0, 1)
    # Exponentials, their sum, the quotient (the op's factor too), and the rounding to the dtype.
    relative = 2 * u + _sum_error(len(k) + 16)
    weight_error = weight_error + relative * (weight + weight_error) + tiny
    weight, weight_error = weight[:, :-1], weight_error[:, :-1]
    total = (weight + weight_error) @ v.abs()
    # The op rounds its sum, and again the product with its factor.
    error = weight_error @ v.abs() + (_sum_error(len(k)) + 2 * u) * total + tiny
    return 2 * error


def _sum_error(n: int) -> float:
    """Return gamma_n: the bound of a float32 sum's relative error, n products in any order."""
    return n * _U32 / (1 - n * _U32)
