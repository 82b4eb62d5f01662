"""What transformers asks of every quantization method whose experts stay packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.huggingface import parallel
from mxfp4_fx.huggingface.arguments import refuse
from mxfp4_fx.huggingface.conversions import BYTES
from mxfp4_fx.huggingface.unpacking import unpack_experts
from mxfp4_fx.ops import target


class PackedQuantizer(HfQuantizer):
    """A quantization method for files that hold MXFP4 experts; each kind of files has its own."""

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Return the bytes of a loaded element, from which transformers plans a device map."""
        return 1 if param_name.endswith(BYTES) else param.element_size()

    def preprocess_model(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Begin to compile the CPU's kernels beside the loading, if the experts go there."""
        super().preprocess_model(model, *args, **kwargs)
        if _is_for_cpu(kwargs.get("device_map")):
            target.load_ahead("auto", torch.device("cpu"))

    def _require_one_process(self, model: Any, use_kernels: bool) -> None:
        """Refuse arguments of ``from_pretrained`` that are for GPT-OSS alone.

        Raises:
            OptionError: there are such arguments.
        """
        if use_kernels:
            refuse("use_kernels")
        if parallel.is_spread(parallel.config_of(model)):
            raise OptionError(
                "from_pretrained(..., distributed_config=...) cannot spread experts of other "
                "families than GPT-OSS: load the checkpoint in one process"
            )

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        unpack_experts(model, dtype)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        super().remove_quantization_config(model)
        for module in model.modules():
            vars(getattr(module, "config", self)).pop("_is_quantized", None)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained. The experts are frozen."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: transformers' Trainer need not add adapters, but trains what is not experts."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _is_for_cpu(device_map: Any) -> bool:
    """Return whether a device map, as ``from_pretrained`` takes it, puts the model on a CPU.

    Without one, a model is loaded there, but hardly to stay where torch has been built for a GPU.
    Whether there is one is not asked: CUDA's answer could keep the process from forking.
    """
    if device_map in (None, "auto"):
        return torch.accelerator.current_accelerator() is None
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    return all(str(device).startswith("cpu") for device in devices)
