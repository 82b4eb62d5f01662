"""Run a process that is measured: memory is watched from outside, and its phases are told by it.

The process writes a line of JSON to a pipe at the end of each phase, with at least ``phase``,
``seconds`` and the ``peak`` of ``memory``. What it has told is kept if it fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.command import Log
from benchmarks.process_memory import Watch

# From the pipe's file descriptor to a command line.
Program = Callable[[int], list[str]]
ROOT = Path(__file__).resolve().parent.parent


class ProcessFailed(SystemExit):
    """A measured process did not end well, or computed something else; the message says how.

    Attributes:
        phases: what it had told before.
    """

    def __init__(self, message: str, phases: list[dict[str, Any]] | None = None) -> None:
        super().__init__(message)
        self.phases = phases or []


class TookTooLong(ProcessFailed):
    """A measured process did not end within its time."""


def run(
    name: str,
    settings: dict[str, Any],
    limit: int,
    log: Log,
    program: str | Program = "benchmarks.full_size_child",
    caches: Path | None = None,
    *,
    warm_pages: bool = False,
    seconds: float = threading.TIMEOUT_MAX,
) -> list[dict[str, Any]]:
    """The phases of a process of its own.

    Args:
        settings: its own; of them ``threads``, ``checkpoint``, ``environment`` and
            ``sample_seconds`` are used here, too.
        limit: bytes of resident memory.
        program: the module that it runs, which gets the settings, or what makes a command line.
        caches: a directory for all that it keeps for the next process; None: it keeps nothing of
            what Inductor made.
        warm_pages: it finds the checkpoint in the page cache, as far as it is there.
        seconds: it is ended after so many.

    Raises:
        TookTooLong: it was.
        ProcessFailed: it failed, or had more memory than the limit.
    """
    log(f"{name}: starts")
    if not warm_pages:
        forget_pages(Path(settings["checkpoint"]))
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
        if caches is None:  # compiled anew, as for the first time
            environment["TORCHINDUCTOR_CACHE_DIR"] = directory
        else:  # Inductor keeps precompiled headers in the directory for temporary files
            environment |= {"TMPDIR": str(caches), "MXFP4_FX_CACHE_DIR": str(caches / "kernels")}
            environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
            environment.pop("PYTHONDONTWRITEBYTECODE", None)  # this package is compiled once, too
        if isinstance(program, str):
            told = json.dumps({**settings, "pipe": writer})
            arguments = [sys.executable, "-m", program, told]
        else:
            arguments = program(writer)
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**environment, **settings.get("environment", {})},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        watch = Watch(process.pid, limit, settings.get("sample_seconds", 0.01))
        watch.start()
        is_late = threading.Event()
        timer = threading.Timer(seconds, _end, (process.pid, is_late))
        timer.start()
        phases: list[dict[str, Any]] = []
        try:
            with os.fdopen(reader, encoding="utf-8") as lines:
                for line in lines:
                    phase = json.loads(line)
                    phase["sampled_peaks"] = watch.take()
                    phases.append(phase)
                    peak = phase["memory"]["peak"]
                    size = f"{peak / 2**30:.2f} GiB"
                    log(f"{name}: {phase['phase']}: {phase['seconds']:.1f} s, peak {size}")
                    if peak > limit and watch.exceeded is None:  # between two samples
                        watch.end(peak)
            failed = process.wait() != 0
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            watch.stop()
        errors.seek(0)
        if watch.exceeded is not None:
            raise ProcessFailed(
                f"{name}: {watch.exceeded / 2**30:.2f} GiB of resident memory after the phases "
                f"{[phase['phase'] for phase in phases]}; --limit-gib allows {limit / 2**30:.2f}",
                phases,
            )
        if is_late.is_set():
            raise TookTooLong(f"{name}: ended after {seconds:.0f} s", phases)
        if failed:
            raise ProcessFailed(f"{name}: the process failed:\n{errors.read()[-4000:]}", phases)
    return phases


def _end(pid: int, is_late: threading.Event) -> None:
    """End a process that leads a process group, and all in it."""
    is_late.set()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def choose_cores(count: int) -> list[int]:
    """So many cores that may be used; those that share a core's units with another come last."""
    seen: set[str] = set()
    first: list[int] = []
    later: list[int] = []
    for core in sorted(psutil.Process().cpu_affinity()):
        topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        siblings = topology.read_text() if topology.exists() else str(core)
        (later if siblings in seen else first).append(core)
        seen.add(siblings)
    return (first + later)[:count]


def forget_pages(checkpoint: Path) -> None:
    """Let go of what the page cache has of the file, or of the files in the folder: a run starts
    with reading the disk.
    """
    paths = checkpoint.glob("*.safetensors") if checkpoint.is_dir() else (checkpoint,)
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
