"""Costs that sizes hide: calling the ops, and sharing a pool of threads with torch."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.contenders import Ours, Transformers, transformers_experts
from benchmarks.moe import Inputs, Problem
from benchmarks.rounds import SAMPLE_SECONDS
from benchmarks.sizes import Sizes
from benchmarks.timing import Clock, milliseconds, seconds, summary

TINY = Sizes(hidden=64, intermediate=32, experts=4, top_k=2)  # K and N are 32 and 64

Call = Callable[[], object]
Group = tuple[Call, Mapping[str, Call]]  # what prepares the calls, and the calls by name


def overhead(ours: Sequence[Ours], rounds: int, clock: Clock) -> dict[str, Any]:
    """Microseconds of a call for one token where there is next to nothing to compute.

    Args:
        ours: whose paths are taken; their sizes do not matter.

    Returns:
        For each name the summaries of the three ops and of the MLP (all three); for comparison
        transformers' MLP, uncompiled, and a matmul of the same size by torch.
    """
    problem = Problem.random(TINY, 1, torch.device("cpu"), seed=0, has_router=False)
    inputs, weights = problem.inputs(1), [problem.weights(0)]
    groups: dict[str, Group] = {}
    for each in ours:
        tiny = Ours(
            *(problem, weights, each.name, each.label, each.kind),
            kernels=each.kernels, layout=each.layout, path=each.path,
        )  # fmt: skip
        tiny.prepare()
        calls: dict[str, Call] = {
            name: partial(part, 0) for name, part in tiny.parts(inputs).items() if name != "router"
        }
        groups[each.name] = tiny.prepare, {**calls, "mlp": partial(tiny.run, 0, inputs)}
    experts = transformers_experts(TINY, weights)
    peer = Transformers(problem, experts, "transformers", "", "", form="grouped_mm", compile=None)
    groups["transformers"] = peer.prepare, {"mlp": partial(peer.run, 0, inputs)}
    x, weight = torch.randn(1, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    groups["torch"] = lambda: None, {"mm": lambda: torch.mm(x, weight)}
    return {
        "unit": "microseconds a call",
        "sizes": {"tokens": 1, "experts": TINY.experts, "top_k": TINY.top_k, "k_and_n": [32, 64]},
        "calls": {
            name: {part: summary([1e6 * each for each in times]) for part, times in parts.items()}
            for name, parts in _times(groups, rounds, clock).items()
        },
    }


def alternating(contender: Ours, inputs: Inputs, rounds: int, clock: Clock) -> dict[str, Any]:
    """Our MLP and a matmul of torch in turn, against both apart: 1 is no cost of switching.

    The matmul is float32 and rotates over weights that leave the caches, as the MLP does: else the
    MLP would cost it its caches, and no pool of threads could help that.
    """
    hidden = inputs.hidden.shape[1]
    count = max(2, min(16, (512 << 20) // (4 * hidden * hidden)))
    weights = itertools.cycle([torch.randn(hidden, hidden) for _ in range(count)])
    x = torch.randn(16, hidden)

    def mlp() -> None:
        contender.run_next(inputs)

    def matmul() -> None:
        torch.mm(x, next(weights))

    def both() -> None:
        mlp()
        matmul()

    calls = {"mlp": mlp, "matmul": matmul, "both": both}
    times = _times({"": (contender.prepare, calls)}, rounds, clock)[""]
    ratios = [together / (a + b) for a, b, together in zip(*times.values(), strict=True)]
    return {
        "contender": contender.name,
        "tokens": len(inputs.hidden),
        "milliseconds": {name: milliseconds(samples) for name, samples in times.items()},
        "ratio": summary(ratios),
    }


def _times(
    groups: Mapping[str, Group], rounds: int, clock: Clock
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each call, a sample for each round."""
    found: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in calls} for name, (_, calls) in groups.items()
    }
    for _ in range(rounds):
        for name, (prepare, calls) in groups.items():
            prepare()
            for part, call in calls.items():
                found[name][part].append(statistics.median(seconds(call, SAMPLE_SECONDS, clock)))
    return found
