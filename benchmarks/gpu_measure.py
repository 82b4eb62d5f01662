"""One contender at one number of tokens: checked, timed in a CUDA graph, and the replay checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Ours, check, check_result
from benchmarks.gpu_device import Device


@dataclasses.dataclass
class Measurement:
    """Seconds of one MLP. ``why_uncaptured`` is empty if it was captured."""

    error: float
    samples: list[float]
    uncaptured: list[float]
    why_uncaptured: str = ""


def measure(contender: Contender, tokens: int, device: Device, at_most: float) -> Measurement:
    """Check, then time for about so many seconds; no time counts whose result is wrong.

    A call computes every layer once; with CUDA graphs, all of them are in one graph.

    Raises:
        WrongResult: beyond what rounding explains, not the same twice where it should be, or
            another result from the graph.
    """
    inputs = contender.problem.inputs(tokens)
    error = check(contender, inputs)
    work = functools.partial(contender.run_all, inputs)
    why = ""
    try:
        samples, out = device.in_graph(work, at_most)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:  # something in it waits for the device
        device.synchronize()
        why = str(problem).partition("\n")[0]
        samples = uncaptured = device.one_by_one(work, at_most)
    else:
        check_result(contender, out, ", replayed")
        uncaptured = device.one_by_one(work, at_most / 4) if device.is_gpu else samples
    layers = contender.layers
    return Measurement(error, [s / layers for s in samples], [s / layers for s in uncaptured], why)


def measure_parts(
    ours: Ours, tokens: int, device: Device, at_most: float
) -> dict[str, list[float]]:
    """Seconds of each part of one MLP, in a graph of its own."""
    times = {}
    for name, part in ours.parts(ours.problem.inputs(tokens)).items():

        def work(part: Callable[[int], Tensor] = part) -> Tensor:
            return [part(layer) for layer in range(ours.layers)][-1]

        times[name] = [each / ours.layers for each in device.in_graph(work, at_most)[0]]
    return times
