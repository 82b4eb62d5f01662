"""Work in a thread beside the caller, which waits for it."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# Takes a function that returns whether to stop, and asks it before each piece of the work.
Work = Callable[[Callable[[], bool]], None]

Told = list[tuple[str, type[Warning]]]
_told: contextvars.ContextVar[Told | None] = contextvars.ContextVar("told", default=None)


def warn(message: str, category: type[Warning], stacklevel: int) -> None:
    """Warn as ``warnings.warn`` does; in :func:`meanwhile` the caller warns when it has waited.

    Filters of warnings belong to the process, and the caller may have set them to ignore all.
    """
    told = _told.get()
    if told is None:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
    else:
        told.append((message, category))


@contextlib.contextmanager
def meanwhile(work: Work) -> Iterator[None]:
    """Do ``work`` in a thread while the block runs; leave the block when both have ended.

    If the block raises, or is interrupted while it waits, the work is told to stop. What the block
    raises then goes to the caller, and nothing is left running.

    Torch's modes belong to a thread: the work runs without the caller's fake tensors, dispatch
    modes and ``no_grad``.

    Raises:
        BaseException: whatever ``work`` raised, or a warning that is an error, if the block raised
            nothing.
    """
    stopped = threading.Event()
    raised: list[BaseException] = []
    told: Told = []
    context = contextvars.copy_context()
    context.run(_told.set, told)

    def run() -> None:
        try:
            context.run(work, stopped.is_set)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="mxfp4_fx")
    thread.start()
    try:
        yield
        thread.join()
    finally:
        stopped.set()
        thread.join()
    if raised:
        raise raised.pop()
    for message, category in told:
        warn(message, category, stacklevel=3)


def begin(function: Callable[[], T]) -> Callable[[], T]:
    """Call a function in a thread; return a function that waits for its result, or its error.

    Whoever no longer wants the result need not wait, but the end of the process does.
    """
    threads = ThreadPoolExecutor(1, "mxfp4_fx")
    result = threads.submit(function).result
    threads.shutdown(wait=False)
    return result
