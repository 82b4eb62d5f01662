"""How each format of packed checkpoints names a matrix's tensors, and what its config says.

The layouts other than compressed-tensors' are written as published, because their own tools need
other versions of transformers, a GPU, or are not public.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from torch import Tensor

GATES = {"up_proj": "gate_proj", "w3": "w1"}


@dataclass(frozen=True)
class Layout:
    """Names and dtypes of a matrix's blocks and scales, and ``quantization_config``."""

    blocks: str
    scales: str
    settings: Callable[[], dict[str, Any]]
    blocks_dtype: torch.dtype = torch.uint8
    scales_dtype: torch.dtype = torch.uint8
    is_stacked: bool = False  # whether a layer's experts are one tensor; others are then dense
    more: tuple[tuple[str, Any], ...] = ()  # other entries of config.json

    def tensors(self, stem: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a matrix, of what compressed-tensors makes of it."""
        return {
            f"{stem}.{self.blocks}": parts["weight_packed"].view(self.blocks_dtype),
            f"{stem}.{self.scales}": parts["weight_scale"].view(self.scales_dtype),
        }

    def whole(self, tensors: dict[str, Tensor]) -> None:
        """Change all tensors of a checkpoint that were made one by one."""
        if not self.is_stacked:
            return
        experts: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
        for name in list(tensors):
            found = re.match(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight\w*)$", name)
            if found and tensors[name].dtype == self.blocks_dtype:
                path, expert, projection, part = found.groups()
                experts[f"{path}.{projection}", part][int(expert)] = tensors.pop(name)
        stacked = {
            key: torch.stack([one[expert] for expert in range(len(one))])
            for key, one in experts.items()
        }
        for (stem, part), up in stacked.items():
            path, _, projection = stem.rpartition(".")
            if projection in ("up_proj", "w3"):
                gate = stacked[f"{path}.{GATES[projection]}", part]
                tensors[f"{path}.w13_{part}"] = torch.cat([gate, up], 1)
            elif projection in ("down_proj", "w2"):
                tensors[f"{path}.w2_{part}"] = up

    def config(self, config: dict[str, Any]) -> None:
        config.update(self.more, quantization_config=self.settings())


def scheme(preset: str = "MXFP4A16") -> QuantizationScheme:
    return preset_name_to_scheme(preset, targets=["Linear"])


def _compressed_tensors() -> dict[str, Any]:
    made = QuantizationConfig(
        config_groups={"group_0": scheme()},
        format="mxfp4-pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    return dict(made.model_dump(mode="json"))


def _quark() -> dict[str, Any]:
    """Return what Quark 0.13 writes for its scheme mxfp4, as amd/*-MXFP4 have it."""
    weight = {
        "dtype": "fp4",
        "qscheme": "per_group",
        "group_size": 32,
        "ch_axis": -1,
        "scale_format": "e8m0",
        "scale_type": "float",
        "is_dynamic": False,
        "round_method": "half_even",
        "scale_calculation_mode": "even",
        "observer_cls": "PerBlockMXObserver",
        "symmetric": None,
    }
    return {
        "quant_method": "quark",
        "version": "0.13",
        "quant_mode": "eager_mode",
        "global_quant_config": {
            "weight": weight,
            "input_tensors": {**weight, "is_dynamic": True},
            "output_tensors": None,
            "bias": None,
        },
        "exclude": ["lm_head"],
        "export": {
            "weight_format": "real_quantized",
            "pack_method": "reorder",
            "kv_cache_group": [],
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "algo_config": None,
    }


def _deepseek() -> dict[str, Any]:
    """Return what deepseek-ai/DeepSeek-V4-* have; blocks of 32 by 32 are those of V4.1."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [32, 32],
    }


COMPRESSED_TENSORS = Layout("weight_packed", "weight_scale", _compressed_tensors)
QUARK = Layout("weight", "weight_scale", _quark)
VLLM = Layout(
    "weight",
    "weight_scale",
    lambda: {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    is_stacked=True,
)
DEEPSEEK = Layout(
    "weight",
    "scale",
    _deepseek,
    torch.int8,
    torch.float8_e8m0fnu,
    more=(("expert_dtype", "fp4"),),
)
