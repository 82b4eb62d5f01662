"""Rounds: every contender in turn, once for each number of tokens, floors first; then again.

The machine drifts by a quarter within an hour, so only what is measured side by side is compared.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from contenders import Contender
from moe import ERROR_BOUND, Inputs, relative_error
from probes import Probes
from samples import Clock
from torch import Tensor

SAMPLE_SECONDS, SAMPLE_CALLS = 0.04, 32  # a sample: as many calls in a row, and their median
SLOW_CALL = 6.0  # seconds; calls that may take longer are not measured
LEAST_SAMPLES = 3


class WrongResult(Exception):
    """A contender does not compute the MLP; nothing is measured then."""


@dataclasses.dataclass
class Cell:
    """One contender at one number of tokens."""

    contender: Contender
    tokens: int
    error: float
    call_seconds: float  # before any sample, to plan with
    samples: list[float] = dataclasses.field(default_factory=list)  # seconds a call

    def take(self, inputs: Inputs, clock: Clock) -> None:
        contender = self.contender
        contender.prepare()
        times = []
        for _ in range(min(SAMPLE_CALLS, math.ceil(SAMPLE_SECONDS / self.call_seconds))):
            started = clock()
            contender(inputs)
            times.append(clock() - started)
        self.samples.append(statistics.median(times))


@dataclasses.dataclass(frozen=True)
class Skipped:
    contender: str
    tokens: int
    reason: str


def check_all(
    contenders: Sequence[Contender],
    inputs: Mapping[int, Inputs],
    checked: Sequence[int],
    truth: Tensor,
    log: Callable[[str], None],
    clock: Clock = time.perf_counter,
) -> tuple[list[Cell], list[Skipped]]:
    """Call every contender at every number of tokens, on its first layer, and compare.

    Args:
        inputs: number of tokens -> inputs; T tokens are the first T of the most.
        checked: the tokens whose ``truth`` is known, in ascending order.
        truth: [checked, H] float64, of the first layer.

    Raises:
        WrongResult: an error beyond what rounding to bfloat16 explains.
    """
    cells, skipped = [], []
    for contender in contenders:
        log(f"checking {contender.label}")
        last: Cell | None = None
        for tokens in sorted(inputs):
            reason = _too_slow(contender, tokens, last)
            if reason:
                skipped.append(Skipped(contender.name, tokens, reason))
                continue
            known = [i for i, token in enumerate(checked) if token < tokens]
            contender.prepare()
            started = clock()
            out = contender.run(0, inputs[tokens])
            first = clock() - started
            error = relative_error(out[[checked[i] for i in known]], truth[known])
            if not (out.isfinite().all() and error <= ERROR_BOUND):
                raise WrongResult(
                    f"{contender.label} at T={tokens}: relative error {error:.2e} of "
                    f"{len(known)} tokens; rounding explains {ERROR_BOUND:.2e}"
                )
            started = clock()
            contender(inputs[tokens])  # the first call may have compiled
            last = Cell(contender, tokens, error, min(first, clock() - started))
            cells.append(last)
    return cells, skipped


def run_rounds(
    cells: Sequence[Cell],
    inputs: Mapping[int, Inputs],
    probes: Probes | None,
    rounds: int,
    seconds: float,
    log: Callable[[str], None],
    clock: Clock = time.perf_counter,
) -> int:
    """Take samples for ``rounds`` rounds or ``seconds``; returns the rounds that were made.

    A cell that would take more than its share of the time pauses in some rounds, but everyone has
    ``LEAST_SAMPLES`` samples in the end (fewer only if there are fewer rounds).
    """
    started = clock()
    share = 2 * seconds / max(len(cells), 1)
    done = 0
    while done < rounds:
        elapsed = clock() - started
        if elapsed > seconds and done >= LEAST_SAMPLES:
            log(f"time is up after {done} of {rounds} rounds")
            break
        if probes is not None:
            probes.measure()
        # Nobody always follows the same neighbour, whose traces are left in the caches.
        for cell in random.Random(done).sample(cells, len(cells)):
            wanted = max(LEAST_SAMPLES, int(share / cell.call_seconds))
            if len(cell.samples) < wanted and _is_due(done, rounds, wanted):
                cell.take(inputs[cell.tokens], clock)
        done += 1
        log(f"round {done} of {rounds}: {clock() - started:.0f} s")
    return done


def _is_due(turn: int, rounds: int, wanted: int) -> bool:
    """Whether one of ``wanted`` samples, spread evenly over the rounds, falls on this turn."""
    if wanted >= rounds:
        return True
    return turn * wanted // rounds != (turn - 1) * wanted // rounds


def _too_slow(contender: Contender, tokens: int, last: Cell | None) -> str | None:
    if contender.most_tokens is not None and tokens > contender.most_tokens:
        return f"measured up to T={contender.most_tokens} only"
    if last is not None:
        # At most, for up to a few tokens an expert a call takes the same time whatever T is.
        expected = last.call_seconds * tokens / last.tokens
        if expected > SLOW_CALL and last.call_seconds > SLOW_CALL / 4:
            return f"a call would take up to {expected:.0f} s"
    return None
