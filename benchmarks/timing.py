"""How long a call takes, and what a reader needs of the samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.benchmark import Timer

# Seconds since some moment. Tests pass one that counts its readings, so that what a benchmark does
# with its time is the same on every machine.
Clock = Callable[[], float]


def seconds(call: Callable[[], object], at_least: float, clock: Clock | None = None) -> list[float]:
    """Seconds of a call: samples that last ``at_least`` together; the warm-up is none of them.

    Without a clock it is torch's, which waits for the GPU.
    """
    options: dict[str, Any] = {"timer": clock} if clock else {}
    threads = torch.get_num_threads()
    timer = Timer("call()", globals={"call": call}, num_threads=threads, **options)
    return timer.blocked_autorange(min_run_time=at_least).times


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and all samples; one sample is its own quartiles."""
    if len(samples) < 2:
        q1 = median = q3 = samples[0]
    else:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "samples": list(samples)}


def milliseconds(samples: Sequence[float]) -> dict[str, Any]:
    """The summary of times in seconds."""
    return summary([1e3 * sample for sample in samples])
