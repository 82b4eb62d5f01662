"""Capture of transformers' eager experts loop.

``experts_implementation="eager"`` loops over the experts that were hit, which breaks a graph into
as many pieces. While *this* backend compiles, Dynamo captures transformers' own grouped form of the
same computation instead. Every other backend still gets the loop.
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

_MODELING = "transformers.models.gpt_oss.modeling_gpt_oss"

_lock = threading.Lock()
_prepared = False
forks.renew_lock(sys.modules[__name__], "_lock", threading.Lock)


def prepare_capture() -> bool:
    """Make the eager experts loop capturable if transformers' GPT-OSS is imported; idempotent.

    Returns:
        Whether the loop is capturable now.
    """
    global _prepared
    with _lock:
        modeling = sys.modules.get(_MODELING)
        if _prepared or modeling is None:
            return _prepared
        if version.too_old_transformers() is not None:
            return False  # its grouped form is another one, which Dynamo captures in bfloat16 only
        interface = sys.modules.get("transformers.integrations.moe")
        # Another thread may be importing it.
        experts = getattr(modeling, "GptOssExperts", None)
        original = getattr(getattr(experts, "forward", None), "__wrapped__", None)
        if interface is None or original is None:
            return False
        _substitute(original, interface.ALL_EXPERTS_FUNCTIONS["grouped_mm"])
        _take_as_constants(interface)
        _prepared = True
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
    # Dynamo identifies functions by identity, so that it does not substitute this copy.
    loop = types.FunctionType(
        original.__code__, original.__globals__, original.__name__, original.__defaults__
    )

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
