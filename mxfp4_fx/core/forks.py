"""Forked processes: the threads of the parent are missing, and locks that they held stay locked."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

# Owner of a lock -> the attribute that holds the lock, and the factory of the lock.
_owners: weakref.WeakKeyDictionary[Any, tuple[str, Callable[[], Any]]] = weakref.WeakKeyDictionary()
_functions: list[Callable[[], None]] = []
_forked = False


def renew_lock(owner: Any, name: str, make: Callable[[], Any]) -> None:
    """Set attribute ``name`` of ``owner`` to a lock, and to a new lock in each forked child.

    A thread of the parent may hold the lock during the fork. The child lacks that thread, so
    nothing would ever release the child's copy of the lock.

    Args:
        owner: an object or a module; the reference to it is weak. It can have one such lock.
        name: the attribute.
        make: ``threading.Lock`` or ``threading.RLock``.
    """
    setattr(owner, name, make())
    _owners[owner] = name, make


def in_child(function: Callable[[], None]) -> None:
    """Call a function in each forked child, after its locks are new."""
    _functions.append(function)


def is_forked() -> bool:
    """Return whether this process was forked after the parent imported this module."""
    return _forked


def _after_fork() -> None:
    global _forked
    _forked = True
    for owner, (name, make) in list(_owners.items()):
        setattr(owner, name, make())
    for function in _functions:
        function()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
