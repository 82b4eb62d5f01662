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
_blocks = 0
_usual = 0


@contextlib.contextmanager
def young_only() -> Iterator[None]:
    """Let the collector look at young objects only until the last such block of all threads ends.

    Older garbage waits for the next collection after it. Whoever sets other thresholds meanwhile
    keeps them. From Python 3.14 on, the collector has no such generation, and this does nothing.
    """
    global _blocks, _usual
    with _lock:
        _blocks += 1
        if _blocks == 1:
            youngest, middle, _usual = gc.get_threshold()
            gc.set_threshold(youngest, middle, _NEVER)
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            youngest, middle, oldest = gc.get_threshold()
            if _blocks == 0 and oldest == _NEVER:
                gc.set_threshold(youngest, middle, _usual)


forks.renew_lock(sys.modules[__name__], "_lock", threading.Lock)
