"""A tensor of a checkpoint that is quantized: copied, or read and rounded one expert at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mxfp4_fx.checkpoints.fused_experts import Fused
from mxfp4_fx.checkpoints.journal import Squares
from mxfp4_fx.checkpoints.safetensors_file import StoredTensor, TensorSpec
from mxfp4_fx.core import formats


class Item(NamedTuple):
    """A tensor of the input, and the tensors to write: its copy, or its blocks and scales.

    Of a fused tensor, it is one expert, and the blocks and scales of each of its matrices.
    """

    source: StoredTensor
    specs: tuple[TensorSpec, ...]
    fused: Fused | None = None
    expert: int = 0

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    @property
    def is_copied(self) -> bool:
        return len(self.specs) == 1

    def parts(
        self, scale_rule: str, squares: Squares | None = None
    ) -> Iterator[tuple[str, memoryview]]:
        """Yield (name, bytes) to write, one expert's blocks and scales at a time.

        The sums of squares of what is quantized are added to `squares`.
        """
        if self.is_copied:
            yield from ((self.source.name, chunk) for chunk in self.source.chunks())
            return
        if self.fused or len(self.source.shape) == 2:  # one expert
            matrices = self.fused.read(self.expert) if self.fused else (self.source.read(),)
            for at, values in enumerate(matrices):
                blocks, scales = formats.quantize(values, scale_rule=scale_rule)
                self._measure(values, blocks, scales, squares)
                specs = self.specs[2 * at : 2 * at + 2]
                for spec, data in zip(specs, (blocks.flatten(1), scales), strict=True):
                    yield spec.name, data.numpy().data
            return
        for expert in range(self.source.shape[0]):
            values = self.source.read(expert).transpose(0, 1)
            packed = formats.quantize(values, scale_rule=scale_rule)
            self._measure(values, *packed, squares)
            for spec, data in zip(self.specs, packed, strict=True):
                yield spec.name, data.numpy().data

    def _measure(
        self, values: Tensor, blocks: Tensor, scales: Tensor, squares: Squares | None
    ) -> None:
        if squares is None:
            return
        experts = self.source.name.partition(".experts.")[0] + ".experts"
        error, value = squares.get(experts, (0.0, 0.0))
        rows = max(1, formats.SLAB_VALUES // values.shape[1])  # the whole in float64 is large
        slabs = zip(values.split(rows), blocks.split(rows), scales.split(rows), strict=True)
        for slab, slab_blocks, slab_scales in slabs:
            wide = slab.double()
            value += float(wide.square().sum())
            back = formats.dequantize(slab_blocks, slab_scales, torch.float32)
            error += float(wide.sub_(back).square_().sum())
        squares[experts] = error, value
