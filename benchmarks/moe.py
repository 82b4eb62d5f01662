"""One MoE MLP to measure: its sizes, random weights, tokens, and its exact result.

Shape letters as in ``mxfp4_fx/ops/reference.py``: T tokens, E experts, A experts a token, R = T*A
routed rows, H hidden, I intermediate, K contraction, N output.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.families import GPT_OSS, Family
from benchmarks.sizes import Sizes
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, E2M1_VALUES, E8M0_BIAS, dequantize
from mxfp4_fx.ops.reference import activate, routing

# A result in bfloat16 is rounded this often in a row at most, by 2^-9 of itself each time. The
# longest chain is transformers': router weights, gate and up, bias, alpha * gate, sigmoid, glu,
# up + 1, their product, down, bias, the weighting and the sum.
ROUNDINGS = 12
# Logits in bfloat16 are off by up to 2^-8 below 2, hence a softmax's weight by 2^-7 of itself.
ROUTER_ROUNDINGS = 4
# No token's choice may hang on how its logits are rounded: below 4 that is 2^-7 of each.
LEAST_GAP = 2**-5
LOGIT_DEVIATION = 0.5


class Projection(NamedTuple):
    """Weights as a checkpoint has them."""

    blocks: Tensor  # [E, N, K/32, 16] uint8
    scales: Tensor  # [E, N, K/32] uint8
    bias: Tensor | None  # [E, N] bfloat16

    @property
    def n(self) -> int:
        return self.blocks.shape[1]

    @property
    def float_bias(self) -> Tensor:
        """In float32; zeros for none."""
        none = self.blocks.new_zeros(self.blocks.shape[:2])
        return (none if self.bias is None else self.bias).float()


class Weights(NamedTuple):
    gate_up: Projection
    down: Projection


class Router(NamedTuple):
    weight: Tensor  # [E, H] bfloat16
    bias: Tensor  # [E] bfloat16


class Inputs(NamedTuple):
    """``logits`` are None where a contender's own router computes them."""

    hidden: Tensor  # [T, H] bfloat16
    logits: Tensor | None  # [T, E] bfloat16


@dataclasses.dataclass
class Problem:
    """One MLP for up to ``tokens`` tokens; T of them are the first T.

    Attributes:
        hidden: [tokens, H] bfloat16.
        logits: [tokens, E] float64, exact.
        router: its matmul is a part of the MLP. None: the MLP begins with logits in bfloat16.
        family: whose activation and biases it has; every router is softmax over the top-k logits.
    """

    sizes: Sizes
    hidden: Tensor
    logits: Tensor
    router: Router | None
    seed: int
    family: Family = GPT_OSS
    _truth: Tensor | None = None

    @staticmethod
    def random(
        sizes: Sizes,
        tokens: int,
        device: torch.device,
        seed: int,
        has_router: bool,
        family: Family = GPT_OSS,
    ) -> Problem:
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
            logits = hidden.double() @ router.weight.double().T + router.bias.double()
            best = logits.topk(min(sizes.top_k + 1, e), dim=-1).values
            gap = best[:, sizes.top_k - 1] - best[:, -1]
            missing = (gap < LEAST_GAP) if e > sizes.top_k else torch.zeros_like(missing)
        if has_router:
            return Problem(sizes, hidden, logits, router, seed, family)
        return Problem(sizes, hidden, logits.bfloat16().double(), None, seed, family)

    @property
    def error_bound(self) -> float:
        """The relative error that rounding explains."""
        return (ROUNDINGS + ROUTER_ROUNDINGS * (self.router is not None)) * 2**-9

    def inputs(self, tokens: int) -> Inputs:
        """The first T tokens, in memory of their own."""
        logits = self.logits[:tokens].bfloat16() if self.router is None else None
        return Inputs(self.hidden[:tokens].clone(), logits)

    def weights(self, layer: int) -> Weights:
        """The experts of layer number ``layer``: the same whenever they are asked for."""
        seed, device = self.seed + 1 + layer, self.hidden.device
        return random_weights(self.sizes, seed, device, self.family.has_bias)

    def hit(self, tokens: int) -> int:
        """Experts that the first T tokens choose."""
        chosen = self.logits[:tokens].topk(self.sizes.top_k, dim=-1).indices
        return int(chosen.unique().numel())

    def work(self, tokens: int) -> dict[str, float]:
        """The fewest bytes and operations of T tokens.

        Bytes: the experts that are hit, in MXFP4. With a router also its weights, the experts'
        biases, hidden states and result, and what lies between the two matmuls, written and read.
        """
        sizes, hit = self.sizes, self.hit(tokens)
        h, i, e = sizes.hidden, sizes.intermediate, sizes.experts
        found = {"bytes": hit * sizes.mxfp4_bytes, "flops": sizes.flops(tokens)}
        if self.router is not None:
            activations = 2 * tokens * (2 * h + 2 * sizes.top_k * i)
            found["bytes"] += hit * 2 * (2 * i + h) + 2 * e * (h + 1) + activations
            found["flops"] += 2.0 * tokens * h * e
        return found

    def error(self, result: Tensor) -> float:
        """Relative, of layer 0; infinite if the result is not finite, or of another shape."""
        if self._truth is None:
            args = self.weights(0), self.hidden, self.logits, self.sizes
            self._truth = exact(*args, self.family)
        truth = self._truth[: len(result)]
        if result.shape != truth.shape or not result.isfinite().all():
            return math.inf
        return relative_error(result, truth)


def random_weights(sizes: Sizes, seed: int, device: torch.device, has_bias: bool = True) -> Weights:
    """Random codes under scales that turn inputs of order one into outputs of order one."""
    generator = torch.Generator(device).manual_seed(seed)
    code_rms = math.sqrt(sum(value**2 for value in E2M1_VALUES) / len(E2M1_VALUES))
    on: dict[str, Any] = {"device": device, "generator": generator}

    def projection(n: int, k: int) -> Projection:
        groups = (sizes.experts, n, k // BLOCK)
        blocks = torch.randint(0, 256, (*groups, BYTES_PER_BLOCK), dtype=torch.uint8, **on)
        # For a normal exponent of deviation 1, log2 of the root mean square is its mean + ln 2.
        middle = math.log2(k**-0.5 / code_rms) - math.log(2)
        exponents = torch.randn(groups, **on).add_(middle).round_()
        bias = torch.randn((sizes.experts, n), **on).mul_(0.1).bfloat16()
        scales = exponents.add_(E8M0_BIAS).to(torch.uint8)
        return Projection(blocks, scales, bias if has_bias else None)

    return Weights(
        projection(2 * sizes.intermediate, sizes.hidden),
        projection(sizes.hidden, sizes.intermediate),
    )


def exact(
    weights: Weights, hidden: Tensor, logits: Tensor, sizes: Sizes, family: Family = GPT_OSS
) -> Tensor:
    """The MLP in float64, [T, H]; one expert at a time is dequantized."""

    def linear(x: Tensor, part: Projection, expert: int) -> Tensor:
        weight = dequantize(part.blocks[expert], part.scales[expert], torch.float32)
        y = x @ weight.double().T
        return y if part.bias is None else y + part.bias[expert].double()

    _, gather_index, scatter_index, offsets = routing(logits, sizes.top_k)
    chosen = logits.topk(sizes.top_k, dim=-1).values
    gammas = torch.softmax(chosen, dim=-1).flatten()[scatter_index]  # routing's own are float32
    out = torch.zeros_like(hidden, dtype=torch.float64)
    for expert in range(sizes.experts):
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        if rows.start < rows.stop:
            token = gather_index[rows]
            pre = linear(hidden[token].double(), weights.gate_up, expert)
            inner = activate(pre, family.activation)
            out.index_add_(0, token, linear(inner, weights.down, expert) * gammas[rows, None])
    return out


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return ((result.double() - truth).norm() / truth.norm()).item()


def floor(work: dict[str, Any], memory: float, matrix: float) -> dict[str, Any]:
    """The larger of two times in milliseconds, and which it is.

    Args:
        work: bytes and flops, as :meth:`Problem.work` tells them.
        memory: bytes a second.
        matrix: floating-point operations a second.
    """
    ms = {"memory": 1e3 * work["bytes"] / memory, "matrix": 1e3 * work["flops"] / matrix}
    by = "memory" if ms["memory"] > ms["matrix"] else "matrix"
    return {"ms": ms[by], "by": by, "memory_ms": ms["memory"], "matrix_ms": ms["matrix"]}
