"""How the eager experts loop of transformers is captured.

``experts_implementation="eager"`` loops over the experts that were hit, which breaks a graph in as
many pieces. While *this* backend compiles, Dynamo is given transformers' own grouped form of the
same computation instead; every other backend still sees the loop.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mxfp4_fx import dynamo
from mxfp4_fx.errors import CheckpointError

_MODELING = "transformers.models.gpt_oss.modeling_gpt_oss"

_lock = threading.Lock()
_prepared = False


def prepare_capture() -> bool:
    """Make the eager experts loop capturable, if transformers' GPT-OSS is loaded; idempotent.

    Returns:
        Whether it is capturable now.
    """
    global _prepared
    with _lock:
        modeling = sys.modules.get(_MODELING)
        if _prepared or modeling is None:
            return _prepared
        interface = sys.modules.get("transformers.integrations.moe")
        # Half imported by another thread, or transformers 4, whose experts have no such loop.
        experts = getattr(modeling, "GptOssExperts", None)
        original = getattr(getattr(experts, "forward", None), "__wrapped__", None)
        if interface is None or original is None:
            return False
        _substitute(original, interface.ALL_EXPERTS_FUNCTIONS["grouped_mm"])
        _prepared = True
        return True


def _substitute(original: types.FunctionType, grouped: Callable[..., Tensor]) -> None:
    # The copy is not substituted in its turn: Dynamo goes by the function's identity.
    loop = types.FunctionType(
        original.__code__, original.__globals__, original.__name__, original.__defaults__
    )

    @torch._dynamo.assume_constant_result
    def compiling_for_mxfp4() -> bool:
        return dynamo.compiling_for() is True

    @torch.compiler.substitute_in_graph(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        router_indices: Any = None,
        routing_weights: Any = None,
    ) -> Tensor:
        if compiling_for_mxfp4():
            return grouped(self, hidden_states, router_indices, routing_weights)
        result: Tensor = loop(self, hidden_states, router_indices, routing_weights)
        return result


@contextlib.contextmanager
def empty_model(path: str, dtype: torch.dtype, experts: str | None = None) -> Iterator[Any]:
    """The causal language model of a checkpoint's ``config.json``, of fake tensors.

    It has every size and no memory, so that a model of any size can be explained anywhere; inside
    the context, tensors made by torch's factories are fake as well.

    Args:
        path: a directory with a ``config.json``.
        dtype: of the parameters.
        experts: ``experts_implementation``, transformers' default if None.

    Raises:
        CheckpointError: there is no such file, or transformers is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise CheckpointError("this needs transformers: pip install transformers") from error
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise CheckpointError(f"{path} has no config.json; name a checkpoint's directory")
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    # Explained as it is once loaded: dequantized.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kwargs = {"experts_implementation": experts} if experts else {}
    with FakeTensorMode():
        yield AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs).eval()
