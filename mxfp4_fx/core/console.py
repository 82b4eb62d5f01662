"""Text for people: progress messages of long work, on stderr, and sizes in words."""

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
    except BaseException as error:
        if not isinstance(error, Exception):  # an interrupt
            ended = "stopped after"
        raise
    finally:
        say(f"... {ended} {time.monotonic() - begin:.0f} s")


def say(text: str, end: str = "\n") -> None:
    # A closed stderr is no reason to fail.
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(f"mxfp4_fx: {text}", end=end, file=sys.stderr, flush=True)


def size_in_words(n: int) -> str:
    """Format a number of bytes in binary units."""
    value, units = float(n), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
