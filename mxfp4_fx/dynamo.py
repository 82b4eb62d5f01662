"""Whose compilation Dynamo is at: this backend's, or another's."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)

_OURS = "_is_mxfp4_backend"


def ours(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a Dynamo backend as one of this package: it is handed other graphs than others are."""
    setattr(backend, _OURS, True)
    return backend


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
    for _ in range(8):  # wrappers: torch.compile's own, and Dynamo's for debugging
        if backend is None or getattr(backend, _OURS, False):
            break
        backend = getattr(backend, "compiler_fn", None) or getattr(
            backend, "_torchdynamo_orig_backend", None
        )
    return getattr(backend, _OURS, False) is True
