"""Costs that sizes hide: calling the ops, and sharing a pool of threads with torch."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from contenders import Ours, Transformers, kernels_of, swizzled_layers, transformers_experts
from moe import Inputs, Sizes, random_inputs, random_weights
from samples import summary

TINY = Sizes(hidden=64, intermediate=32, experts=4, top_k=2)  # K and N are 32 and 64
CALLS = 200  # in a row


def overhead(ours: Sequence[tuple[str, str, str | None]], rounds: int) -> dict[str, Any]:
    """Microseconds of a call for one token where there is next to nothing to compute.

    Args:
        ours: (name, label, path) of this project's contenders.

    Returns:
        For each name the summaries of the three ops and of the MLP (all three); for comparison
        transformers' MLP, uncompiled, and a matmul of the same size by torch.
    """
    experts = transformers_experts(TINY, [random_weights(TINY, seed=0)])
    inputs = random_inputs(TINY, tokens=1, seed=0)
    timed: dict[str, dict[str, Callable[[], Any]]] = {}
    prepare: dict[str, Callable[[], None]] = {}
    for name, label, path in ours:
        layers = swizzled_layers(experts, kernels_of(path)[1], count=1)
        contender = Ours(name, label, TINY, path, layers)
        contender.prepare()
        timed[name] = _ops(contender, inputs)
        prepare[name] = contender.prepare
    peer = Transformers("grouped_mm", TINY, experts, compiler="eager")
    timed["transformers"] = {"mlp": lambda: peer.run(0, inputs)}
    prepare["transformers"] = peer.prepare
    x, weight = torch.randn(1, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    timed["torch"] = {"mm": lambda: torch.mm(x, weight)}

    samples: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds + 1):  # the first warms up
        for name, functions in timed.items():
            prepare.get(name, lambda: None)()
            for part, function in functions.items():
                samples.setdefault((name, part), []).append(_seconds(function, CALLS) * 1e6)
    return {
        "unit": "microseconds a call",
        "sizes": {"tokens": 1, "experts": TINY.experts, "top_k": TINY.top_k, "k_and_n": [32, 64]},
        "calls": {
            name: {part: summary(samples[name, part][1:]) for part in functions}
            for name, functions in timed.items()
        },
    }


def _ops(contender: Ours, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    routes = contender.routing(inputs)
    inner = contender.gate_up(0, inputs.hidden, routes)
    return {
        "routing": lambda: contender.routing(inputs),
        "gate_up": lambda: contender.gate_up(0, inputs.hidden, routes),
        "down": lambda: contender.down(0, inner, routes),
        "mlp": lambda: contender.run(0, inputs),
    }


def alternating(contender: Ours, inputs: Inputs, rounds: int) -> dict[str, Any]:
    """Our MLP and a matmul of torch in turn, against both apart: 1 is no cost of switching.

    The matmul is float32 and rotates over weights that leave the caches, as the MLP does: else the
    MLP would cost it its caches, and no pool of threads could help that.
    """
    hidden = inputs.hidden.shape[1]
    count = max(2, min(16, (512 << 20) // (4 * hidden * hidden)))
    weights = itertools.cycle([torch.randn(hidden, hidden) for _ in range(count)])
    x = torch.randn(16, hidden)
    contender.prepare()

    def mlp() -> None:
        contender(inputs)

    def matmul() -> None:
        torch.mm(x, next(weights))

    def both() -> None:
        mlp()
        matmul()

    calls = max(2, min(CALLS, int(0.05 / _seconds(both, 2))))
    times: dict[str, list[float]] = {"mlp": [], "matmul": [], "both": []}
    for _ in range(rounds):
        for name, function in (("mlp", mlp), ("matmul", matmul), ("both", both)):
            times[name].append(_seconds(function, calls) * 1e3)
    ratios = [
        both_ms / (mlp_ms + matmul_ms)
        for mlp_ms, matmul_ms, both_ms in zip(*times.values(), strict=True)
    ]
    return {
        "contender": contender.name,
        "tokens": len(inputs.hidden),
        "milliseconds": {name: summary(samples) for name, samples in times.items()},
        "ratio": summary(ratios),
    }


def _seconds(function: Callable[[], Any], calls: int) -> float:
    """Median seconds of a call: whoever else uses the machine shall not count."""
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
