"""Calling a function once another module has been imported, now or later."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence


def when_imported(name: str, act: Callable[[types.ModuleType], None]) -> None:
    """Call ``act`` with the module ``name``: now if it is imported, else when it will have been.

    It imports nothing itself. An error in ``act`` is an error of that import.
    """
    module = sys.modules.get(name)
    if module is not None:
        act(module)
    else:
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, by asking the other finders, and acts when it has been executed."""

    def __init__(self, name: str, act: Callable[[types.ModuleType], None]) -> None:
        self._name, self._act = name, act

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)  # so that the next line asks the others alone
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._act)
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that acts once the module has been executed."""

    def __init__(
        self, loader: importlib.abc.Loader, act: Callable[[types.ModuleType], None]
    ) -> None:
        self._loader, self._act = loader, act

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        # From now on the module has the loader that it would have had without this.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._act(module)
