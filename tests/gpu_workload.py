"""Runs the Triton kernels on a GPU: every layout, regime and kind of scale, in small sizes.

A program for ``compute-sanitizer --tool memcheck`` (and racecheck, initcheck), which
``test_on_gpu.py`` starts. It says nothing of the results.
"""

from __future__ import annotations

import torch
from implementations import TRITON, Kernels, randn
from oracle import Matrices, random_logits

EXPERTS, TOP_K = 6, 4
TOKENS = (0, 1, 7, 40, 200, 700)  # the last takes routing by many programs


def run(kernels: Kernels, tokens: int, dtype: torch.dtype, scale: int | None) -> None:
    hidden, logits = randn(tokens, 160, dtype=dtype), random_logits(tokens, EXPERTS)
    gate_up = Matrices.random(EXPERTS, 192, 160, dtype)
    down = Matrices.random(EXPERTS, 150, 96, dtype)
    if scale is not None:
        gate_up.scales[1, 3, 1] = scale
    gammas, gather_index, scatter_index, offsets = kernels.routing(logits, TOP_K)
    inner = kernels.matmul_ogs(hidden, gate_up, offsets, gather_index, activation="swiglu")
    kernels.matmul_ogs(inner, down, offsets, None, scatter_index, gammas, experts_per_token=TOP_K)
    indices = torch.randint(0, 2 * EXPERTS, (tokens, TOP_K))
    kernels.routing_from_routes(indices, torch.rand(tokens, TOP_K), EXPERTS, 2)


def main() -> None:
    for spec in TRITON:
        kernels = Kernels(spec)
        for tokens in TOKENS:
            run(kernels, tokens, torch.bfloat16, None)
        run(kernels, 7, torch.bfloat16, 0)
        run(kernels, 7, torch.bfloat16, 200)
        run(kernels, 7, torch.float16, None)
        run(kernels, 7, torch.float32, None)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
