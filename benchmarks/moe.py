"""One MoE MLP to measure: its sizes, random weights, inputs, and its exact result.

Shape letters as in ``mxfp4_fx/ops/reference.py``: T tokens, E experts, A experts a token, R = T*A
routed rows, H hidden, I intermediate, K contraction, N output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, E2M1_VALUES, E8M0_BIAS, dequantize
from mxfp4_fx.ops.reference import routing, swiglu

ALPHA, LIMIT = 1.702, 7.0  # GPT-OSS's SwiGLU

# A result in bfloat16 is rounded this often in a row at most, by 2^-9 of itself each time. The
# longest chain is transformers': router weights, gate and up, bias, alpha * gate, sigmoid, glu,
# up + 1, their product, down, bias, the weighting and the sum.
ROUNDINGS = 12
ERROR_BOUND = ROUNDINGS * 2**-9


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The defaults are gpt-oss-20b's."""

    hidden: int = 2880
    intermediate: int = 2880
    experts: int = 32
    top_k: int = 4

    @property
    def weights(self) -> int:
        """Weights of an expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    @property
    def mxfp4_bytes(self) -> int:
        """Bytes of an expert in MXFP4, scales included."""
        return self.weights // BLOCK * (BYTES_PER_BLOCK + 1)

    @property
    def bf16_bytes(self) -> int:
        """Bytes of an expert as transformers holds it."""
        return 2 * self.weights

    def flops(self, tokens: int) -> float:
        """A multiply-add is two."""
        return 2.0 * tokens * self.top_k * self.weights


class Projection(NamedTuple):
    """Weights as a checkpoint has them."""

    blocks: Tensor  # [E, N, K/32, 16] uint8
    scales: Tensor  # [E, N, K/32] uint8
    bias: Tensor  # [E, N] bfloat16


class Weights(NamedTuple):
    gate_up: Projection
    down: Projection


class Inputs(NamedTuple):
    hidden: Tensor  # [T, H] bfloat16
    logits: Tensor  # [T, E] bfloat16

    def first(self, tokens: int) -> Inputs:
        return Inputs(self.hidden[:tokens].clone(), self.logits[:tokens].clone())


def random_weights(sizes: Sizes, seed: int) -> Weights:
    """Random codes under scales that turn inputs of order one into outputs of order one."""
    random = np.random.default_rng(seed)
    code_rms = math.sqrt(sum(value**2 for value in E2M1_VALUES) / len(E2M1_VALUES))

    def projection(n: int, k: int) -> Projection:
        groups = (sizes.experts, n, k // BLOCK)
        blocks = random.integers(0, 256, (*groups, BYTES_PER_BLOCK), dtype=np.uint8)
        # For a normal exponent of deviation 1, log2 of the root mean square is its mean + ln 2.
        middle = math.log2(k**-0.5 / code_rms) - math.log(2)
        exponents = np.rint(middle + random.standard_normal(groups, dtype=np.float32))
        scales = (E8M0_BIAS + exponents).astype(np.uint8)
        bias = torch.from_numpy(0.1 * random.standard_normal((sizes.experts, n)))
        return Projection(torch.from_numpy(blocks), torch.from_numpy(scales), bias.bfloat16())

    return Weights(
        projection(2 * sizes.intermediate, sizes.hidden),
        projection(sizes.hidden, sizes.intermediate),
    )


def random_inputs(sizes: Sizes, tokens: int, seed: int) -> Inputs:
    """Normal activations and router logits; no token's choice hangs on two equal logits.

    Which of two equal logits wins is nobody's promise, and all contenders shall take the same way.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((tokens, sizes.hidden), generator=generator).bfloat16()
    logits = torch.empty((tokens, sizes.experts), dtype=torch.bfloat16)
    tied = torch.ones(tokens, dtype=torch.bool)
    while tied.any():
        drawn = torch.randn((int(tied.sum()), sizes.experts), generator=generator)
        logits[tied] = drawn.bfloat16()
        best = logits.topk(min(sizes.top_k + 1, sizes.experts), dim=-1).values
        tied = (best.diff(dim=-1) == 0).any(dim=-1)
    return Inputs(hidden, logits)


def experts_hit(logits: Tensor, top_k: int) -> int:
    return int(logits.topk(top_k, dim=-1).indices.unique().numel())


def checked_tokens(tokens: Sequence[int], count: int) -> list[int]:
    """Tokens that are compared: the first, the last of each T, and ``count`` random ones."""
    largest = max(tokens)
    drawn = np.random.default_rng(0).choice(largest, min(count, largest), replace=False)
    return sorted({0, *(t - 1 for t in tokens), *(int(t) for t in drawn)})


def exact(weights: Weights, inputs: Inputs, sizes: Sizes) -> Tensor:
    """The MLP in float64, [T, H]; one expert at a time is dequantized."""

    def linear(x: Tensor, part: Projection, expert: int) -> Tensor:
        weight = dequantize(part.blocks[expert], part.scales[expert], torch.float32)
        return x @ weight.double().T + part.bias[expert].double()

    _, gather_index, scatter_index, offsets = routing(inputs.logits.double(), sizes.top_k)
    chosen = inputs.logits.double().topk(sizes.top_k, dim=-1).values
    gammas = torch.softmax(chosen, dim=-1).flatten()[scatter_index]  # routing's own are float32
    out = torch.zeros_like(inputs.hidden, dtype=torch.float64)
    for expert in range(sizes.experts):
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        if rows.start < rows.stop:
            token = gather_index[rows]
            x = inputs.hidden[token].double()
            inner = swiglu(linear(x, weights.gate_up, expert), ALPHA, LIMIT)
            y = linear(inner, weights.down, expert) * gammas[rows, None]
            out.index_add_(0, token, y)
    return out


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return ((result.double() - truth).norm() / truth.norm()).item()
