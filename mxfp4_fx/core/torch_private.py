"""What is asked of Dynamo beyond its public API: whose compilation it is at, whose call this is.

``tests/test_dynamo.py`` pins what the private names of torch that this takes are trusted to do.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)

_OURS = "_is_mxfp4_backend"

Backend = Callable[..., Any]
Enter = Callable[[], contextlib.AbstractContextManager[None]]


def ours(backend: Backend) -> Backend:
    """Mark a Dynamo backend as one of this package: it is handed other graphs than others are."""
    setattr(backend, _OURS, True)
    return backend


def innermost(backend: Any) -> tuple[Backend | None, dict[str, Any]]:
    """The backend of this package behind torch's wrappers, and what they call it with.

    Returns:
        None where it is another's.
    """
    keywords: dict[str, Any] = {}
    for _ in range(16):  # torch.compile's own, Dynamo's for debugging, partials
        if backend is None or getattr(backend, _OURS, False):
            return backend, keywords
        if isinstance(backend, functools.partial):
            keywords = {**backend.keywords, **keywords}
            backend = backend.func
            continue
        keywords = {**getattr(backend, "kwargs", {}), **keywords}
        backend = getattr(backend, "compiler_fn", None) or getattr(
            backend, "_torchdynamo_orig_backend", None
        )
    return None, {}


def untraced(function: Callable[..., Any]) -> None:
    """Keep Dynamo out of a function that C++ calls, and out of whatever that calls.

    Dynamo does not see such a call and would take the function for a frame of its own
    (``torch.compiler.set_stance("eager_then_compile")``). ``torch.compiler.disable`` does the same
    and costs microseconds a call; this is a mark on the code, which nobody asks for otherwise.
    """
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    code: types.CodeType = function.__code__
    set_code_exec_strategy(code, skip)


# Dynamo traces what a freed parameter does when it is used, and must answer this, not trace it.
@torch.compiler.assume_constant_result
def compiling_for() -> bool | None:
    """Whether Dynamo captures for a backend of this package; None if it captures nothing now."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # none was ever started in this thread, or it is over
        return None
    return innermost(backend)[0] is not None


def on_calls(enter_with: Callable[[dict[str, Any]], Enter]) -> None:
    """Have a context around each call of what is compiled for this package.

    Dynamo asks a backend for such a context, ``backend_ctx_ctor``, and enters it before it looks
    at the called function, in the caller's thread. ``torch.compile`` wraps the backend in objects
    that do not hand this attribute on; the outermost gets it here, for backends of this package.

    Args:
        enter_with: is given what the backend is called with (options, mode), once for each
            ``torch.compile``, and returns what makes the context of a call.
    """
    from torch._dynamo.repro.after_dynamo import WrapBackendDebug

    def context(self: Any) -> Any:
        backend, keywords = innermost(self)
        if backend is None:
            return vars(self).get("backend_ctx_ctor", contextlib.nullcontext)
        return enter_with(keywords)

    WrapBackendDebug.backend_ctx_ctor = property(context)  # type: ignore[attr-defined]


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep Dynamo from compiling a function by itself; where others call it, it is inlined."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)
    return function


def compiled_function() -> tuple[Callable[..., Any], list[Any]] | None:
    """What the innermost compiled call on the stack calls: the function and its arguments."""
    for frame in _frames():
        if _is_compiled_call(frame):
            found = frame.f_locals
            return found["fn"], [*found["args"], *found["kwargs"].values()]
    return None


def why_uncompiled() -> str:
    """Why Dynamo left the caller uncompiled, as far as the stack shows, and what helps."""
    if is_eager_by_stance():
        stance = torch._dynamo.eval_frame._stance.stance
        return f"torch.compiler.set_stance({stance!r}) is on"
    for frame in _frames():
        if _is_compiled_call(frame):
            break
        count = len(torch._dynamo.eval_frame._debug_get_cache_entry_list(frame.f_code))
        for name in ("recompile_limit", "accumulated_recompile_limit"):
            if count >= getattr(torch._dynamo.config, name):
                return (
                    f"Dynamo compiles {frame.f_code.co_name} no more, for it has reached "
                    f"torch._dynamo.config.{name}: raise that limit beforehand, or let sizes be "
                    "symbolic with torch.compile(dynamic=True)"
                )
        if _is_disabled_call(frame):
            function = frame.f_locals.get("fn")
            if (
                getattr(function, "__module__", "").partition(".")[0]
                == __package__.partition(".")[0]
            ):
                continue  # the caller's own
            name = getattr(function, "__qualname__", "a function")
            return f"torch.compiler.disable keeps Dynamo out of {name}, which calls it"
    return (
        "a graph break or a hook around it kept Dynamo from capturing it; "
        'TORCH_LOGS="graph_breaks" shows where'
    )


def is_eager_by_stance() -> bool:
    """Whether the user has asked, by ``torch.compiler.set_stance``, for uncompiled calls."""
    stance: str = torch._dynamo.eval_frame._stance.stance
    return "eager" in stance


def can_isolate() -> bool:
    """Whether ``torch.compile`` can keep one call's recompilations apart from all others."""
    return "isolate_recompiles" in inspect.signature(torch.compile).parameters


def _frames() -> Iterator[types.FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_compiled_call(frame: types.FrameType) -> bool:
    code = frame.f_code
    return code.co_name == "compile_wrapper" and code.co_filename == _eval_frame_file()


def _is_disabled_call(frame: types.FrameType) -> bool:
    return frame.f_code.co_name == "_fn" and frame.f_code.co_filename == _eval_frame_file()


@functools.cache
def _eval_frame_file() -> str:
    return torch._dynamo.eval_frame.innermost_fn.__code__.co_filename
