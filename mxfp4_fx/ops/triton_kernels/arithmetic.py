"""Arithmetic in kernels: exponential, activations, rounding, splitting into bfloat16 terms."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter does bfloat16 arithmetic on raw bits and has no inline assembly. There the
# kernels use float32 instead of bfloat16, and plain operations instead of assembly.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
UNIT = tl.constexpr(tl.float32 if INTERPRETED.value else tl.bfloat16)  # matrix units' operands

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG2_E_REST = tl.constexpr(1.925963033500e-08)  # log2(e) minus its float32 neighbour
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x):
    """Return exp(x) in float32 within 2 ulp.

    x log2(e) is split into a float32 product and its rest: exp2(product) (1 + rest ln 2).
    """
    if INTERPRETED:
        return tl.exp(x)
    product = x * _LOG2_E
    rest = tl.fma(x, _LOG2_E, -product) + x * _LOG2_E_REST
    power = tl.exp2(product)
    exact = tl.fma(power, rest * _LN_2, power)
    # Beyond float32's range `rest` is inf - inf, and the power alone is right.
    return tl.where((power == 0) | (power == float("inf")), power, exact)


@triton.jit
def gated(gate, up, alpha, limit, up_offset, ACTIVATION: tl.constexpr):
    """Return the clamped SwiGLU or GEGLU; as in PyTorch's clamp, NaN stays NaN.

    With a negative limit, the upper bound of ``up`` wins. In GEGLU, (1 + tanh(z)) / 2 is the
    sigmoid of 2 z, which loses no digits where tanh is near -1.
    """
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "geglu_tanh":
        exponent = (gate * gate * 0.044715 + 1.0) * gate * -1.5957691216057308  # -2 sqrt(2 / pi)
    else:
        exponent = -alpha * gate
    return tl.div_rn(gate, 1.0 + exponential(exponent)) * (up + up_offset)


@triton.jit
def relu2(x):
    """Return ``relu(x)^2``; NaN stays NaN."""
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x * x


@triton.jit
def take_term(rest):
    """Split float32 numbers into bfloat16 terms, their upper 8 bits of significand, and the rest.

    Three such terms hold every float32 number, two every float16 number. Infinity is one term. Both
    results are float32.
    """
    bits = rest.to(tl.int32, bitcast=True) & -65536
    term = bits.to(tl.float32, bitcast=True)
    return term, tl.where(tl.abs(rest) == float("inf"), 0.0, rest - term)


@triton.jit
def rounded(value, TO: tl.constexpr):
    """Round float32 to a result's dtype, to nearest, ties to even.

    The interpreter's own conversion to bfloat16 truncates.
    """
    if INTERPRETED and tl.bfloat16 == TO:
        bits = value.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value == value, up, value)
    return value.to(TO)


@triton.jit
def uniform(condition, NVIDIA: tl.constexpr):
    """Return a condition that is the same in all threads, so that NVIDIA's compiler knows it is."""
    if INTERPRETED or not NVIDIA:
        return condition
    votes = tl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, 0xffffffff;",
        "=r,r",
        [condition.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    return votes != 0
