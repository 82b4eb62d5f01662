"""The C++ compiler: finding it, and running it with a time limit and readable errors."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from mxfp4_fx.core.errors import NativeBuildError

VARIABLE = "CXX"

_NAMES = ("g++", "c++", "clang++")
_TIMEOUT = 300.0  # seconds for one run; a run takes about ten


def command() -> tuple[str, ...]:
    """Return the C++ compiler's command, with the absolute path of its program.

    Raises:
        NativeBuildError: no compiler is installed, or ``$CXX`` names none.
    """
    named = os.environ.get(VARIABLE, "").strip()
    # $CXX may be a path with spaces, or a program and its arguments.
    for command in ([named], named.split()) if named else ([name] for name in _NAMES):
        if program := shutil.which(command[0]):
            return (os.path.abspath(program), *command[1:])
    raise NativeBuildError(
        f"there is no C++ compiler for the CPU kernels: {VARIABLE}={named!r} names no program"
        if named
        else f"there is no C++ compiler for the CPU kernels: none of {', '.join(_NAMES)} is "
        f"installed; install g++ or set {VARIABLE}"
    )


def run(
    command: Sequence[str], folder: str | None = None, tick: Callable[[], None] = lambda: None
) -> str:
    """Run the compiler and return its output.

    Args:
        command: the program and its arguments.
        folder: the working directory.
        tick: a function to call about every second.

    Raises:
        NativeBuildError: the compiler cannot be run, takes too long or fails. The message has its
            first errors.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},  # English, for _first_errors
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # killpg can then stop the compiler's children, too
        )
    except OSError as error:
        raise NativeBuildError(
            f"{command[0]} cannot be run: {error.strerror}; install g++ or set {VARIABLE}"
        ) from error
    with process:
        try:
            output = _communicate(process, tick)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise NativeBuildError(
            f"{command[0]} cannot compile the CPU kernels:\n{_first_errors(output)}\n"
            f"install g++ 11 or newer, or set {VARIABLE} to another compiler"
        )
    return output


def _communicate(process: subprocess.Popen[bytes], tick: Callable[[], None]) -> str:
    until = time.monotonic() + _TIMEOUT
    while True:
        try:
            left = until - time.monotonic()
            return process.communicate(timeout=min(1.0, max(left, 0.0)))[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            tick()
            if left <= 0:
                raise NativeBuildError(
                    f"the C++ compiler was stopped after {_TIMEOUT:.0f} s, too long for the CPU "
                    f"kernels; set {VARIABLE} to another compiler"
                ) from None


def _first_errors(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line] or lines[-5:]
    return "\n".join(f"    {line.strip()[:200]}" for line in errors[:5]) or "    (no output)"
