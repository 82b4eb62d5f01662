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
import time
from collections.abc import Iterable
from pathlib import Path

_FIELDS = {"RssAnon": "anonymous", "RssFile": "mapped", "VmRSS": "resident", "VmHWM": "peak"}
_TREE_EVERY = 10  # samples: finding child processes costs more than a sample


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes: anonymous, mapped, resident, and the peak of resident since :func:`reset_peak`."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in _FIELDS:
            found[_FIELDS[name]] = int(value.split()[0]) << 10
    return found


def reset_peak() -> None:
    """Let this process's peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def mapped_bytes(suffix: str) -> int:
    """Resident bytes of this process's mapped files whose names end so."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # the first line of a mapping; the path is its last word
            counts = line.endswith(suffix)
        elif counts and first == "Rss:":
            total += int(rest[0]) << 10
    return total


def family(pid: int) -> list[int]:
    """The process and all that it started and that run."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


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
        self.pid, self.limit, self.interval = pid, limit, interval
        self.exceeded: int | None = None
        self._peaks: dict[str, int] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        for turn in range(1 << 62):
            try:
                sample = memory(self.pid)
                if "resident" not in sample:  # it ended, and nobody has waited for it
                    return
                del sample["peak"]
                if turn % _TREE_EVERY == 0:
                    sample["with_children"] = _resident(family(self.pid))
            except OSError:
                return
            with self._lock:
                for name, value in sample.items():
                    self._peaks[name] = max(self._peaks.get(name, 0), value)
            most = max(sample["resident"], sample.get("with_children", 0))
            if most > self.limit:
                self.end(most)
                return
            time.sleep(self.interval)

    def end(self, most: int) -> None:
        """End the process, which has so many bytes."""
        self.exceeded = most
        os.killpg(self.pid, signal.SIGKILL)

    def take(self) -> dict[str, int]:
        """Peaks since the last time: anonymous, mapped, resident, with_children."""
        with self._lock:
            peaks, self._peaks = self._peaks, {}
        return peaks


def _resident(pids: Iterable[int]) -> int:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += memory(pid).get("resident", 0)
    return total
