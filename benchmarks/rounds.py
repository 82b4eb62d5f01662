"""Rounds on a CPU: for each number of tokens the floors, then every contender in turn; again.

A machine drifts by a quarter within an hour, and where its cores are shared it halves its speed
within seconds. So only what is measured side by side is compared.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.command import Log
from benchmarks.contenders import Contender, check
from benchmarks.moe import Inputs
from benchmarks.probes import Probes
from benchmarks.timing import Clock, seconds

SAMPLE_SECONDS = 0.04  # a sample: the median of the calls that fit
SLOW_CALL = 6.0  # seconds; calls that may take longer are not measured
LEAST_SAMPLES = 3


@dataclasses.dataclass
class Cell:
    """One contender at one number of tokens."""

    contender: Contender
    tokens: int
    error: float
    call_seconds: float  # before any sample, to plan with
    samples: list[float] = dataclasses.field(default_factory=list)  # seconds a call

    def take(self, inputs: Inputs, clock: Clock) -> None:
        self.contender.prepare()
        times = seconds(lambda: self.contender.run_next(inputs), SAMPLE_SECONDS, clock)
        self.samples.append(statistics.median(times))


def check_all(
    contenders: Sequence[Contender], inputs: Mapping[int, Inputs], log: Log, clock: Clock
) -> tuple[list[Cell], list[dict[str, object]]]:
    """Check every contender at every number of tokens: (what can be measured, what is skipped).

    Raises:
        WrongResult: an error beyond what rounding to bfloat16 explains.
    """
    cells, skipped = [], []
    for contender in contenders:
        log(f"checking {contender.label}")
        last: tuple[int, float] | None = None
        for tokens in sorted(inputs):
            if reason := contender.why_not(tokens, last, SLOW_CALL):
                skipped.append({"contender": contender.name, "tokens": tokens, "reason": reason})
                continue
            error = check(contender, inputs[tokens])
            started = clock()
            contender.run_next(inputs[tokens])
            last = tokens, clock() - started
            cells.append(Cell(contender, tokens, error, last[1]))
    return cells, skipped


def run_rounds(
    cells: Sequence[Cell],
    inputs: Mapping[int, Inputs],
    probes: Probes | None,
    rounds: int,
    at_most: float,
    log: Log,
    clock: Clock,
) -> int:
    """Take samples for ``rounds`` rounds or ``at_most`` seconds; returns the rounds that were made.

    A cell that would take more than its share of the time pauses in some rounds, but everyone has
    ``LEAST_SAMPLES`` samples in the end (fewer only if there are fewer rounds).
    """
    started = clock()
    share = 2 * at_most / max(len(cells), 1)
    done = 0
    while done < rounds:
        if clock() - started > at_most and done >= LEAST_SAMPLES:
            log(f"time is up after {done} of {rounds} rounds")
            break
        mixed = random.Random(done)
        for tokens in mixed.sample(list(inputs), len(inputs)):
            due = [c for c in cells if c.tokens == tokens and _is_due(c, done, rounds, share)]
            if due and probes is not None:
                probes.measure(tokens)
            # Nobody always follows the same neighbour, whose traces are left in the caches.
            for cell in mixed.sample(due, len(due)):
                cell.take(inputs[tokens], clock)
        done += 1
        log(f"round {done} of {rounds}: {clock() - started:.0f} s")
    return done


def _is_due(cell: Cell, turn: int, rounds: int, share: float) -> bool:
    """Whether the cell takes a sample on this turn: as many as fit into ``share`` seconds, spread
    evenly over the rounds.
    """
    # A slow call is made twice for a sample, the first time to see how long it takes.
    wanted = max(LEAST_SAMPLES, int(share / (2 * cell.call_seconds)))
    if len(cell.samples) >= wanted:
        return False
    if turn < LEAST_SAMPLES:
        return True
    return wanted >= rounds or turn * wanted // rounds != (turn - 1) * wanted // rounds
