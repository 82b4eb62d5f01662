"""Mutated graphs are rewritten rightly or reported: a seeded run of the fuzzer, which can fail."""

from __future__ import annotations

import pytest
from fuzz.graphs import fuzz, quiet, run_case
from fuzz.self_check import deleted, deletions

# Many more, as `python -m fuzz.graphs` runs them, are for whoever changes a pattern.
CHUNKS = [
    range(30, 60),
    *(
        pytest.param(range(seed, seed + 75), marks=pytest.mark.exhaustive)
        for seed in range(60, 210, 75)
    ),
]


@pytest.mark.parametrize("seeds", CHUNKS, ids=str)
def test_no_mutation_makes_a_wrong_rewrite_a_crash_or_a_silent_miss(seeds: range) -> None:
    statistics = fuzz(seeds)
    faults = statistics.faults
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(map(str, faults))
    # A fuzzer that reaches nothing finds nothing.
    assert statistics.verdicts["rewritten"] > len(seeds) // 4
    assert statistics.verdicts["refused"] > len(seeds) // 4
    neutral = statistics.neutral
    assert neutral["rewritten"] > neutral.total() // 3


def test_a_case_depends_on_its_seed_alone() -> None:
    with quiet():
        first = run_case(11)
        run_case(12)
        again = run_case(11)
    assert first == again
    assert first.graph


@pytest.mark.parametrize(
    ("refusal", "form", "only"),
    [
        ("modes[node] != modes[root]: refuse", "plain-grad", "grad_mode"),
        pytest.param(
            *("not equal(actual, number): refuse", "grouped_mm", "literal"),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_proof_that_asks_less_is_found_out(refusal: str, form: str, only: str) -> None:
    (deletion,) = [d for d in deletions() if d.text.endswith(refusal)]
    assert not fuzz(range(20), form, only).faults
    with deleted(deletion):
        assert fuzz(range(20), form, only, stop=True).faults
