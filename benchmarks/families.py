"""Families whose MLPs ``benchmarks.cpu`` measures: sizes, activation, and transformers' class."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

from torch import Tensor, nn

from benchmarks.sizes import Sizes
from mxfp4_fx.core.formats import dequantize
from mxfp4_fx.core.orders import GPT_OSS as GPT_OSS_ORDER
from mxfp4_fx.core.orders import Order
from mxfp4_fx.ops.operands import Activation


@dataclasses.dataclass(frozen=True)
class Family:
    """
    Attributes:
        label: the model whose sizes these are.
        sizes: of a layer.
        activation: of its experts.
        has_bias: whether they have biases.
        order: of gate_up in transformers' class.
        place: that class, as "module:class", and the class of its config.
        fields: the config's names of a count of experts and of the intermediate size.
    """

    label: str
    sizes: Sizes
    activation: Activation
    has_bias: bool
    order: Order
    place: tuple[str, str, str]
    fields: tuple[str, str]

    def experts(self, sizes: Sizes) -> nn.Module:
        """Return transformers' experts, of whatever values; raises ImportError without it."""
        module, experts, config = self.place
        transformers = importlib.import_module("transformers")
        count, intermediate = self.fields
        made = getattr(transformers, config)(
            hidden_size=sizes.hidden,
            num_experts_per_tok=sizes.top_k,
            **{count: sizes.experts, intermediate: sizes.intermediate},
        )
        built: nn.Module = getattr(importlib.import_module(module), experts)(made)
        return built

    def fill(self, parameter: Tensor, part: Any, is_gate_up: bool) -> None:
        """Fill a parameter of :meth:`experts` with the values of a ``Projection``."""
        order = self.order if is_gate_up else self.order._replace(is_concatenated=False)
        for expert, matrix in enumerate(parameter):
            rows = order.rows_of(matrix)  # strided, as a checkpoint is loaded
            blocks, scales = part.blocks[expert], part.scales[expert]
            if order.is_concatenated:
                blocks, scales = blocks.unflatten(0, (-1, 2)), scales.unflatten(0, (-1, 2))
            dequantize(blocks, scales, rows.dtype, out=rows)


_SILU = Activation("swiglu", 1.0, math.inf, 0.0)
_HALVES = Order(is_transposed=False, is_concatenated=True)
_MODELS = "transformers.models"

GPT_OSS = Family(
    "gpt-oss-20b", Sizes(), Activation("swiglu"), True, GPT_OSS_ORDER,
    (f"{_MODELS}.gpt_oss.modeling_gpt_oss", "GptOssExperts", "GptOssConfig"),
    ("num_local_experts", "intermediate_size"),
)  # fmt: skip
FAMILIES = {
    "gpt_oss": GPT_OSS,
    "qwen3_moe": Family(
        "Qwen3-30B-A3B", Sizes(2048, 768, 128, 8), _SILU, False, _HALVES,
        (f"{_MODELS}.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts", "Qwen3MoeConfig"),
        ("num_experts", "moe_intermediate_size"),
    ),
    "mixtral": Family(
        "Mixtral-8x7B", Sizes(4096, 14336, 8, 2), _SILU, False, _HALVES,
        (f"{_MODELS}.mixtral.modeling_mixtral", "MixtralExperts", "MixtralConfig"),
        ("num_local_experts", "intermediate_size"),
    ),
    "deepseek_v3": Family(
        "DeepSeek-V3 with fewer experts", Sizes(7168, 2048, 16, 8), _SILU, False, _HALVES,
        (f"{_MODELS}.deepseek_v3.modeling_deepseek_v3", "DeepseekV3Experts", "DeepseekV3Config"),
        ("num_local_experts", "moe_intermediate_size"),
    ),
}  # fmt: skip
