"""What transformers' loader converts: dense experts to MXFP4, and packed ones to dense, if skipped.

Other packed experts need no conversion: their parameters have the names and bytes of the files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, count_nan, quantize
from mxfp4_fx.huggingface.block_shards import dense_part
from mxfp4_fx.huggingface.packed import PROJECTIONS, PackedExperts
from mxfp4_fx.huggingface.shards import Shard
from mxfp4_fx.huggingface.unpacking import dense_weight

# The ends of the names of packed weights' parameters.
BYTES = tuple(f"{projection}_{part}" for projection in PROJECTIONS for part in ("blocks", "scales"))


class QuantizeExperts(ConversionOps):
    """The conversion of a dense weight [E, K, N] to blocks and scales, expert by expert."""

    def __init__(self, scale_rule: str, nan_blocks: dict[str, int]) -> None:
        self.scale_rule = scale_rule
        self._nan_blocks = nan_blocks  # convert() writes the counts of NaN blocks into it

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizeExperts:
        return self  # the loader copies a conversion for each weight; all share `nan_blocks`

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **_: Any
    ) -> dict[str, Tensor]:
        (weight,) = (_only(tensors) for tensors in input_dict.values())
        name = full_layer_name.removesuffix("_blocks")
        path, projection = name.rsplit(".", 1)
        experts = model.get_submodule(path)
        if cut := experts.cuts.get(f"{projection}_blocks"):
            weight = dense_part(cut, projection, weight)
        e, k, n = weight.shape
        blocks = weight.new_empty((e, n, k // BLOCK, BYTES_PER_BLOCK), dtype=torch.uint8)
        scales = weight.new_empty((e, n, k // BLOCK), dtype=torch.uint8)
        for expert in range(e):
            blocks[expert], scales[expert] = quantize(weight[expert].T, scale_rule=self.scale_rule)
        set_loading_dtype(experts, projection, torch.uint8)
        if count := count_nan(scales):
            self._nan_blocks[f"{name}_scales"] = count
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}


class TakeParts(ConversionOps):
    """The conversion of a whole tensor, in a mapped file, to this rank's part of it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TakeParts:
        return self

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **_: Any
    ) -> dict[str, Tensor]:
        (whole,) = (_only(tensors) for tensors in input_dict.values())
        path, parameter = full_layer_name.rsplit(".", 1)
        shard = model.get_submodule(path).cuts[parameter]
        return {full_layer_name: shard.part_of(whole)}


class DequantizeExperts(ConversionOps):
    """The conversion of blocks and scales to a dense weight [E, K, N], for skipped experts."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **_: Any
    ) -> dict[str, Tensor]:
        # The loader casts bytes to the weight's dtype; every float dtype holds 0 to 255 exactly.
        blocks, scales = (
            _only(tensors).to(torch.uint8) for _, tensors in sorted(input_dict.items())
        )
        weight = model.get_parameter(full_layer_name)
        return {full_layer_name: dense_weight(blocks, scales, weight.dtype)}


OURS = (QuantizeExperts, TakeParts, DequantizeExperts)


def bytes_of(weight: str) -> list[str]:
    """Return the names of the blocks and the scales of a weight."""
    return [f"{weight}_blocks", f"{weight}_scales"]


def exactly(name: str) -> str:
    """Return a pattern for the end of a key.

    Without $, older versions of transformers find a weight's name in that of its bias.
    """
    return name.replace(".", r"\.") + "$"


def _only(tensors: Any) -> Tensor:
    """Return the tensor, which the loader passes alone or in a list."""
    return tensors[0] if isinstance(tensors, list) else tensors


def set_loading_dtype(
    module: PackedExperts, projection: str, dtype: torch.dtype, *, is_split: bool = False
) -> None:
    """Give blocks and scales, still on meta, the dtype to which the loader casts what it reads.

    This must be the stored dtype of a dense weight until the weight is quantized, and uint8
    afterwards. If the loader splits the weight among processes (`is_split`), they must also have
    its shape until then: the loader takes a tensor of one dimension less for a single expert.
    """
    h, i = module.hidden_size, module.intermediate_size
    n, k = (2 * i, h) if projection == "gate_up_proj" else (h, i)
    for name, ending in (
        (f"{projection}_blocks", (n, k // BLOCK, BYTES_PER_BLOCK)),
        (f"{projection}_scales", (n, k // BLOCK)),
    ):
        old = module.get_parameter(name)
        shape = (old.shape[0], *((k, n) if is_split else ending))
        empty = torch.empty(shape, dtype=dtype, device="meta")
        shard = Shard.of(old)
        empty = empty if shard is None else shard.share(empty)
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))


def nan_blocks(experts: PackedExperts, name: str) -> dict[str, int]:
    """Return name -> number of NaN bytes, for the scales of which this process holds any."""
    counts = {}
    for projection in PROJECTIONS:
        scales: Any = experts.get_parameter(f"{projection}_scales")
        held = scales.to_local() if Shard.of(scales) else scales
        if count := count_nan(held):
            counts[f"{name}.{projection}_scales"] = count
    return counts
