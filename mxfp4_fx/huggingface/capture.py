"""Replacement of what Dynamo captures of transformers, while it captures for *this* backend.

``experts_implementation="eager"`` loops over the experts that were hit, which breaks a graph into
as many pieces. Dynamo captures transformers' own grouped form of the same computation instead.
Every other backend still gets the loop. `hub_modules.py` does the like for transformers' own MXFP4
modules.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core import compilation, forks, version
from mxfp4_fx.huggingface import hub_modules, regions

_MODELING = "transformers.models.gpt_oss.modeling_gpt_oss"
_INTEGRATION = "transformers.integrations.mxfp4"

_lock = threading.Lock()
_prepared: set[str] = set()
forks.renew_lock(sys.modules[__name__], "_lock", threading.Lock)


def prepare_capture() -> None:
    """Make capturable what is imported of transformers' GPT-OSS; idempotent."""
    if len(_prepared) == 2:
        return
    with _lock:
        if version.too_old_transformers() is not None:
            return  # its grouped form is another one, which Dynamo captures in bfloat16 only
        for name, prepare in ((_MODELING, _prepare_loop), (_INTEGRATION, _prepare_hub_modules)):
            module = sys.modules.get(name)
            if name not in _prepared and module is not None and prepare(module):
                _prepared.add(name)


def _prepare_loop(modeling: types.ModuleType) -> bool:
    interface = sys.modules.get("transformers.integrations.moe")
    # Another thread may be importing it.
    experts = getattr(modeling, "GptOssExperts", None)
    original = getattr(getattr(experts, "forward", None), "__wrapped__", None)
    if interface is None or original is None:
        return False
    if not regions.prepare(modeling):
        return False
    _substitute(original, interface.ALL_EXPERTS_FUNCTIONS["grouped_mm"])
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

    @torch.compiler.substitute_in_graph(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        router_indices: Any = None,
        routing_weights: Any = None,
    ) -> Tensor:
        if compilation.compiling_for():
            return grouped(self, hidden_states, router_indices, routing_weights)
        result: Tensor = loop(self, hidden_states, router_indices, routing_weights)
        return result
