"""Calls of what Dynamo compiled that do not pass through Dynamo: like ``torch_private.py``.

A call of a compiled function enters a wrapper of ``torch.compile`` and the hook by which Dynamo
sees Python calls. Between calls a decoder layer reads 100 MB of weights, so all of that comes from
memory again.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from mxfp4_fx.core.torch_private import look_up, trusted

with trusted():
    import torch._C._dynamo.eval_frame

    _set_eval_frame = torch._C._dynamo.eval_frame.set_eval_frame
    _entries_of = torch._C._dynamo.eval_frame._debug_get_cache_entry_list
    _is_traced_by_jit = torch._C._is_tracing


class Direct:
    """A function, its compiled code called directly wherever the code's guards hold.

    The guards and the code are Dynamo's own, compiled by the function's own backend. Any other call
    goes through ``torch.compile``, and so does every call under a stance, which may name another
    backend (``torch.compiler.set_stance``).
    """

    def __init__(self, function: types.FunctionType, compiled: Callable[..., Any]) -> None:
        """
        Args:
            function: takes positional arguments only.
            compiled: what ``torch.compile`` made of it, with ``fullgraph=True``.
        """
        self._function, self._compiled = function, compiled
        code = function.__code__
        self._names = code.co_varnames[: code.co_argcount]
        self._dynamo = look_up("torch._dynamo", "eval_frame")
        # The guards of each compilation, and its code; the one that served last comes first.
        self._entries: list[tuple[Any, types.CodeType]] = []

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._compiled(*args)
        if not self._entries or self._has_stance() or _is_traced_by_jit():
            return self._call_compiled(args)
        local = dict(zip(self._names, args, strict=True))
        closure = self._function.__closure__ or ()
        for name, cell in zip(self._function.__code__.co_freevars, closure, strict=True):
            local[name] = cell.cell_contents
        # What is called here is compiled already, or is not to be.
        before = _set_eval_frame(None)
        try:
            code = self._code_for(local)
            if code is not None:
                call = types.FunctionType(code, self._function.__globals__, None, None, closure)
                return call(*args)
        finally:
            _set_eval_frame(before)
        return self._call_compiled(args)

    def _has_stance(self) -> bool:
        stance = self._dynamo._stance
        return bool(stance.stance != "default" or stance.backend is not None)

    def _code_for(self, local: dict[str, Any]) -> types.CodeType | None:
        """Return code whose guards hold for the function's local variables, or None."""
        entries = self._entries  # other threads may set it
        for at, (guards, code) in enumerate(entries):
            # Guards of what Dynamo dropped have no entry: objects that they knew may be gone.
            if guards.cache_entry is not None and guards.check(local):
                if at:
                    self._entries = [entries[at], *entries[:at], *entries[at + 1 :]]
                return code
        return None

    def _call_compiled(self, args: tuple[Any, ...]) -> Any:
        result = self._compiled(*args)
        entries = _entries_of(self._function.__code__)
        # The first one served this call. Others may be of another backend, which a stance named.
        if entries and not self._has_stance():
            guards, code = entries[0].guard_manager, entries[0].code
            known = [one for one in self._entries if one[0] is not guards]
            kept = [one for one in known if one[0].cache_entry is not None]
            self._entries = [(guards, code), *kept]
        return result
