"""Experts in float64, with a bound on the error of any float32 evaluation.

This file is written from the formula and imports nothing of the package. A step returns a
:class:`Bounded`: the exact value and, for each element, a bound on ``|computed - exact|``. It holds
for every evaluation that rounds to nearest, sums in float32 in any order, and has an exp within
:data:`EXP_ULP`. The bounds are a running error analysis (Higham, Accuracy and Stability of
Numerical Algorithms, chapter 3). They leave out float64's own rounding, which is 2**-29 of them.

Shape letters: T tokens, E experts, A experts per token, R rows, K contraction, N output, H hidden,
I intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

U = 2.0**-24  # float32's unit roundoff: the largest relative error of rounding to nearest
UNDERFLOW = 2.0**-150  # half of float32's smallest subnormal: the largest error of rounding there
SMALLEST_NORMAL = 2.0**-126  # below it, an exponential may have an error of its own size
EXP_ULP = 2  # exp's error; vectorized and C libraries promise 1, the other is a reserve
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling v1.0, table 5


@dataclass(frozen=True)
class Bounded:
    """An exact float64 value, and a bound on the error of the value that is computed for it."""

    value: Tensor
    error: Tensor

    @staticmethod
    def exact(value: Tensor) -> Bounded:
        return Bounded(value.double(), torch.zeros_like(value, dtype=torch.float64))

    @property
    def largest(self) -> Tensor:
        """The largest magnitude that the computed value can have."""
        return self.value.abs() + self.error

    def __getitem__(self, index: Any) -> Bounded:
        return Bounded(self.value[index], self.error[index])

    def view(self, *shape: int) -> Bounded:
        return Bounded(self.value.view(shape), self.error.view(shape))

    def plus_error(self, error: Tensor | float) -> Bounded:
        return Bounded(self.value, self.error + error)

    def rounded(self, dtype: torch.dtype) -> Bounded:
        """Add the error of rounding to nearest: relative, and absolute for subnormal numbers."""
        u = torch.finfo(dtype).eps / 2
        return self.plus_error(u * self.largest + u * torch.finfo(dtype).smallest_normal)

    def through(self, increasing: Callable[[Tensor], Tensor]) -> Bounded:
        """Apply an increasing function, evaluated exactly, to the value and its interval's ends."""
        y = increasing(self.value)
        low, high = (increasing(self.value + e) for e in (-self.error, self.error))
        return Bounded(y, torch.maximum(y - low, high - y))


def roundings(n: Any) -> Any:
    """Return Higham's gamma_n: how far n factors 1 + d, |d| <= U, or their inverses are from 1."""
    return n * U / (1 - n * U)


def times(a: Bounded, b: Bounded) -> Bounded:
    """Return a float32 product: each error times the other factor, then one rounding."""
    error = a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error
    return Bounded(a.value * b.value, error).rounded(torch.float32)


def linear(x: Bounded, weight: Tensor, bias: Tensor, underflow: float = UNDERFLOW) -> Bounded:
    """Return ``x @ weight^T + bias`` for x [R, K], float64 weight [N, K] and bias [N].

    ``underflow`` is the absolute error of a product, in addition to the relative one of rounding.
    """
    k = weight.shape[1]
    size = weight.abs().T
    terms = x.largest @ size + bias.abs()
    error = (
        x.error @ size  # x's own error
        + roundings(k + 1) * terms  # a term meets one product and at most k additions
        + k * underflow  # of each product
    )
    return Bounded(x.value @ weight.T + bias, error)


def grouped_linear(
    x: Bounded, expert: Tensor, weight: Tensor, bias: Tensor, underflow: float = UNDERFLOW
) -> Bounded:
    """Apply weight[expert[r]] [N, K] and bias[expert[r]] to each row r; zero if there are none."""
    shape = (x.value.shape[0], weight.shape[1])
    y = Bounded.exact(torch.zeros(shape))
    for e in range(weight.shape[0]):
        here = expert == e
        part = linear(x[here], weight[e], bias[e], underflow)
        y.value[here], y.error[here] = part.value, part.error
    return y


def activate(
    y: Bounded, kind: str, alpha: float = 1.0, limit: float = torch.inf, up_offset: float = 0.0
) -> Bounded:
    """Map [.., N] to [.., N'] by one of the op's activations, or ``"none"``."""
    if kind == "none":
        return y
    if kind == "relu2":
        positive = y.through(torch.relu)
        return times(positive, positive)
    if kind == "swiglu":
        return swiglu(y, alpha, limit, up_offset)
    assert kind == "geglu_tanh"
    gate, up = gate_and_up(y, limit)
    return times(times(gate, gelu_factor(gate)), shifted(up, up_offset))


def swiglu(y: Bounded, alpha: float, limit: float, up_offset: float = 1.0) -> Bounded:
    """Map [.., 2I], gate in even and up in odd columns, to [.., I]."""
    gate, up = gate_and_up(y, limit)
    _, s = sigmoid_of(gate, alpha)
    return times(times(gate, s), shifted(up, up_offset))


def gate_and_up(y: Bounded, limit: float) -> tuple[Bounded, Bounded]:
    """Return both, clamped, which rounds nothing; limit is a float32 number."""
    gate = y[..., 0::2].through(lambda v: v.clamp(max=limit))
    return gate, y[..., 1::2].through(lambda v: v.clamp(min=-limit, max=limit))


def shifted(up: Bounded, offset: float) -> Bounded:
    return Bounded(up.value + offset, up.error).rounded(torch.float32)


def gelu_factor(gate: Bounded) -> Bounded:
    """Return what GELU multiplies the gate with: (1 + tanh(z)) / 2, or the sigmoid of 2 z."""
    z = gate.through(lambda v: 2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))
    # A cube has two products, either constant its own rounding and a product; then the sum of terms
    # with the same sign. Below float32's range, a cube is lost beside the gate.
    z = z.plus_error(roundings(7) * z.largest + UNDERFLOW)
    s = z.through(torch.sigmoid)
    # As in `sigmoid_of`. tanh is within as many ulp as exp, each U at most, and half of that stays;
    # where it is near -1, that is all that is left of the sum.
    relative = roundings(2 * EXP_ULP + 2) * s.largest
    return s.plus_error(relative + roundings(EXP_ULP) / 2 + SMALLEST_NORMAL)


def sigmoid_of(gate: Bounded, alpha: float) -> tuple[Bounded, Bounded]:
    """Return alpha * gate, and its sigmoid."""
    steps = roundings(2) * abs(alpha) * gate.largest  # alpha to float32, the product
    z = Bounded(alpha * gate.value, abs(alpha) * gate.error + steps + UNDERFLOW)
    s = z.through(torch.sigmoid)
    # 1 / (1 + exp(-z)): an ulp is at most 2U of exp, and exp at most the sum; then the roundings of
    # the sum and of the division
    return z, s.plus_error(roundings(2 * EXP_ULP + 2) * s.largest + SMALLEST_NORMAL)


def softmax(logits: Tensor) -> Bounded:
    """Return the softmax of exact logits [T, A] over the last dimension."""
    logits = logits.double()
    distance = logits.amax(dim=-1, keepdim=True) - logits
    # Below exp(-104), float32 has only zero: larger distances add no error.
    distance = torch.where(distance > 200, 0.0, distance)
    n = (
        4 * EXP_ULP  # the exponential above and those below the line: 2U an ulp
        + distance  # logit - largest is off by U * distance, and exp is its own derivative,
        + distance.amax(dim=-1, keepdim=True)  # again below the line, where the worst term counts
        + logits.shape[-1]
        - 1  # the additions of the sum
        + 2  # division, or reciprocal and product
    )
    p = torch.softmax(logits, dim=-1)
    return Bounded(p, roundings(n) * p + SMALLEST_NORMAL)


def combine(slots: Bounded) -> Bounded:
    """Return the sum [T, N] over each token's rows [T, A, N]."""
    additions = slots.value.shape[1] - 1
    error = slots.error.sum(dim=1) + roundings(additions) * slots.largest.sum(dim=1)
    return Bounded(slots.value.sum(dim=1), error)


def sort_routes(
    indices: Tensor, num_experts: int, first_expert: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """Sort indices [T, A] by expert: gather_index [R], scatter_index [R], expert_offsets [E+1]."""
    a = indices.shape[1]
    offsets, slots = [0], []
    everyone = list(enumerate(indices.flatten().tolist()))
    here = range(first_expert, first_expert + num_experts)
    for expert in here:
        slots += [slot for slot, e in everyone if e == expert]
        offsets.append(len(slots))
    slots += [slot for slot, e in everyone if e not in here]
    return [slot // a for slot in slots], slots, offsets


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Bounded]:
    """Return indices and weights [T, A] of the ``top_k`` largest of logits [T, E] that differ."""
    order = torch.sort(logits.double(), dim=-1, descending=True).indices[:, :top_k]
    return order, softmax(logits.gather(1, order))


def attention_error(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Return the bound of attention with sinks, [B, Q, H, D]; operands as in ``ops/reference.py``.

    It holds for evaluations with logits and sums in float32 that may hold the weights, the sum and
    the result in query's dtype. They may take the keys in parts of 32 or more, whose sums are
    rescaled whenever a part has a larger logit.
    """
    u, least = torch.finfo(query.dtype).eps / 2, torch.finfo(query.dtype).smallest_normal
    groups, (size, keys) = query.shape[1] // key.shape[1], (query.shape[3], key.shape[2])
    q, sink = query.double(), sinks.double()[:, None, None]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    dot, terms = ((a @ b.transpose(2, 3)) * scale for a, b in ((q, k), (q.abs(), k.abs())))
    logits = dot if mask is None else dot + mask.double()
    both = torch.cat([logits, sink.expand(*logits.shape[:3], 1)], dim=3)
    lse = both.logsumexp(dim=3, keepdim=True)
    # Its sum, twice the scale's rounding, the mask's; the difference from a maximum and, beside the
    # sink, from lse, which is itself a sum with a logarithm.
    off = U * (3 * both.abs() + 2 * (both - lse).abs() + 4 * lse.abs() + 4)
    off[..., :-1] += roundings(size + 2) * terms
    off = off.masked_fill(both == -torch.inf, 0.0)
    # A weight is exp(logit) / sum, where the sum's own error is that of a mean of its terms; it is
    # at most 1.
    weight, largest = (both - lse).exp(), (both + off - lse).exp()
    grown = (largest * largest.sum(dim=3, keepdim=True)).clamp(max=1)
    steps = keys + (2 * EXP_ULP + 2) * (3 + keys // 32)
    weight_error = (grown - weight) + (u + roundings(steps)) * grown + u * least
    weight, weight_error = weight[..., :-1], weight_error[..., :-1]
    total = (weight + weight_error) @ v.abs()
    error = weight_error @ v.abs() + (roundings(keys) + 2 * u) * total + 2 * u * least
    return error.transpose(1, 2)


def experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Bounded,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    alpha: float,
    limit: float,
    inner_dtype: torch.dtype,
    up_offset: float = 1.0,
    kind: str = "swiglu",
) -> Bounded:
    """Return the MoE MLP's output [T, H] for given routes.

    Args:
        hidden: [T, H]; the result is rounded to its dtype.
        indices, weights: the routes, [T, A].
        gate_up, down: float64 weights and biases, [E, N, H] with [E, N], [E, H, I] with [E, H].
        kind, alpha, limit, up_offset: the activation (:func:`activate`).
        inner_dtype: the dtype to which the intermediate [R, I] is rounded.
    """
    t, a = indices.shape
    expert = indices.reshape(-1)
    rows = Bounded.exact(hidden.repeat_interleave(a, dim=0))
    inner = grouped_linear(rows, expert, *gate_up)
    inner = activate(inner, kind, alpha, limit, up_offset).rounded(inner_dtype)
    y = grouped_linear(inner, expert, *down)
    y = times(y.view(t, a, hidden.shape[1]), weights[..., None])
    return combine(y).rounded(hidden.dtype)


def random_logits(t: int, e: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return logits [T, E]; those of a token differ, in float16 and bfloat16, too."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand((t, e), generator=generator).argsort(dim=1)
    return (order * 0.75 + torch.rand((t, e), generator=generator) * 0.5).to(dtype)


def random_routes(t: int, e: int, a: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return indices and weights [T, A]; the indices of a token differ."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand((t, e), generator=generator).argsort(dim=1)[:, :a]
    return indices, torch.rand((t, a), generator=generator)


@dataclass(frozen=True)
class Matrices:
    """E random MXFP4 matrices [N, K]: their bytes, and their values."""

    blocks: Tensor  # [E, N, K/32, 16] uint8
    scales: Tensor  # [E, N, K/32] uint8
    bias: Tensor  # [E, N]

    @staticmethod
    def random(
        e: int, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> Matrices:
        """Draw every code and sign, scales 2**-8 .. 2**-4, biases that reach SwiGLU's limits."""
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randint(0, 256, (e, n, k // 32, 16), generator=generator)
        scales = torch.randint(119, 124, (e, n, k // 32), generator=generator)
        bias = torch.randn((e, n), generator=generator) * 4
        return Matrices(blocks.to(torch.uint8), scales.to(torch.uint8), bias.to(dtype))

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.blocks, self.scales, self.bias

    @property
    def weight(self) -> Tensor:
        """The values, float64 [E, N, K]. The low nibble is first; scale byte 255 means NaN."""
        table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)
        codes = torch.stack((self.blocks & 15, self.blocks >> 4), dim=-1).flatten(-2)
        scale = torch.exp2(self.scales.double() - 127)
        scale = scale.masked_fill(self.scales == 255, torch.nan)
        return (table[codes.long()] * scale[..., None]).flatten(-2)

    @property
    def without_bias(self) -> Matrices:
        return Matrices(self.blocks, self.scales, torch.zeros_like(self.bias))

    @property
    def exact(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias.double()


def assert_within(actual: Tensor, expected: Bounded) -> None:
    """Assert that every element is within its bound, and NaN only where the exact value is NaN."""
    value, error = expected.value, expected.error
    assert actual.shape == value.shape
    assert torch.equal(actual.isnan(), value.isnan()), "NaN in other places than expected"
    numbers = ~value.isnan()
    assert error[numbers].isfinite().all(), "the bound itself overflows: give smaller inputs"
    off = (actual.double() - value).abs()
    wrong = numbers & ~(off <= error)
    if wrong.any():
        at = (off / error).masked_fill(~wrong, 0).argmax()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are off by more than rounding: at "
            f"{tuple(int(i) for i in torch.unravel_index(at, wrong.shape))} "
            f"{actual.flatten()[at]:.9g} is not {value.flatten()[at]:.9g} within "
            f"{error.flatten()[at]:.3g}"
        )


def assert_as_accurate(actual: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Assert that the error is at most twice that of a reference in the same dtype.

    This is for computations that are too long for a bound, such as whole models and gradients. The
    error is the largest of the tensor. One rounding of the result to its dtype is added to the
    reference's error, because the reference may be exact by chance.

    Args:
        actual: the tensor to test.
        reference: the result of trusted code in the same dtype.
        exact: the result of trusted code in float64.
    """
    assert actual.dtype == reference.dtype
    assert actual.shape == reference.shape == exact.shape
    assert exact.dtype == torch.float64
    if not exact.numel():
        return
    error, own = ((y.double() - exact).abs().max().item() for y in (actual, reference))
    rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs().max().item()
    assert error <= 2 * (own + rounding), (
        f"off by {error:.3g}; the reference is off by {own:.3g}, and rounding to "
        f"{actual.dtype} by {rounding:.3g}"
    )
