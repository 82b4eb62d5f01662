"""transformers' default load on a GPU machine, on a CPU: its own modules, loader and quantizer.

What is not here is faked: the accelerator and the version of ``kernels`` that transformers asks
for. The hub's package is that of ``hub_package.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hub_package
import models
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import hub_kernels, mxfp4
from transformers.quantizers import quantizer_mxfp4

from mxfp4_fx.core.formats import quantize
from mxfp4_fx.huggingface.packed import PROJECTIONS

LAYOUTS = {
    "hub_strided": hub_package.StridedLayout,
    "hub_hopper": hub_package.HopperMXValueLayout,
    "hub_blackwell": hub_package.BlackwellMXValueLayout,
}


@contextmanager
def on_a_gpu(layout: str = "hub_strided") -> Iterator[None]:
    """Let transformers load MXFP4 checkpoints as for a GPU whose weights have this layout."""
    quantizer = quantizer_mxfp4.Mxfp4HfQuantizer
    prepare = quantizer._process_model_before_weight_loading

    def prepare_for_gpu(*args: Any, **kwargs: Any) -> None:
        with _with_accelerator(torch.device("xpu")):
            prepare(*args, **kwargs)

    # torch's builds for CUDA name an accelerator on any machine.
    with _with_layout(layout), _with_accelerator(None), pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer_mxfp4, "is_kernels_available", lambda: True)
        patch.setattr(quantizer, "_process_model_before_weight_loading", prepare_for_gpu)
        patch.setattr(hub_kernels, "get_kernel", lambda *_, **__: hub_package)
        yield


@contextmanager
def _with_accelerator(device: torch.device | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for place in (quantizer_mxfp4, mxfp4, torch.accelerator):  # the last before 5.19
            for name in ("get_current_accelerator", "current_accelerator"):
                if hasattr(place, name):
                    patch.setattr(place, name, lambda *_: device)
        yield


def load(path: Path, layout: str = "hub_strided", **kwargs: Any) -> Any:
    """``AutoModelForCausalLM.from_pretrained`` without a word about MXFP4."""
    with on_a_gpu(layout):
        return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


def hub_mlp(layout: str = "hub_strided", seed: int = 0, **changes: Any) -> Any:
    """Make an MLP of transformers' MXFP4 classes with the values of ``models.mlp``, bfloat16."""
    return hub_layers(layout, seed, count=1, **changes).layers[0]


def hub_layers(layout: str = "hub_strided", seed: int = 0, count: int = 2, **changes: Any) -> Any:
    """Make ``models.Layers`` of transformers' MXFP4 classes, in bfloat16."""
    changes = {"num_experts_per_tok": 2, **changes}  # the hub's scatter wants a power of two
    layers = models.Layers(torch.bfloat16, count=0)
    mxfp4.triton_kernels_hub = hub_package
    with _with_layout(layout), torch.no_grad():
        for at in range(count):
            dense = models.mlp(torch.bfloat16, seed=seed + at, **changes)
            experts = mxfp4.Mxfp4GptOssExperts(models.config(**changes))
            for name in PROJECTIONS:
                getattr(experts, f"{name}_bias").copy_(getattr(dense.experts, f"{name}_bias"))
                packed = quantize(getattr(dense.experts, name).transpose(1, 2))
                mxfp4.swizzle_mxfp4_convertops(*packed, experts, name, "cpu", hub_package)
            layers.layers.append(mxfp4.Mxfp4GptOssMLP(dense.router, experts))
    return layers


@contextmanager
def _with_layout(layout: str) -> Iterator[None]:
    order = LAYOUTS[layout], {} if layout == "hub_strided" else {"mx_axis": 1}
    layouts = hub_package.tensor_details.layout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "make_default_matmul_mxfp4_w_layout", lambda mx_axis: order)
        yield
