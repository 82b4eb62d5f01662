"""Calls of native programs that are prepared, and run later.

Most of a small call is Python: guards are checked, weights looked up, results allocated. Between
two layers the caches lose all of that code, so one layer's calls take several times as long as in
a row with those of all other layers. In a block of :func:`prepared`, calls of compiled graphs only
make their results. Their kernels run when ``Pending.run`` says so.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from mxfp4_fx.ops.program import Pending, Program

_thread = threading.local()


class CannotWait(Exception):
    """A call that is to be prepared would compute at once."""


@contextlib.contextmanager
def prepared() -> Iterator[list[Pending]]:
    """Prepare this thread's calls of compiled graphs in the block; yield them as they come.

    A call that cannot be prepared raises :class:`CannotWait` before it computes anything.
    """
    calls: list[Pending] = []
    _thread.calls = calls
    try:
        yield calls
    finally:
        _thread.calls = None


class Compiled:
    """What a compiler made of a graph, called with the graph's inputs.

    AOTAutograd's wrapper is around all that is compiled. It has nothing to do for most programs: it
    hands on the very inputs, and returns the very results. Where it was seen to do no more, it is
    left out from then on: what it does was decided when it compiled.
    """

    def __init__(self) -> None:
        self.call: Callable[..., Any] = _never
        self._program: Program | None = None
        self._seen = threading.local()
        self._is_all = False  # the program is all that a call does

    def watch(self, program: Program) -> Callable[[list[Any]], list[Tensor]]:
        """Return the program in a form that shows what it is called with."""

        def watched(args: list[Any]) -> list[Tensor]:
            given = tuple(args)
            results = program(args)
            self._seen.call = given, results
            return results

        self._program, watched._boxed_call = program, True  # type: ignore[attr-defined]
        return watched

    def __call__(self, *inputs: Any) -> Any:
        calls = getattr(_thread, "calls", None)
        program = self._program
        if calls is not None:
            if program is None or not self._is_all:
                raise CannotWait
            call = Pending(program, inputs)
            calls.append(call)
            return call.results
        if program is None:
            return self.call(*inputs)
        if self._is_all:
            return program([*inputs])
        returned = self.call(*inputs)
        seen = vars(self._seen).pop("call", None)
        if seen is not None and isinstance(returned, (list, tuple)):
            given, results = seen
            self._is_all = _are_same(inputs, given) and _are_same(returned, results)
        return returned


def _are_same(ones: Sequence[Any], others: Sequence[Any]) -> bool:
    """Return whether tensors are the very same, and numbers are equal."""
    return len(ones) == len(others) and all(
        one is other or (type(one) is int and type(other) is int and one == other)
        for one, other in zip(ones, others, strict=True)
    )


def _never(*inputs: Any) -> Any:
    raise AssertionError("a graph is called before it is compiled")
