"""``matmul_ogs`` in PyTorch, for a CPU without a compiler: some output rows of an expert at a time.

It dequantizes a panel of weights into one buffer that stays in the core's cache, and multiplies it
by a library call. So neither an expert nor a layer ever exists dequantized. Experts without rows
are skipped.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mxfp4_fx.core.formats import dequantize
from mxfp4_fx.ops.operands import Activation, Rows, Weight, columns
from mxfp4_fx.ops.reference import activate, combine

# Bytes of a dequantized panel in float32; from 2 to 8 MiB the speed is the same on 2 cores.
PANEL_BYTES = 4 << 20


def matmul_ogs(x: Tensor, weight: Weight, rows: Rows, activation: Activation | None) -> Tensor:
    """Compute ``ops.reference.matmul_ogs`` for ``layout="row_major"``."""
    n, k, bias = weight.n, weight.k, weight.bias
    height = max(2, PANEL_BYTES // (4 * max(k, 1)) & ~1)
    panel = x.new_empty((min(n, height), k), dtype=torch.float32)
    width = columns(n, activation)
    y = x.new_zeros((rows.total, width), dtype=torch.float32)
    for expert, (first, last) in enumerate(pairwise(rows.offsets.tolist())):
        if first == last:
            continue
        inputs = (x[first:last] if rows.gather is None else x[rows.gather[first:last]]).float()
        for start in range(0, n, height):
            stop = min(start + height, n)
            part = panel[: stop - start]
            codes = weight.blocks[expert, start:stop], weight.scales[expert, start:stop]
            dequantize(*codes, part.dtype, out=part)
            if bias is None:
                out = inputs @ part.T
            else:
                out = torch.addmm(bias[expert, start:stop].float(), inputs, part.T)
            here = slice(start * width // n, stop * width // n)
            y[first:last, here] = activate(out, activation)
    if rows.gammas is not None:
        y *= rows.gammas[:, None]
    if rows.scatter is not None:
        y = combine(y, rows.scatter, rows.per_token)
    return y.to(x.dtype)
