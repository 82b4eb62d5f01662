"""Products of parameters, thinned: pairs for ``make test``, and triples for ``make test-all``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def covering(*axes: Sequence[Any], strength: int = 2) -> list[Any]:
    """Combinations of the axes' values, for ``pytest.mark.parametrize``.

    They are so many that any values of any ``strength`` axes meet in one of them: a fault that
    needs no more than so many things at once shows. Those that one axis more needs are exhaustive,
    and no others are tested. A value that is a tuple gives several arguments. The same axes always
    give the same choice.
    """
    combinations = list(itertools.product(*axes))
    chosen = _chosen(axes, strength, [])
    return [
        pytest.param(
            *(argument for value in combinations[at] for argument in _arguments(value)),
            id="-".join(
                _name(argument) for value in combinations[at] for argument in _arguments(value)
            ),
            marks=[] if at in chosen else [pytest.mark.exhaustive],
        )
        for at in sorted(_chosen(axes, strength + 1, chosen))
    ]


def _chosen(axes: Sequence[Sequence[Any]], strength: int, given: list[int]) -> list[int]:
    """Add to the given combinations' places until any values of ``strength`` axes meet in one."""
    met = [set(itertools.combinations(enumerate(values), strength)) for values in _places(axes)]
    missing = set().union(*met).difference(*(met[at] for at in given))
    chosen = list(given)
    while missing:
        best = max(range(len(met)), key=lambda at: len(met[at] & missing))
        chosen.append(best)
        missing -= met[best]
    return chosen


def _places(axes: Sequence[Sequence[Any]]) -> list[tuple[int, ...]]:
    """Where each combination's values stand in their axes: values need not be hashable."""
    return list(itertools.product(*(range(len(axis)) for axis in axes)))


def _arguments(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _name(argument: Any) -> str:
    # The same in every process, which the text of a function is not.
    return str(getattr(argument, "__name__", argument)).removeprefix("torch.")


def exhaustive(*values: Any) -> Any:
    """A set of parameters that adds to another what only ``make test-all`` asks for."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)
