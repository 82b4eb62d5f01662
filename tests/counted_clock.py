"""A clock for benchmarks under test: what they do with their time is the same on every machine."""

from __future__ import annotations

import itertools


class CountedClock:
    """Each reading is a step later than the one before, or two, three, five or eight, in turn.

    Attributes:
        now: seconds; a test may add to them what work is to have taken.
    """

    def __init__(self, step: float) -> None:
        self.now = 0.0
        self._steps = itertools.cycle(step * times for times in (1, 2, 3, 5, 8))

    def __call__(self) -> float:
        self.now += next(self._steps)
        return self.now
