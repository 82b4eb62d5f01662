"""The files of compiled libraries: where they are kept, and whether one is whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mxfp4_fx.core.console import say

CACHE_DIR_VARIABLE = "MXFP4_FX_CACHE_DIR"
VARIABLES = (CACHE_DIR_VARIABLE, "XDG_CACHE_HOME", "HOME")  # what says where

_SEAL_BYTES = hashlib.sha256().digest_size


def directories() -> list[Path]:
    """Return the directories for libraries; a build goes to the first that can be written."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # the XDG specification says to ignore relative paths
        caches = "~/.cache"
    chosen = os.environ.get(CACHE_DIR_VARIABLE) or os.path.join(caches, "mxfp4_fx")
    chosen = os.path.expanduser(chosen)
    if chosen.startswith("~"):  # a user without a home
        return [_fallback()]
    return [Path(os.path.abspath(chosen)), _fallback()]


def _fallback() -> Path:
    return Path(tempfile.gettempdir(), f"mxfp4_fx-{os.getuid()}")


def is_trusted(directory: Path) -> bool:
    """Return whether code may be loaded from a directory.

    Any user may have made the one for temporary files.
    """
    if directory != _fallback():
        return True
    try:
        found = directory.lstat()
    except OSError:
        return False
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return mine and not found.st_mode & 0o077


@contextlib.contextmanager
def locked(file: Path, tick: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file, as one process at a time can. A killed process releases it.

    Args:
        file: the lock.
        tick: a function to call every second while another process has the lock.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another process compiles the CPU kernels; waiting for it ...")
        while not lock.is_locked:
            tick()
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=1)
    try:
        yield
    finally:
        lock.release()


def seal(file: Path) -> None:
    """Append a library's hash to its file; the loader ignores bytes after the end."""
    digest = hashlib.sha256(file.read_bytes()).digest()
    with open(file, "ab") as end:
        end.write(digest)


def is_whole(file: Path) -> bool:
    """Return whether a library matches its seal: one that is cut short would crash the loader."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_SEAL_BYTES]).digest() == content[-_SEAL_BYTES:]
