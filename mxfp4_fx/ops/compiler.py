"""The C++ compiler: finding it, and running it, several at a time, with readable errors."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Sequence

from mxfp4_fx.core.errors import NativeBuildError

VARIABLE = "CXX"

_NAMES = ("g++", "c++", "clang++")
_TIMEOUT = 300.0  # seconds for one run; a run takes up to ten


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
    """Run the compiler once, as :func:`run_each` does, and return its output."""
    with contextlib.closing(run_each([command], folder, tick)) as runs:
        return next(runs)[1]


def run_each(
    commands: Sequence[Sequence[str]],
    folder: str | None = None,
    tick: Callable[[], None] = lambda: None,
    at_once: int = 1,
) -> Generator[tuple[int, str], None, None]:
    """Run compilers side by side; yield the number and the output of each command as it ends.

    Whoever leaves the generator early closes it. What still runs is then killed, with its children,
    as it is after an error or an interrupt.

    Args:
        commands: the program and its arguments, of each; they begin in this order.
        folder: the working directory.
        tick: a function to call about every second.
        at_once: how many run at a time.

    Raises:
        NativeBuildError: a compiler cannot be run, takes too long or fails. The message has its
            first errors.
    """
    waiting, ticked = list(enumerate(commands)), time.monotonic()
    running: dict[int, _Run] = {}
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    number, command = waiting.pop(0)
                    run = running[number] = _Run(command, folder)
                    selector.register(run.stdout, selectors.EVENT_READ, number)
                left = min(run.until for run in running.values()) - time.monotonic()
                for key, _ in selector.select(min(1.0, max(left, 0.0))):
                    number = key.data
                    if running[number].read():
                        continue  # more may come
                    selector.unregister(key.fileobj)
                    output = running[number].ended()
                    del running[number]
                    yield number, output
                now = time.monotonic()
                if any(run.until <= now for run in running.values()):
                    raise _too_long()
                if ticked + 1 <= now:
                    ticked = now
                    tick()
        finally:
            for run in running.values():
                run.kill()


class _Run:
    """A compiler that runs, until :meth:`ended` or :meth:`kill`."""

    def __init__(self, command: Sequence[str], folder: str | None) -> None:
        """
        Raises:
            NativeBuildError: it cannot be run.
        """
        try:
            self._process = subprocess.Popen(
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
        assert self._process.stdout is not None
        self.stdout = self._process.stdout
        self.until = time.monotonic() + _TIMEOUT
        self._program, self._output = command[0], bytearray()

    def read(self) -> bool:
        """Read some output, which must be there; return whether there may be more."""
        some = os.read(self.stdout.fileno(), 1 << 16)
        self._output += some
        return bool(some)

    def ended(self) -> str:
        """Return the output of a compiler that has closed it.

        Raises:
            NativeBuildError: it failed, or does not end.
        """
        try:
            code = self._process.wait(max(self.until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            raise _too_long() from None
        self.stdout.close()
        output = self._output.decode(errors="replace")
        if code:
            raise NativeBuildError(
                f"{self._program} cannot compile the CPU kernels:\n{_first_errors(output)}\n"
                f"install g++ 11 or newer, or set {VARIABLE} to another compiler"
            )
        return output

    def kill(self) -> None:
        if self._process.returncode is None:  # else another process may have its number
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.stdout.close()


def _too_long() -> NativeBuildError:
    return NativeBuildError(
        f"the C++ compiler was stopped after {_TIMEOUT:.0f} s, too long for the CPU kernels; set "
        f"{VARIABLE} to another compiler"
    )


def _first_errors(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line] or lines[-5:]
    return "\n".join(f"    {line.strip()[:200]}" for line in errors[:5]) or "    (no output)"
