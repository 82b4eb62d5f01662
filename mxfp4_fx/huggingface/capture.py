"""Replacement of what Dynamo captures of transformers, while it captures for *this* backend.

``experts_implementation="eager"`` loops over the experts that were hit, which breaks a graph into
as many pieces. Dynamo captures transformers' own grouped form of the same computation instead, for
the experts of every family. Every other backend still gets the loop. `hub_modules.py` does the like
for transformers' own MXFP4 modules.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core import compilation, forks, version
from mxfp4_fx.huggingface import hub_modules, regions

_MODELS, _MODELING = "transformers.models.", "modeling_"
_GPT_OSS = "transformers.models.gpt_oss.modeling_gpt_oss"
_INTERFACE = "transformers.integrations.moe"
_INTEGRATION = "transformers.integrations.mxfp4"

_lock = threading.Lock()
_prepared: set[str] = set()
_seen = 0  # modules that Python had imported when all of them were prepared
forks.renew_lock(sys.modules[__name__], "_lock", threading.Lock)


def prepare_capture() -> None:
    """Make capturable what is imported of transformers; idempotent, and cheap if nothing is new."""
    global _seen
    count = len(sys.modules)
    if count == _seen:
        return
    with _lock:
        if version.too_old_transformers() is not None:
            return  # its grouped form is another one, which Dynamo captures in bfloat16 only
        new = [name for name in list(sys.modules) if name not in _prepared and _prepares(name)]
        ready = [_PREPARE.get(name, _prepare_loops)(sys.modules[name]) for name in new]
        _prepared.update(name for name, is_ready in zip(new, ready, strict=True) if is_ready)
        if all(ready):
            _seen = count


def _prepares(name: str) -> bool:
    """Return whether a module of this name has something to prepare."""
    is_modeling = name.startswith(_MODELS) and name.rpartition(".")[2].startswith(_MODELING)
    return is_modeling or name == _INTEGRATION


def _prepare_gpt_oss(modeling: types.ModuleType) -> bool:
    # Another thread may be importing it.
    if not hasattr(getattr(modeling, "GptOssExperts", None), "forward"):
        return False
    return regions.prepare(modeling) and _prepare_loops(modeling)


def _prepare_loops(modeling: types.ModuleType) -> bool:
    if not hasattr(modeling, "__all__"):  # its last line: another thread may be importing it
        return False
    interface = sys.modules.get(_INTERFACE)
    if interface is None:
        return True  # no module with experts does without it
    grouped = interface.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    for kind in list(vars(modeling).values()):
        if isinstance(kind, type) and kind.__module__ == modeling.__name__:
            original = getattr(vars(kind).get("forward"), "__wrapped__", None)
            if original is not None and hasattr(kind, "_apply_gate"):
                _substitute(original, grouped)
    _take_as_constants(interface)
    return True


def _prepare_hub_modules(integration: types.ModuleType) -> bool:
    # Another thread may be importing it: this is the last thing that it defines.
    if not hasattr(integration, "replace_with_mxfp4_linear"):
        return False
    hub_modules.prepare(integration)
    return True


def _take_as_constants(interface: types.ModuleType) -> None:
    """Keep Dynamo out of the functions that ask for torch's version, whose logging breaks a graph.

    transformers 5.8 to 5.14 marks them as constant, which Dynamo overlooks: a cache is around them.
    """
    for name in ("is_torch_greater_or_equal", "is_torch_less_or_equal"):
        cached = getattr(getattr(interface, name, None), "__wrapped__", None)
        if cached is not None:
            torch.compiler.assume_constant_result(cached)


def _substitute(original: types.FunctionType, grouped: Callable[..., Tensor]) -> None:
    loop = hub_modules.unsubstituted(original)
    _, *names = inspect.signature(original).parameters

    def forward(self: Any, *given: Any, **named: Any) -> Tensor:
        if compilation.compiling_for():
            return grouped(self, *given, *(named[name] for name in names[len(given) :]))
        result: Tensor = loop(self, *given, **named)
        return result

    torch.compiler.substitute_in_graph(original, skip_signature_check=True)(forward)


_PREPARE: dict[str, Callable[[types.ModuleType], bool]] = {
    _GPT_OSS: _prepare_gpt_oss,
    _INTEGRATION: _prepare_hub_modules,
}
