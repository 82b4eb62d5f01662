"""Other processes in tests.

Tests wait for events, not for times: LAST_RESORT only ends a test that hangs.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

LAST_RESORT = 600.0  # seconds


def wait_until(happened: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + LAST_RESORT
    while not happened():
        assert time.monotonic() < until, f"waits for {what}"
        time.sleep(0.01)


def until_there(file: Path) -> str:
    """Return a shell command that waits until a file exists."""
    return f"while [ ! -e {shlex.quote(str(file))} ]; do sleep 0.1; done"


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_written(file: Path) -> bool:
    """Return whether a file exists and ends with a whole line."""
    return file.exists() and file.read_text().endswith("\n")


def exit_status(child: int) -> int:
    """Wait for a forked process and return its exit status; kill it if it does not end."""
    status: list[int] = []

    def ended() -> bool:
        pid, found = os.waitpid(child, os.WNOHANG)
        if pid:
            status.append(os.waitstatus_to_exitcode(found))
        return bool(pid)

    try:
        wait_until(ended, "the child")
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return status[0]


def stopping(event: str, ending: str, times: int) -> str:
    """Return Python code that stops its process before an event happens for the n-th time.

    Args:
        event: an audit event of Python whose first argument is a path, such as "open".
        ending: how the path must end for the event to count.
        times: n.
    """
    # The process may inherit that SIGINT is ignored: a shell starts background jobs like that.
    return f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.alarm({LAST_RESORT:.0f})
seen = []

def stop(event, args):
    if event == {event!r} and str(args[0]).endswith({ending!r}):
        seen.append(event)
        if len(seen) == {times}:
            os.kill(os.getpid(), signal.SIGSTOP)

sys.addaudithook(stop)
"""


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    """Wait until a process that runs :func:`stopping` has stopped."""
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), process.communicate()


def end(process: subprocess.Popen[str], sent: signal.Signals) -> str:
    """End a stopped process with the signal ``sent``; return its stderr."""
    process.send_signal(sent)
    process.send_signal(signal.SIGCONT)
    return process.communicate(timeout=LAST_RESORT)[1]
