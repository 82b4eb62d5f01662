"""What a forked process lacks: the threads of its parent, whatever locks these held."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

# Owner of a lock -> the attribute that it is, and what makes one.
_owners: weakref.WeakKeyDictionary[Any, tuple[str, Callable[[], Any]]] = weakref.WeakKeyDictionary()
_forked = False


def renew_lock(owner: Any, name: str, make: Callable[[], Any]) -> None:
    """Give a lock to ``owner`` as its attribute ``name``, and a new one in each forked child.

    A thread that holds the parent's is not there to release it. Without this the child waits for
    ever. The owner, an object or a module, is kept weakly and has one such lock.

    Args:
        make: ``threading.Lock`` or ``threading.RLock``.
    """
    setattr(owner, name, make())
    _owners[owner] = name, make


def is_forked() -> bool:
    """Whether this process is a child that was forked after this module was imported."""
    return _forked


def _after_fork() -> None:
    global _forked
    _forked = True
    for owner, (name, make) in list(_owners.items()):
        setattr(owner, name, make())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
