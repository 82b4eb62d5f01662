"""Where the time of a start goes: each moment belongs to one phase, by torch's own timings.

torch times the parts of a compilation (``dynamo_timed``), and this package its passes and its
swizzling in the same way. These timings are nested, and are wall time. Here the clock is read at
each begin and end, so that what lies inside is counted once, and by CPU seconds as well.
"""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

# A timing that is not listed belongs to the phase that it lies in.
PHASES = {
    "mxfp4_fx.passes": "passes",
    "mxfp4_fx.swizzle": "swizzling",
    "mxfp4_fx.compile_kernels": "C++ compiler",
    "mxfp4_fx.load_kernels": "C++ compiler",  # of a thread that was begun before
    "entire_frame_compile": "Dynamo",
    "build_guards": "guards",
    "backend_compile": "AOTAutograd",
    "create_aot_dispatcher_function": "AOTAutograd",
    "_recursive_pre_grad_passes": "Inductor",
    "_recursive_joint_graph_passes": "Inductor",
    "inductor_compile": "Inductor",
    "fx_codegen_and_compile": "Inductor",
    "AOTAutogradCache.inductor_load": "Inductor",
    "inductor_import": "Inductor",
    "compile_file": "C++ compiler",
    "async_compile.wait": "C++ compiler",  # of torch's worker processes, if it has some
}
OTHER = "other"  # imports of torch's parts, evaluating guards, running what was compiled


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Spending:
    """What of the time was spent in which phase; it begins in :data:`OTHER`.

    Args:
        clock: :func:`cpu_seconds`, or wall time.
    """

    def __init__(self, clock: Callable[[], float] = cpu_seconds) -> None:
        self._clock = clock
        self._thread = threading.get_ident()
        self._open: list[tuple[str, str]] = []  # timings and their phases, the innermost last
        self._since = clock()
        self._seconds: dict[str, float] = defaultdict(float)
        self._timings: Counter[str] = Counter()

    def begin(self, timing: str) -> None:
        """A timing begins, inside those that have not ended.

        What another thread does is counted; its time belongs to the phase that this thread is in.
        """
        self._timings[timing] += 1
        if threading.get_ident() == self._thread:
            self._note()
            self._open.append((timing, PHASES.get(timing, self._phase)))

    def end(self, timing: str) -> None:
        """The innermost timing of that name ends, and those that an error left open inside it."""
        if threading.get_ident() == self._thread and timing in dict(self._open):
            self._note()
            while self._open.pop()[0] != timing:
                pass

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """(seconds of each phase, how often each timing began) since the last time."""
        self._note()
        taken = dict(self._seconds), dict(self._timings)
        self._seconds.clear()
        self._timings.clear()
        return taken

    @property
    def _phase(self) -> str:
        return self._open[-1][1] if self._open else OTHER

    def _note(self) -> None:
        now = self._clock()
        self._seconds[self._phase] += now - self._since
        self._since = now


@contextlib.contextmanager
def followed(spending: Spending) -> Iterator[None]:
    """Within the context, torch's timings tell ``spending`` when they begin and end."""
    from torch._dynamo.utils import ChromiumEventLogger

    begin, end = ChromiumEventLogger.log_event_start, ChromiumEventLogger.log_event_end

    def begins(self: Any, event_name: str, *args: Any, **kwargs: Any) -> None:
        begin(self, event_name, *args, **kwargs)
        spending.begin(event_name)

    def ends(self: Any, event_name: str, *args: Any, **kwargs: Any) -> None:
        spending.end(event_name)
        end(self, event_name, *args, **kwargs)

    ChromiumEventLogger.log_event_start = begins  # type: ignore[method-assign]
    ChromiumEventLogger.log_event_end = ends  # type: ignore[method-assign]
    try:
        yield
    finally:
        ChromiumEventLogger.log_event_start = begin  # type: ignore[method-assign]
        ChromiumEventLogger.log_event_end = end  # type: ignore[method-assign]
