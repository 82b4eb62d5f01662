"""One contender at one number of tokens: checked first, captured in a CUDA graph, then timed."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_contenders import Contender, Ours
from gpu_device import Device, Work
from gpu_layer import ERROR_BOUND, Problem
from rounds import WrongResult
from torch import Tensor

SLOW_CALL = 1.0  # seconds of one MLP; what may take longer is not measured


@dataclasses.dataclass
class Measurement:
    """Seconds of one MLP. ``why_uncaptured`` is empty if it was captured."""

    error: float
    samples: list[float]
    uncaptured: list[float]
    why_uncaptured: str = ""

    @property
    def seconds(self) -> float:
        return min(self.samples)


def measure(
    contender: Contender, problem: Problem, tokens: int, device: Device, seconds: float
) -> Measurement:
    """Check, then time for about ``seconds``.

    A call computes every layer once; with CUDA graphs, all of them are one graph.

    Raises:
        WrongResult: beyond what rounding explains, not the same twice where it should be, or
            another result from the graph.
    """
    hidden = problem.hidden[:tokens].clone()
    error = check(contender, problem, hidden)

    def work() -> Tensor:
        return contender.run_all(hidden)

    work()
    device.synchronize()
    replay, why = captured(contender, problem, work, device)
    samples = device.samples(replay, seconds)
    uncaptured = samples if why or not device.is_gpu else device.samples(work, seconds / 4)
    layers = contender.layers
    return Measurement(error, [s / layers for s in samples], [s / layers for s in uncaptured], why)


def check(contender: Contender, problem: Problem, hidden: Tensor) -> float:
    """The relative error of layer 0 against float64."""
    with poisoned(not contender.is_compiled):
        out = contender.run(0, hidden)
        again = contender.run(0, hidden) if contender.is_exact else out
    error = problem.error(out)
    require(contender, problem, len(hidden), error, "")
    if not torch.equal(out, again):
        raise WrongResult(f"{contender.label} at {_where(problem, len(hidden))}: two runs differ")
    return error


def captured(
    contender: Contender, problem: Problem, work: Work, device: Device
) -> tuple[Work, str]:
    """``work`` as the replay of a graph, whose result is checked too; or itself, and why."""
    try:
        replay, out = device.capture(work)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # something in it waits for the device
        device.synchronize()
        return work, str(error).partition("\n")[0]
    out.fill_(math.nan)
    replay()
    device.synchronize()
    require(contender, problem, len(out), problem.error(out), ", replayed")

    def replayed() -> Tensor:
        replay()
        return out

    return replayed, ""


def require(contender: Contender, problem: Problem, tokens: int, error: float, how: str) -> None:
    """Raise WrongResult unless rounding to bfloat16 explains the error. NaN is not explained."""
    if not error <= ERROR_BOUND:
        raise WrongResult(
            f"{contender.label} at {_where(problem, tokens)}{how}: relative error {error:.2e}; "
            f"rounding explains {ERROR_BOUND:.2e}"
        )


def measure_parts(
    ours: Ours, problem: Problem, tokens: int, device: Device, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each part of one MLP, in a graph of its own."""
    times = {}
    for name, work in ours.parts(problem.hidden[:tokens].clone()).items():
        work()
        replay, _ = device.capture(work)
        times[name] = [s / ours.layers for s in device.samples(replay, seconds)]
        del replay
    return times


@contextmanager
def poisoned(is_wanted: bool) -> Iterator[None]:
    """What is allocated within holds NaN or the largest integer until it is written."""
    if not is_wanted:
        yield
        return
    memory: Any = torch.utils.deterministic  # a module of properties
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of algorithms that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
            memory.fill_uninitialized_memory = filled


def _where(problem: Problem, tokens: int) -> str:
    return f"E={problem.sizes.experts}, T={tokens}"
