"""Samples of a quantity and what a reader needs of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

# Seconds that have passed since some moment. Tests hand over one that counts its readings, so that
# what a benchmark does with its time does not depend on how fast their machine is.
Clock = Callable[[], float]


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and all samples; one sample is its own quartiles."""
    if len(samples) < 2:
        q1 = median = q3 = samples[0]
    else:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "samples": list(samples)}
