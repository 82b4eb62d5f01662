"""What transformers' loader converts for a family's packed files, and back when it saves.

Shape letters: E experts, I intermediate, N output rows, K contraction.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from mxfp4_fx.checkpoints.encodings import Encoding
from mxfp4_fx.core.formats import BYTES_PER_BLOCK, count_nan
from mxfp4_fx.huggingface.conversions import _only


class StackExperts(ConversionOps):
    """The conversion of single experts' bytes to the one tensor of ``PackedExperts``.

    Of each expert there is one matrix, or one of gate and one of up, whose rows then alternate.
    """

    def __init__(self, is_blocks: bool, dtype: torch.dtype, nan_blocks: dict[str, int]) -> None:
        self.is_blocks, self.dtype = is_blocks, dtype  # dtype: that of the bytes in the files
        self._nan_blocks = nan_blocks  # convert() writes the counts of NaN blocks into it

    def __deepcopy__(self, memo: dict[int, Any]) -> StackExperts:
        return self  # the loader copies a conversion for each weight; all share `nan_blocks`

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        source_patterns: list[str],
        full_layer_name: str,
        **_: Any,
    ) -> dict[str, Tensor]:
        return self._stacked([input_dict.pop(p) for p in source_patterns], full_layer_name)

    def _stacked(self, parts: list[list[Any]], full_layer_name: str) -> dict[str, Tensor]:
        (experts, one), count = (len(parts[0]), parts[0][0]), len(parts)
        n, width = one.shape
        stacked = one.new_empty((experts, n, count, width), dtype=torch.uint8)
        for at, tensors in enumerate(parts):
            for expert in range(experts):
                stacked[expert, :, at] = tensors[expert].view(torch.uint8)
                tensors[expert] = None  # its memory is not needed any longer
        stacked = stacked.view(experts, n * count, width)
        if self.is_blocks:
            return {full_layer_name: stacked.unflatten(2, (-1, BYTES_PER_BLOCK))}
        if nan := count_nan(stacked):
            self._nan_blocks[full_layer_name] = nan
        return {full_layer_name: stacked}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitExperts(self.is_blocks, self.dtype)


class InterleaveExperts(StackExperts):
    """The conversion of a layer's stacked bytes, of gates and then of ups, to `PackedExperts`'."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, **_: Any
    ) -> dict[str, Tensor]:
        stacked = _only(input_dict.popitem()[1])
        halves = 2 if ".gate_up_proj_" in full_layer_name else 1
        parts = [list(part) for part in stacked.chunk(halves, 1)]
        return self._stacked(parts, full_layer_name)

    @property
    def reverse_op(self) -> ConversionOps:
        return SeparateHalves(self.is_blocks, self.dtype)


class SplitExperts(ConversionOps):
    """The inverse of `StackExperts`, for ``save_pretrained``."""

    def __init__(self, is_blocks: bool, dtype: torch.dtype) -> None:
        self.is_blocks, self.dtype = is_blocks, dtype

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        target_patterns: list[str],
        full_layer_name: str,
        **_: Any,
    ) -> dict[str, Tensor]:
        (stacked,) = (_only(tensors) for tensors in input_dict.values())
        stacked = stacked.detach().view(self.dtype)
        if self.is_blocks:
            stacked = stacked.flatten(2)
        parts = stacked.unflatten(1, (-1, len(target_patterns))).unbind(2)
        found = {}
        for pattern, part in zip(target_patterns, parts, strict=True):
            name = full_layer_name.replace(target_patterns[0], pattern)
            for expert in range(stacked.shape[0]):
                found[name.replace("*", str(expert))] = part[expert].contiguous()
        return found


class SeparateHalves(SplitExperts):
    """The inverse of `InterleaveExperts`."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        target_patterns: list[str],
        full_layer_name: str,
        **_: Any,
    ) -> dict[str, Tensor]:
        ((source, tensors),) = input_dict.items()
        stacked = _only(tensors).detach().view(self.dtype)
        if self.is_blocks:
            stacked = stacked.flatten(2)
        halves = 2 if "gate_up_proj" in source else 1
        separate = stacked.unflatten(1, (-1, halves)).transpose(1, 2).flatten(1, 2)
        return {full_layer_name: separate.contiguous()}


class DequantizeWeights(ConversionOps):
    """The conversion of packed matrices that are no experts' to the parameters' dtype.

    The loader has cast bytes and scales to it, which holds them exactly.
    """

    def __init__(
        self, encoding: Encoding, names: tuple[str, str], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        self.encoding = encoding
        self.blocks, self.scales = names  # last parts of names
        self.dtypes = dtypes  # of parameters that are declared in another dtype while they load

    def __deepcopy__(self, memo: dict[int, Any]) -> DequantizeWeights:
        return self

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        source_patterns: list[str],
        full_layer_name: str,
        model: Any,
        **_: Any,
    ) -> dict[str, Any]:
        return {"weight": self._dense(input_dict, self.blocks, self.scales, full_layer_name, model)}

    def _dense(
        self, found: dict[str, Any], blocks: str, scales: str, name: str, model: Any
    ) -> Tensor:
        """Return the one matrix whose parts have two patterns, in the dtype of a parameter."""
        dtype = self.dtypes.get(name, model.get_parameter(name).dtype)
        return self.encoding.to_dense(_only(found.pop(blocks)), _only(found.pop(scales)), dtype)


class ConvertDequantized(DequantizeWeights):
    """The same, and then a family's own conversion of the dense matrices.

    Of each source of that conversion there are two, blocks and scales, one behind the other.
    """

    supports_many_to_many = True

    def __init__(
        self,
        encoding: Encoding,
        names: tuple[str, str],
        dtypes: Mapping[str, torch.dtype],
        conversion: WeightConverter,
    ) -> None:
        super().__init__(encoding, names, dtypes)
        self.conversion = conversion

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        source_patterns: list[str],
        full_layer_name: str,
        model: Any,
        **_: Any,
    ) -> dict[str, Any]:
        conversion = copy.deepcopy(self.conversion)
        pairs = zip(source_patterns[::2], source_patterns[1::2], strict=True)
        for pattern, (blocks, scales) in zip(conversion.source_patterns, pairs, strict=True):
            matrix = self._dense(input_dict, blocks, scales, full_layer_name, model)
            conversion.add_tensor(full_layer_name, pattern, pattern, matrix)
        made: dict[str, Any] = conversion.convert(full_layer_name, model=model, config=model.config)
        return made
