"""``verify=True`` for linears in MXFP8: the original runs beside the op, within a bound.

The bound is derived for each element, from the rounding of each weight to MXFP8 and from a running
error analysis of both sums, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4_fx.core.errors import VerificationError
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.core.mxfp8 import E4M3_MAX

_U32 = 2.0**-24
_FLUSHED = 2.0**-126  # below it, matrix units may read and write zeros
_VALUES = 1 << 22  # of a weight that are looked at at a time


@torch.no_grad()
def compare(
    layer: str,
    original: Tensor,
    rewritten: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    """Check that two results of one linear, each [..., N], differ by rounding alone.

    Args:
        layer: the linear's name, for the error.
        original, rewritten: the exact result and that with a weight in MXFP8.
        x, weight, bias: [..., K], [N, K], and [N] or None, as the model holds them.

    Raises:
        VerificationError: the results differ by more than the bound.
    """
    n, k = weight.shape
    rows = x.reshape(-1, k).double().abs()
    was, now = (y.reshape(-1, n).double() for y in (original, rewritten))
    wrong, worst = 0, (0.0, "")
    step = max(1, _VALUES // k)
    for first in range(0, n, step):
        part = slice(first, first + step)
        bound = _bound(rows, weight[part], None if bias is None else bias[part])
        excess = ((was[:, part] - now[:, part]).abs() / bound).nan_to_num(torch.inf)
        # An element that is NaN or infinite in the original cannot be compared.
        excess = torch.where(was[:, part].isfinite(), excess, 0.0)
        wrong += int((excess > 1).sum())
        if excess.numel() and excess.max() > worst[0]:
            row, column = divmod(int(excess.argmax()), excess.shape[1])
            at = row, first + column
            worst = (
                excess.max().item(),
                f"row {at[0]}, column {at[1]}: {was[at]:.6g} became {now[at]:.6g}, bound "
                f"{bound[row, column]:.3g}",
            )
    if wrong:
        raise VerificationError(
            f"verify=True: the linear {layer} differs from its original by more than MXFP8's "
            f"rounding, in {wrong} of {original.numel()} values; worst at {worst[1]}. Please "
            "report this."
        )


def _bound(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return how far the two results [R, N] may be apart.

    Args:
        x: magnitudes [R, K], float64.
        weight, bias: [N, K], and [N] or None.
    """
    size, k = weight.double().abs(), weight.shape[1]
    u, tiny = torch.finfo(weight.dtype).eps / 2, torch.finfo(weight.dtype).smallest_normal
    # E4M3 has four significant bits and, below 2^-6, multiples of 2^-9. A scale is below twice the
    # block's largest magnitude over 448, and at least 2^-127. In the dtype, the value rounds again.
    scale = 2 * size.unflatten(1, (-1, BLOCK)).amax(2, keepdim=True) / E4M3_MAX
    step = (scale + 2.0**-127).expand(-1, -1, BLOCK).flatten(1) * 2.0**-10
    off = torch.maximum(size * 2.0**-4, step)
    off = off + u * (size + off) + max(u * tiny, _FLUSHED)
    terms = x @ (size + off).T + (0 if bias is None else bias.double().abs())
    sums = (k + 2) * _U32 / (1 - (k + 2) * _U32) * terms  # of either result, in any order
    # Each result rounds to the dtype, and torch may keep the products of 16 bits to float32 only.
    flushed = k * max(u * tiny, _FLUSHED) + _FLUSHED * (size + off).sum(1)  # products, and x
    return x @ off.T + 2 * sums + 2 * u * (terms + tiny) + flushed
