"""Values that take long to load: each is loaded once, and not tried again after a failure."""

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
    """Values that are loaded on first use, each once, by one thread at a time.

    A value stays until the process ends, and forked children have it too. After a failure, every
    call raises the same message without another try, until one of the environment variables in
    ``while_same`` changes. Without that, each layer of a model would wait for the same failure.

    Attributes:
        loaded: key -> value, for the keys loaded so far.
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
            failure: the error of ``load`` after which another try is useless.
            while_same: the environment variables whose change makes another try useful.
        """
        self.loaded: dict[Key, Value] = {}
        self._load, self._failure, self._while_same = load, failure, tuple(while_same)
        # Key -> the environment in which it failed, and the message.
        self._failed: dict[Key, tuple[tuple[str | None, ...], str]] = {}
        self._lock: threading.Lock
        forks.renew_lock(self, "_lock", threading.Lock)

    def __call__(self, key: Key) -> Value:
        """Return the value for a key; load it if it is not loaded.

        Raises:
            Mxfp4Error: of class ``failure``, when loading fails or has failed before.
        """
        if key in self.loaded:
            return self.loaded[key]
        with self._lock:
            if key in self.loaded:  # another thread loaded it while this one waited
                return self.loaded[key]
            if self.has_failed(key):
                raise self._failure(self._failed[key][1])
            environment = self._environment()
            try:
                self.loaded[key] = self._load(key)
            except self._failure as error:
                self._failed[key] = environment, str(error)
                raise
            return self.loaded[key]

    def has_failed(self, key: Key) -> bool:
        """Return whether a call would raise at once, because loading has failed."""
        return key in self._failed and self._failed[key][0] == self._environment()

    def _environment(self) -> tuple[str | None, ...]:
        return tuple(map(os.environ.get, self._while_same))

    def anew(self) -> LoadedOnce[Key, Value]:
        """Return a new object with the same arguments: nothing is loaded, nothing has failed."""
        return LoadedOnce(self._load, self._failure, self._while_same)
