"""Progress messages of long work, on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def announced(text: str) -> Iterator[Callable[[], None]]:
    """Print that long work begins, and how it ended.

    Yields a function that prints the time so far. It prints to a terminal only.
    """
    begin, ended = time.monotonic(), "failed after"

    def tick() -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            say(f"... {time.monotonic() - begin:.0f} s", end="\r")

    say(f"{text} ...")
    try:
        yield tick
        ended = "done in"
    finally:
        say(f"... {ended} {time.monotonic() - begin:.0f} s")


def say(text: str, end: str = "\n") -> None:
    # A closed stderr is no reason to fail.
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(f"mxfp4_fx: {text}", end=end, file=sys.stderr, flush=True)
