"""Dynamo's limits on compilations, counted by module.

Dynamo compiles a function at most ``torch._dynamo.config.recompile_limit`` times, 8 by default, and
then leaves it and all that it calls uncompiled. It counts by code object, which all layers of a
model share: a graph break in each layer, or accelerate's hooks around every module, reach the limit
in a model of nine layers. For this package's backend the limit therefore holds for each module that
runs the code. Other backends keep torch's count.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from mxfp4_fx.core import compilation
from mxfp4_fx.experts import looked_at

# Functions that many modules share, by their code -> how many. Equal code is one entry.
_shared: weakref.WeakKeyDictionary[types.CodeType, int] = weakref.WeakKeyDictionary()


def share(code: types.CodeType, count: int) -> None:
    """Let Dynamo's limits hold for each of so many modules that call one function."""
    _shared[code] = count


def sharers(code: types.CodeType) -> int:
    """Return how many modules may each need a compilation of ``code``, which Dynamo is to compile.

    - The forward of modules, or a wrapper of it: the modules that have it.
    - Any other code, such as the rest of a forward behind a graph break: the modules with the
      innermost forward on the stack, or the modules that one of these calls, if they are more. A
      loop over layers breaks once for each.
    - The compiled function itself, if it is no forward: 1.
    - A function that was given to :func:`share`: as many as was said.
    """
    if code in _shared:
        return _shared[code]
    modules = list(dict.fromkeys(m for top in looked_at() for m in top.modules()))
    forwards = [(module, list(_codes(getattr(module, "forward", None)))) for module in modules]
    if exact := sum(code in codes for _, codes in forwards):
        return exact
    called = compilation.compiled_function()
    if called is not None and getattr(called[0], "__code__", None) is code:
        return 1
    for on_stack in (code, *compilation.callers()):
        sharing = [m for m, codes in forwards if any(_has_part(c, on_stack) for c in codes)]
        if sharing:
            return max(len(sharing), *map(_calls, sharing))
    return max(map(_calls, modules), default=1)


def _codes(function: Any) -> Iterator[types.CodeType]:
    """Yield the code of a function, and of those in it: of a method, a partial or a wrapper."""
    while function is not None:
        if isinstance(function, functools.partial):
            yield from _codes(function.func)
        code = getattr(function, "__code__", None)
        if isinstance(code, types.CodeType):
            yield code
        function = getattr(function, "__wrapped__", None)


def _has_part(whole: types.CodeType, code: types.CodeType) -> bool:
    """Return whether ``code`` is ``whole``, or what Dynamo made of it or of its rest."""
    if whole.co_filename != code.co_filename:
        return False
    last = max(line for *_, line in whole.co_lines() if line is not None)
    return whole.co_firstlineno <= code.co_firstlineno <= last


def _calls(module: nn.Module) -> int:
    """Return how many modules a module calls itself; a container without forward calls none."""
    has_forward = [type(child).forward is not nn.Module.forward for child in module.children()]
    inside = zip(module.children(), has_forward, strict=True)
    return sum(1 if has else _calls(child) for child, has in inside)
