"""What a GPU is measured with: random weights made on the device, tokens, and the exact result.

One MLP from hidden states on, the router's matmul included. Weights of a layer follow from its
number alone, so that every contender makes the same ones in its own form. Shape letters as in
``moe.py``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from moe import (
    ROUNDINGS,
    Inputs,
    Projection,
    Sizes,
    Weights,
    exact,
    experts_hit,
    relative_error,
)
from torch import Tensor

from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, E2M1_VALUES, E8M0_BIAS

# Logits in bfloat16 are off by up to 2^-8 below 2, hence a softmax's weight by 2^-7 of itself.
ERROR_BOUND = (ROUNDINGS + 4) * 2**-9
# No token's choice may hang on how its logits are rounded: below 4 that is 2^-7 of each.
LEAST_GAP = 2**-5
LOGIT_DEVIATION = 0.5


class Router(NamedTuple):
    weight: Tensor  # [E, H] bfloat16
    bias: Tensor  # [E] bfloat16


def random_layer(sizes: Sizes, seed: int, device: torch.device) -> Weights:
    """The experts of a layer, as a checkpoint has them."""
    generator = torch.Generator(device).manual_seed(seed)
    code_rms = math.sqrt(sum(value**2 for value in E2M1_VALUES) / len(E2M1_VALUES))

    def projection(n: int, k: int) -> Projection:
        groups = (sizes.experts, n, k // BLOCK)
        blocks = torch.randint(
            0, 256, (*groups, BYTES_PER_BLOCK),
            dtype=torch.uint8, device=device, generator=generator,
        )  # fmt: skip
        # As in moe.random_weights: inputs of order one give outputs of order one.
        middle = math.log2(k**-0.5 / code_rms) - math.log(2)
        exponents = torch.randn(groups, device=device, generator=generator).add_(middle).round_()
        bias = torch.randn((sizes.experts, n), device=device, generator=generator)
        scales = exponents.add_(E8M0_BIAS).to(torch.uint8)
        return Projection(blocks, scales, bias.mul_(0.1).bfloat16())

    return Weights(
        projection(2 * sizes.intermediate, sizes.hidden),
        projection(sizes.hidden, sizes.intermediate),
    )


@dataclasses.dataclass
class Problem:
    """One MLP for up to ``tokens`` tokens; T of them are the first T.

    Attributes:
        hidden: [tokens, H] bfloat16.
        logits: [tokens, E] float64, exact.
        router: shared by all layers, whose copies of it are their own.
    """

    sizes: Sizes
    hidden: Tensor
    logits: Tensor
    router: Router
    seed: int
    _truth: Tensor | None = None

    @staticmethod
    def random(sizes: Sizes, tokens: int, device: torch.device, seed: int) -> Problem:
        """Fresh for every seed. A token whose choice of experts would be close is drawn again."""
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator)

        e, h = sizes.experts, sizes.hidden
        weight = (randn(e, h) * (LOGIT_DEVIATION * h**-0.5)).bfloat16()
        router = Router(weight, (randn(e) * 0.05).bfloat16())
        hidden = torch.empty((tokens, h), dtype=torch.bfloat16, device=device)
        missing = torch.ones(tokens, dtype=torch.bool, device=device)
        while count := int(missing.sum()):
            hidden[missing] = randn(count, h).bfloat16()
            logits = _logits(hidden, router)
            best = logits.topk(min(sizes.top_k + 1, e), dim=-1).values
            gap = best[:, sizes.top_k - 1] - best[:, -1]
            missing = (gap < LEAST_GAP) if e > sizes.top_k else torch.zeros_like(missing)
        return Problem(sizes, hidden, logits, router, seed)

    def weights(self, layer: int) -> Weights:
        """The experts of layer number ``layer``: the same whenever they are asked for."""
        return random_layer(self.sizes, self.seed + 1 + layer, self.hidden.device)

    def hit(self, tokens: int) -> int:
        """Experts that the first T tokens choose."""
        return experts_hit(self.logits[:tokens], self.sizes.top_k)

    def truth(self, tokens: int) -> Tensor:
        """Layer 0 in float64, from the exact logits on: [T, H]."""
        if self._truth is None:
            inputs = Inputs(self.hidden, self.logits)
            self._truth = exact(self.weights(0), inputs, self.sizes)
        return self._truth[:tokens]

    def error(self, result: Tensor) -> float:
        """Relative, of layer 0; infinite if the result is not finite, or of another shape."""
        truth = self.truth(len(result))
        if result.shape != truth.shape or not result.isfinite().all():
            return math.inf
        return relative_error(result, truth)


def _logits(hidden: Tensor, router: Router) -> Tensor:
    return hidden.double() @ router.weight.double().T + router.bias.double()
