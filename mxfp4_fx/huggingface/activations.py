"""Which activation the experts of a family have: found by computing it, not by their names.

transformers' experts interface fixes all else: the two matmuls, where gate and up are, and that
routing weights come last. A family's own code then maps [rows, N] to [rows, I]. It is run on
numbers, and must give what one of the ops' activations gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.ops.operands import ACTIVATIONS, Activation
from mxfp4_fx.ops.reference import activate

# Two of the activations differ by more somewhere; one that is computed in float32 differs by less.
_NEAR = 2.0**-18
_POINTS = 81  # of gate, and of up


def activation_of(experts: Any, name: str) -> Activation:
    """Return the activation of experts.

    Args:
        experts: of a class with transformers' ``@use_experts_implementation``; may be on meta.
        name: their name, for messages.

    Raises:
        CheckpointError: it is none that the kernels compute.
    """
    limits = sorted({math.inf, *_numbers(experts, "limit")})
    alphas = sorted({1.0, *_numbers(experts, "alpha")})
    reach = 2 * max((limit for limit in limits if math.isfinite(limit)), default=8.0)
    line = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64, device="cpu")
    line = line + 0.01  # zero shows nothing
    try:
        if getattr(experts, "has_gate", True):
            gate, up = torch.meshgrid(line, line, indexing="ij")
            rows = torch.stack([gate.flatten(), up.flatten()], dim=1)
            # One pair in a row, in the order in which the family has gate and up.
            actual = experts._apply_gate(rows)
        else:
            rows = line[:, None]
            actual = experts.act_fn(rows)
    except Exception as error:  # whatever the family's code raises
        raise _unknown(experts, name) from error
    is_gated = bool(getattr(experts, "has_gate", True))
    for kind, alpha, limit, offset in _candidates(is_gated, alphas, limits):
        candidate = Activation(kind, alpha, limit, offset)
        if _agree(actual, activate(rows, candidate)):
            return candidate
    raise _unknown(experts, name)


def _candidates(
    is_gated: bool, alphas: list[float], limits: list[float]
) -> Iterator[tuple[str, float, float, float]]:
    for kind in (kind for kind, gated in ACTIVATIONS.items() if gated == is_gated):
        given = alphas if kind == "swiglu" else [1.0]
        bounds = limits if is_gated else [math.inf]
        yield from itertools.product([kind], given, bounds, [0.0, 1.0] if is_gated else [0.0])


def _agree(actual: Any, expected: Tensor) -> bool:
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    return bool(((actual - expected).abs() <= _NEAR * expected.abs().clamp(min=1)).all())


def _numbers(experts: nn.Module, word: str) -> set[float]:
    """Return the positive numbers among the attributes of experts whose names have a word."""
    return {
        float(value)
        for key, value in vars(experts).items()
        if word in key and isinstance(value, int | float) and value > 0
    }


def _unknown(experts: Any, name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is {type(experts).__name__}, whose activation is none that the kernels compute: "
        "load the checkpoint with transformers itself, which makes its experts dense"
    )
