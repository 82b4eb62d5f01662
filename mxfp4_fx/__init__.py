"""Mixtures of experts in MXFP4: ``torch.compile(model, backend="mxfp4")``.

Names are imported when they are first used, because ``TORCH_LOGS="+mxfp4_fx"`` makes torch import
this package before torch's own import is complete.
"""

import importlib
import types
from typing import TYPE_CHECKING, Any

from mxfp4_fx import errors as errors
from mxfp4_fx.core.version import __version__
from mxfp4_fx.core.when_imported import when_imported

if TYPE_CHECKING:
    from mxfp4_fx.backend import mxfp4
    from mxfp4_fx.checkpoints.quantize import quantize_checkpoint
    from mxfp4_fx.explanation import Explanation, explain
    from mxfp4_fx.exported import load_exported
    from mxfp4_fx.exporting import export
    from mxfp4_fx.huggingface.loading import from_pretrained
    from mxfp4_fx.huggingface.placement import place_experts
    from mxfp4_fx.huggingface.quantizer import Mxfp4Config
    from mxfp4_fx.huggingface.unpacking import dequantize
    from mxfp4_fx.layerwise import compile
    from mxfp4_fx.warming import warmup
    from mxfp4_fx.weights.upkeep import forget, refresh, restore

__all__ = [
    "Explanation",
    "Mxfp4Config",
    "__version__",
    "compile",
    "dequantize",
    "explain",
    "export",
    "forget",
    "from_pretrained",
    "load_exported",
    "mxfp4",
    "place_experts",
    "quantize_checkpoint",
    "refresh",
    "restore",
    "warmup",
]

_MODULES = {
    "Explanation": "mxfp4_fx.explanation",
    "Mxfp4Config": "mxfp4_fx.huggingface.quantizer",
    "compile": "mxfp4_fx.layerwise",
    "dequantize": "mxfp4_fx.huggingface.unpacking",
    "explain": "mxfp4_fx.explanation",
    "export": "mxfp4_fx.exporting",
    "forget": "mxfp4_fx.weights.upkeep",
    "from_pretrained": "mxfp4_fx.huggingface.loading",
    "load_exported": "mxfp4_fx.exported",
    "mxfp4": "mxfp4_fx.backend",
    "place_experts": "mxfp4_fx.huggingface.placement",
    "quantize_checkpoint": "mxfp4_fx.checkpoints.quantize",
    "refresh": "mxfp4_fx.weights.upkeep",
    "restore": "mxfp4_fx.weights.upkeep",
    "warmup": "mxfp4_fx.warming",
}


def _register(interface: types.ModuleType) -> None:
    importlib.import_module("mxfp4_fx.huggingface.implementation").register(interface)


def _register_lora(lora: types.ModuleType) -> None:
    if hasattr(lora.LoraModel, "_inject_parameters"):  # older versions have no target_parameters
        importlib.import_module("mxfp4_fx.huggingface.peft_layers").register(lora.LoraModel)


# from_pretrained(..., experts_implementation="mxfp4_fx") is valid once both packages are imported.
when_imported("transformers.integrations.moe", _register)
# peft.LoraConfig(target_parameters=...) then finds the weights of packed experts.
when_imported("peft.tuners.lora.model", _register_lora)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
