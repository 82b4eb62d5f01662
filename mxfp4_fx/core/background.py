"""Work in a thread beside the caller, who waits for it or for its result."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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


def begin(work: Callable[[Callable[[], bool]], T], owner: object) -> Callable[[], T]:
    """Do ``work`` in a thread; return a function that waits for its result, or raises its error.

    It is told to stop once nobody can want the result: when its owner is gone, or the main thread.
    """
    is_wanted, main = weakref.ref(owner), threading.main_thread()
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(lambda: is_wanted() is None or not main.is_alive()))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="mxfp4_fx", daemon=False).start()
    return future.result
