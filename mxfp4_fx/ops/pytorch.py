"""``matmul_ogs`` in PyTorch for a CPU without a compiler: hit experts, some output rows at a time.

A panel of weights is dequantized into one buffer that stays in the core's cache and multiplied at
once by the library, so that neither an expert nor a layer ever exists dequantized.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4_fx.core.formats import dequantize
from mxfp4_fx.ops.reference import combine, swiglu

# Float32 bytes of a dequantized panel; from 2 to 8 MiB the speed is the same on 2 cores.
PANEL_BYTES = 4 << 20


def matmul_ogs(
    x: Tensor,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor,
    expert_offsets: Tensor,
    gather_index: Tensor | None,
    scatter_index: Tensor | None,
    gammas: Tensor | None,
    experts_per_token: int,
    activation: str,
    alpha: float,
    limit: float,
    layout: str,
) -> Tensor:
    """See ``ops.reference.matmul_ogs``; only ``layout="row_major"``."""
    e, n, k = blocks.shape[0], blocks.shape[1], x.shape[1]
    r = x.shape[0] if gather_index is None else gather_index.shape[0]
    height = min(n, max(2, PANEL_BYTES // (4 * max(k, 1)) & ~1))
    panel = x.new_empty((height, k), dtype=torch.float32)
    halved = activation == "swiglu"
    y = x.new_zeros((r, n // 2 if halved else n), dtype=torch.float32)
    offsets = expert_offsets.tolist()
    for expert in range(e):
        rows = slice(offsets[expert], offsets[expert + 1])
        if rows.start == rows.stop:
            continue
        inputs = (x[rows] if gather_index is None else x[gather_index[rows]]).float()
        for start in range(0, n, panel.shape[0]):
            stop = min(start + panel.shape[0], n)
            weight = panel[: stop - start]
            part = blocks[expert, start:stop], scales[expert, start:stop]
            dequantize(*part, weight.dtype, out=weight)
            out = torch.addmm(bias[expert, start:stop].float(), inputs, weight.T)
            if halved:
                y[rows, start // 2 : stop // 2] = swiglu(out, alpha, limit)
            else:
                y[rows, start:stop] = out
    if gammas is not None:
        y *= gammas[:, None]
    if scatter_index is not None:
        y = combine(y, scatter_index, experts_per_token)
    return y.to(x.dtype)
