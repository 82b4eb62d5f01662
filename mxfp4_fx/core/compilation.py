"""Dynamo's state: the backend it compiles for, the compiled call on the stack, uncompiled code."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mxfp4_fx.core import torch_private_dynamo
from mxfp4_fx.core.torch_private import Backend

_OURS = "_is_mxfp4_backend"
_IS_PART = "_compiles_parts"
# Code that Dynamo compiles no more -> the name in ``torch._dynamo.config`` of the limit it reached.
_limited: weakref.WeakKeyDictionary[types.CodeType, str] = weakref.WeakKeyDictionary()

# The keyword arguments of a backend of this package for which a program is captured to be exported.
_exported_with: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "exported_with", default=None
)

Enter = Callable[[], contextlib.AbstractContextManager[None]]


def ours(backend: Backend) -> Backend:
    """Mark a Dynamo backend as one of this package; Dynamo captures other graphs for those."""
    setattr(backend, _OURS, True)
    return backend


def ours_for_parts(backend: Backend) -> Backend:
    """Mark a backend as :func:`ours`, for parts of a call that has entered its context itself."""
    setattr(backend, _IS_PART, True)
    return ours(backend)


def innermost(backend: Any) -> tuple[Backend | None, dict[str, Any]]:
    """Find the backend of this package inside torch's wrappers.

    Returns:
        The backend, and the keyword arguments that the wrappers call it with; (None, {}) if the
        innermost backend is not of this package.
    """
    keywords: dict[str, Any] = {}
    for _ in range(16):  # wrappers of torch.compile, of Dynamo for debugging, and partials
        if backend is None or getattr(backend, _OURS, False):
            return backend, keywords
        if isinstance(backend, functools.partial):
            keywords = {**backend.keywords, **keywords}
            backend = backend.func
            continue
        keywords = {**getattr(backend, "kwargs", {}), **keywords}
        backend = torch_private_dynamo.wrapped_backend(backend)
    return None, {}


@contextlib.contextmanager
def exporting(keywords: dict[str, Any]) -> Iterator[None]:
    """Let Dynamo capture as for a backend of this package, though it captures for the exporter.

    Args:
        keywords: the backend's arguments, ``options`` among them.
    """
    token = _exported_with.set(keywords)
    try:
        yield
    finally:
        _exported_with.reset(token)


# Dynamo traces a freed parameter's __torch_function__. It must evaluate this call, not trace it.
@torch.compiler.assume_constant_result
def compiling_for() -> bool:
    """Return whether Dynamo captures for a backend of this package now, or to export for it."""
    return is_exporting() or innermost(torch_private_dynamo.compiled_with())[0] is not None


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Return whether this thread is in a block of :func:`exporting`."""
    return _exported_with.get() is not None


@torch.compiler.assume_constant_result
def compiling_whole_for() -> bool:
    """Return whether Dynamo captures for a backend that no :func:`ours_for_parts` marks."""
    backend = innermost(torch_private_dynamo.compiled_with())[0]
    return backend is not None and not getattr(backend, _IS_PART, False)


def keywords() -> dict[str, Any]:
    """Return ``options`` and ``mode`` of the compilation for which Dynamo captures now."""
    given = _exported_with.get() or innermost(torch_private_dynamo.compiled_with())[1]
    return {"options": given.get("options"), "mode": given.get("mode")}


def on_calls(enter_with: Callable[[dict[str, Any]], Enter]) -> None:
    """Enter a context around each call of a function that is compiled for this package.

    Args:
        enter_with: takes the backend's keyword arguments (options, mode) and returns the factory
            of a call's context. It is called once for each ``torch.compile``.
    """

    def context(wrapper: Any) -> Enter | None:
        backend, keywords = innermost(wrapper)
        if backend is None or getattr(backend, _IS_PART, False):
            return None
        return enter_with(keywords)

    torch_private_dynamo.have_context(context)


def on_frames(begin: Callable[[bool], object], sharers: Callable[[types.CodeType], int]) -> None:
    """Call functions before Dynamo traces a frame for a backend of this package.

    Dynamo's start callbacks would not do for ``begin``: ``torch.compiler.reset`` removes them, and
    they do not run while another thread compiles a backward.

    Args:
        begin: called before each frame, with whether the backend is one for parts.
        sharers: takes the code of a frame that has reached one of Dynamo's limits on compilations.
            It returns how many share the code, so that the limit holds for each of them.
    """

    def instead_of(original: torch_private_dynamo.LimitCheck) -> torch_private_dynamo.LimitCheck:
        def check(cache_size: Any, compile_id: Any) -> tuple[bool, str]:
            # A wrapper around the caller would not do: Dynamo looks on the stack for
            # torch.compiler.disable(recursive=False), just above its own frames.
            _, _, caller = itertools.islice(_frames(), 3)  # behind _frames and this function
            local = caller.f_locals
            code, backend = local["code"], innermost(local["compiler_fn"])[0]
            is_ours = backend is not None
            if is_ours:
                begin(getattr(backend, _IS_PART, False))
            is_over, limit = original(cache_size, compile_id)
            if is_over and is_ours and (count := sharers(code)) > 1:
                names = [field.name for field in dataclasses.fields(cache_size)]
                counts = {name: getattr(cache_size, name) // count for name in names}
                number = compile_id.frame_compile_id // count
                is_over, limit = original(
                    dataclasses.replace(cache_size, **counts),
                    dataclasses.replace(compile_id, frame_compile_id=number),
                )
            if is_over:
                _limited[code] = limit
            else:
                _limited.pop(code, None)  # after a reset
            return is_over, limit

        return check

    torch_private_dynamo.replace_limit_check(instead_of)


def callers() -> Iterator[types.CodeType]:
    """Yield the code of the functions on the stack, up to the innermost compiled call."""
    for frame in _frames():
        if torch_private_dynamo.called_by(frame):
            return
        yield frame.f_code


def compiled_function(*, apart: bool = False) -> tuple[Callable[..., Any], list[Any]] | None:
    """Return the function and arguments of the innermost compiled call on the stack, or None.

    Args:
        apart: from now on, Dynamo counts this call's compilations apart from those for other
            backends: neither uses up the limits of the other. Only a context of the call may ask
            for this, when it is entered.
    """
    for frame in _frames():
        called = torch_private_dynamo.called_by(frame)
        if called:
            if apart:
                torch_private_dynamo.keep_apart(frame)
            return called
    return None


def why_uncompiled() -> str:
    """Return why Dynamo left the caller uncompiled, as far as the stack shows, and the remedy."""
    if is_eager_by_stance():
        return f"torch.compiler.set_stance({torch_private_dynamo.stance()!r}) is on"
    for frame in _frames():
        if torch_private_dynamo.called_by(frame):
            break
        if limit := reached_limit(frame.f_code):
            return (
                f"Dynamo compiles {frame.f_code.co_name} no more, for it has reached "
                f"torch._dynamo.config.{limit}: raise that limit beforehand, or let sizes be "
                "symbolic with torch.compile(dynamic=True)"
            )
        function = torch_private_dynamo.disabled_by(frame)
        if function is not None and not _is_of_this_package(function):
            name = getattr(function, "__qualname__", "a function")
            return f"torch.compiler.disable keeps Dynamo out of {name}, which calls it"
    return (
        "a graph break or a hook around it kept Dynamo from capturing it; "
        'TORCH_LOGS="graph_breaks" shows where'
    )


def reached_limit(code: types.CodeType) -> str | None:
    """Return the name in ``torch._dynamo.config`` of the limit that ``code`` reached, or None."""
    # After a reset, nothing is compiled.
    return _limited.get(code) if torch_private_dynamo.is_compiled(code) else None


def is_eager_by_stance() -> bool:
    """Return whether ``torch.compiler.set_stance`` makes calls run uncompiled."""
    return "eager" in torch_private_dynamo.stance()


def _is_of_this_package(function: Any) -> bool:
    package = __name__.partition(".")[0]
    return getattr(function, "__module__", "").partition(".")[0] == package


def _frames() -> Iterator[types.FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
