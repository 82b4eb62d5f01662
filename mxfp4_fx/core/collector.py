"""Python's garbage collector, while much is made that stays.

Once torch and transformers are imported, a process has hundreds of thousands of objects. Imports,
loaded models and captured graphs add so many that the collector walks through all of them again and
again: a second of a start, in which it finds next to nothing.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator

from mxfp4_fx.core import forks

_NEVER = 2**30  # collections of the middle generation before one of the oldest
_lock = threading.Lock()


class _State:
    """How many blocks there are in this process, and the threshold that holds outside of them."""

    blocks = 0
    usual = 0


_state = _State()


@contextlib.contextmanager
def young_only() -> Iterator[None]:
    """Let the collector look at young objects only until the last such block of all threads ends.

    Older garbage waits for the next collection after it. Whoever sets other thresholds meanwhile
    keeps them. In a forked child there are no blocks, not even that of the thread that forked. From
    Python 3.14 on, the collector has no such generation, and this does nothing.
    """
    with _lock:
        state = _state
        state.blocks += 1
        if state.blocks == 1:
            youngest, middle, state.usual = gc.get_threshold()
            gc.set_threshold(youngest, middle, _NEVER)
    try:
        yield
    finally:
        with _lock:
            state.blocks -= 1
            if state.blocks == 0 and state is _state:
                _lower(state)


def _lower(state: _State) -> None:
    youngest, middle, oldest = gc.get_threshold()
    if oldest == _NEVER:
        gc.set_threshold(youngest, middle, state.usual)


def _begin_anew() -> None:
    """End all blocks in a forked child: the threads that would end them are missing."""
    global _state
    state, _state = _state, _State()
    if state.blocks:
        _lower(state)


forks.renew_lock(sys.modules[__name__], "_lock", threading.Lock)
forks.in_child(_begin_anew)
