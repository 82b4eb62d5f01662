"""What takes long to load: it is loaded once, and what failed is not tried again and again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from mxfp4_fx.core import forks
from mxfp4_fx.core.errors import Mxfp4Error

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LoadedOnce(Generic[Key, Value]):
    """Values that are loaded when they are first asked for, each once, by one thread at a time.

    They stay for the process's life, and are there in forked children, too. What failed fails
    again with the same message, without another try, until one of the environment variables
    changes that decide: a model has many layers, and each of them would wait again.

    Attributes:
        loaded: key -> value, of what was loaded already.
    """

    def __init__(
        self,
        load: Callable[[Key], Value],
        failure: type[Mxfp4Error],
        while_same: Sequence[str],
    ) -> None:
        """
        Args:
            load: makes the value for a key.
            failure: what ``load`` raises where it is of no use to try again.
            while_same: the environment variables that decide whether it is.
        """
        self.loaded: dict[Key, Value] = {}
        self._load, self._failure, self._while_same = load, failure, tuple(while_same)
        # Key -> the environment in which it failed, and the message.
        self._failed: dict[Key, tuple[tuple[str | None, ...], str]] = {}
        self._lock: threading.Lock
        forks.renew_lock(self, "_lock", threading.Lock)

    def __call__(self, key: Key) -> Value:
        """The value for a key, loaded now if it is not.

        Raises:
            Mxfp4Error: the ``failure`` of ``__init__``.
        """
        if key in self.loaded:
            return self.loaded[key]
        with self._lock:
            if key in self.loaded:  # another thread has loaded it meanwhile
                return self.loaded[key]
            environment = tuple(map(os.environ.get, self._while_same))
            failed_in, message = self._failed.get(key, (None, ""))
            if failed_in == environment:
                raise self._failure(message)
            try:
                self.loaded[key] = self._load(key)
            except self._failure as error:
                self._failed[key] = environment, str(error)
                raise
            return self.loaded[key]

    def anew(self) -> LoadedOnce[Key, Value]:
        """One of the same kind, as a new process has it: nothing was loaded, nothing has failed."""
        return LoadedOnce(self._load, self._failure, self._while_same)
