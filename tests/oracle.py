"""GPT-OSS experts in float64, and how far a float32 evaluation of them can be off.

Written from the formula; nothing of the package is used. A step returns a :class:`Bounded`: the
exact value and, element by element, a bound on ``|computed - exact|`` for every evaluation that
rounds to nearest, sums in float32 in whatever order, and has an exp within :data:`EXP_ULP`. The
bounds are a running error analysis (Higham, Accuracy and Stability of Numerical Algorithms,
chapter 3); float64's own rounding is 2**-29 of them and left out.

Shape letters: T tokens, E experts, A experts per token, R rows, K contraction, N output, H hidden,
I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

U = 2.0**-24  # float32's unit roundoff: rounding to nearest is off by at most this, relatively
UNDERFLOW = 2.0**-150  # half of float32's smallest subnormal: where rounding is not relative
SMALLEST_NORMAL = 2.0**-126  # below it an exponential may be off by all of itself
EXP_ULP = 2  # exp's error; vectorized and C libraries promise 1, one more is for good measure
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling v1.0, table 5


@dataclass(frozen=True)
class Bounded:
    """An exact float64 value and a bound on the error of what is computed in its place."""

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
        """Rounded to nearest: relative to the computed value, absolute among subnormals."""
        u = torch.finfo(dtype).eps / 2
        return self.plus_error(u * self.largest + u * torch.finfo(dtype).smallest_normal)

    def through(self, increasing: Callable[[Tensor], Tensor]) -> Bounded:
        """An increasing function, evaluated exactly: the ends of the interval move with it."""
        y = increasing(self.value)
        low, high = (increasing(self.value + e) for e in (-self.error, self.error))
        return Bounded(y, torch.maximum(y - low, high - y))


def roundings(n: Any) -> Any:
    """Higham's gamma_n: n factors of at most 1 + U, or their inverses, differ from 1 by this."""
    return n * U / (1 - n * U)


def times(a: Bounded, b: Bounded) -> Bounded:
    """A float32 product: both errors, each beside the other factor, then one rounding."""
    error = a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error
    return Bounded(a.value * b.value, error).rounded(torch.float32)


def linear(x: Bounded, weight: Tensor, bias: Tensor, underflow: float = UNDERFLOW) -> Bounded:
    """``x @ weight^T + bias`` for x [R, K], float64 weight [N, K] and bias [N].

    ``underflow`` is how far a product may be off beside relative rounding.
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
    """Row r of x with weight[expert[r]] [N, K] and bias[expert[r]]; zero if there is no such."""
    shape = (x.value.shape[0], weight.shape[1])
    y = Bounded.exact(torch.zeros(shape))
    for e in range(weight.shape[0]):
        here = expert == e
        part = linear(x[here], weight[e], bias[e], underflow)
        y.value[here], y.error[here] = part.value, part.error
    return y


def swiglu(y: Bounded, alpha: float, limit: float) -> Bounded:
    """[.., 2I] -> [.., I]: gate in the even columns, up in the odd; limit is a float32 number."""
    gate = y[..., 0::2].through(lambda v: v.clamp(max=limit))  # clamping rounds nothing
    up = y[..., 1::2].through(lambda v: v.clamp(min=-limit, max=limit))
    _, s = sigmoid_of(gate, alpha)
    up_and_1 = Bounded(up.value + 1, up.error).rounded(torch.float32)
    return times(times(gate, s), up_and_1)


def sigmoid_of(gate: Bounded, alpha: float) -> tuple[Bounded, Bounded]:
    """alpha * gate and its sigmoid."""
    steps = roundings(2) * abs(alpha) * gate.largest  # alpha to float32, the product
    z = Bounded(alpha * gate.value, abs(alpha) * gate.error + steps + UNDERFLOW)
    s = z.through(torch.sigmoid)
    # 1 / (1 + exp(-z)): an ulp is up to 2U of exp, which is at most all of the sum; sum; division
    return z, s.plus_error(roundings(2 * EXP_ULP + 2) * s.largest + SMALLEST_NORMAL)


def softmax(logits: Tensor) -> Bounded:
    """Over the last dimension of exact logits [T, A]."""
    logits = logits.double()
    distance = logits.amax(dim=-1, keepdim=True) - logits
    # Below exp(-104) float32 has no number but zero, however far below.
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
    """The sum [T, N] over each token's rows [T, A, N]."""
    additions = slots.value.shape[1] - 1
    error = slots.error.sum(dim=1) + roundings(additions) * slots.largest.sum(dim=1)
    return Bounded(slots.value.sum(dim=1), error)


def sort_routes(
    indices: Tensor, num_experts: int, first_expert: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """gather_index [R], scatter_index [R] and expert_offsets [E+1] of indices [T, A], by a loop."""
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
    """The ``top_k`` largest of logits [T, E], no two alike: their indices [T, A] and weights."""
    order = torch.sort(logits.double(), dim=-1, descending=True).indices[:, :top_k]
    return order, softmax(logits.gather(1, order))


def experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Bounded,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    alpha: float,
    limit: float,
    inner_dtype: torch.dtype,
) -> Bounded:
    """The MoE MLP [T, H] of hidden [T, H] with routes [T, A] chosen already.

    Args:
        hidden: its dtype is the result's.
        gate_up, down: float64 weights and biases, [E, 2I, H] with [E, 2I], [E, H, I] with [E, H].
        inner_dtype: what the intermediate [R, I] is rounded to.
    """
    t, a = indices.shape
    expert = indices.reshape(-1)
    rows = Bounded.exact(hidden.repeat_interleave(a, dim=0))
    inner = grouped_linear(rows, expert, *gate_up)
    inner = swiglu(inner, alpha, limit).rounded(inner_dtype)
    y = grouped_linear(inner, expert, *down)
    y = times(y.view(t, a, hidden.shape[1]), weights[..., None])
    return combine(y).rounded(hidden.dtype)


def random_logits(t: int, e: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """[T, E]; those of a token differ, in float16 and bfloat16 too."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand((t, e), generator=generator).argsort(dim=1)
    return (order * 0.75 + torch.rand((t, e), generator=generator) * 0.5).to(dtype)


def random_routes(t: int, e: int, a: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices and weights [T, A]; the indices of a token differ."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand((t, e), generator=generator).argsort(dim=1)[:, :a]
    return indices, torch.rand((t, a), generator=generator)


@dataclass(frozen=True)
class Matrices:
    """E random MXFP4 matrices [N, K]: their bytes, and what these mean."""

    blocks: Tensor  # [E, N, K/32, 16] uint8
    scales: Tensor  # [E, N, K/32] uint8
    bias: Tensor  # [E, N]

    @staticmethod
    def random(
        e: int, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> Matrices:
        """Every code and sign occurs; scales are 2**-8 .. 2**-4; biases reach SwiGLU's limits."""
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
        """[E, N, K] float64; the low nibble comes first, and scale byte 255 means NaN."""
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
    """Every element is as near to the exact value as rounding lets it be; NaN where that is NaN."""
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
    """At most twice the error that the reference has itself in the same precision.

    For what is too long for a bound, such as whole models and gradients. Errors are the largest of
    a tensor; the rounding of the result to its dtype is allowed on top, as the reference may be
    exact by chance.

    Args:
        actual: what is judged.
        reference: the same by trusted code in actual's dtype.
        exact: the same by trusted code in float64.
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
