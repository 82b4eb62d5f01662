"""Memory of a process as Linux counts it, and a watch over the peaks of another process.

Resident memory has two parts. Anonymous pages are the process's own: what it allocated. Mapped
pages belong to files, the system can drop them at any time and read them again: a checkpoint that
is mapped, and the programs' code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import psutil

_TREE_EVERY = 10  # samples: finding child processes costs more than a sample


def memory(process: psutil.Process) -> dict[str, int]:
    """Bytes: anonymous, mapped, and resident, which is both."""
    found = process.memory_info()
    resident, mapped = int(found.rss), int(found.shared)
    return {"anonymous": resident - mapped, "mapped": mapped, "resident": resident}


def reset_peak() -> None:
    """Let this process's peak begin anew. psutil tells no peak and resets none, but /proc does."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most resident bytes of this process since :func:`reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(value) << 10


def mapped_bytes(suffix: str) -> int:
    """Resident bytes of this process's mapped files whose names end so."""
    return sum(each.rss for each in psutil.Process().memory_maps() if each.path.endswith(suffix))


class Watch(threading.Thread):
    """Samples another process's memory, and ends it if it has more than it may.

    The sum over the process and its children counts pages that they share several times.

    Args:
        pid: a process that leads a process group, which is killed.
        limit: bytes of resident memory, mapped pages included, of the process and its children.
        interval: seconds between samples.
    """

    def __init__(self, pid: int, limit: int, interval: float = 0.01) -> None:
        super().__init__(daemon=True)
        self.process, self.limit, self.interval = psutil.Process(pid), limit, interval
        self.exceeded: int | None = None
        self._turn = 0
        self._stopped = threading.Event()
        self._peaks: dict[str, int] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        while self.exceeded is None and not self._stopped.wait(self.interval):
            try:
                self.sample()
            except psutil.Error:  # it ended
                return

    def sample(self) -> None:
        """Look once; end the process if it has too much."""
        found = memory(self.process)
        if self._turn % _TREE_EVERY == 0:
            found["with_children"] = found["resident"] + _resident_children(self.process)
        self._turn += 1
        with self._lock:
            for name, value in found.items():
                self._peaks[name] = max(self._peaks.get(name, 0), value)
        most = max(found["resident"], found.get("with_children", 0))
        if most > self.limit:
            self.end(most)

    def end(self, most: int) -> None:
        """End the process, which has so many bytes."""
        self.exceeded = most
        os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        self.join()

    def take(self) -> dict[str, int]:
        """Peaks since the last time: anonymous, mapped, resident, with_children."""
        with self._lock:
            peaks, self._peaks = self._peaks, {}
        return peaks


def _resident_children(process: psutil.Process) -> int:
    total = 0
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += memory(child)["resident"]
    return total
