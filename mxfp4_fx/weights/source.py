"""The source of one expert weight: the model's tensors that hold it, and their encoding.

Shape letters: E experts, N output rows, K contraction.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mxfp4_fx.core.errors import WeightError
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, dequantize, quantize
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER

# A weight in MXFP4: blocks and scales, of all experts or of one.
Parts = tuple[Tensor, Tensor]


class Encoding(ABC):
    """How the tensors of a source hold a weight. Each subclass has one object.

    To add an encoding: subclass this, and let ``lower_moe`` bind sources of it. Enter a native
    function that fills a layout from it in ``swizzle.NATIVE``.

    Attributes:
        name: the encoding's key in ``swizzle.NATIVE``.
        layout: the layout in which the tensors are already, or None.
    """

    name: str
    layout: str | None = None

    @abstractmethod
    def sizes(self, tensors: tuple[Tensor, ...]) -> tuple[int, int, int]:
        """Return (E, N, K).

        Raises:
            WeightError: the tensors' shapes do not fit the encoding.
        """

    @abstractmethod
    def to_mxfp4(self, tensors: tuple[Tensor, ...], expert: int) -> Parts:
        """Return one expert's blocks [N, K/32, 16] and scales [N, K/32] in checkpoint order."""

    @abstractmethod
    def from_mxfp4(self, parts: Parts, like: Tensor) -> tuple[Tensor, ...]:
        """Return tensors in this encoding, on the device of ``parts``.

        Args:
            parts: blocks [E, N, K/32, 16] and scales [E, N, K/32] in checkpoint order.
            like: a weight of floats gets the shape, strides and dtype of this tensor.
        """

    @abstractmethod
    def not_finite(self, tensors: tuple[Tensor, ...]) -> list[int]:
        """Return the experts with infinite or NaN elements, which MXFP4 cannot represent."""


class Floats(Encoding):
    """One tensor [E, K, N] of float32, bfloat16 or float16, as transformers holds it."""

    name = "floats"

    def sizes(self, tensors: tuple[Tensor, ...]) -> tuple[int, int, int]:
        shape = tuple(tensors[0].shape)
        if len(shape) != 3 or shape[1] % BLOCK:
            raise WeightError(
                f"expert weights must be [E, K, N] with K a multiple of {BLOCK}; this one is "
                f"{shape}"
            )
        e, k, n = shape
        return e, n, k

    def to_mxfp4(self, tensors: tuple[Tensor, ...], expert: int) -> Parts:
        return quantize(tensors[0][expert].T)

    def from_mxfp4(self, parts: Parts, like: Tensor) -> tuple[Tensor, ...]:
        blocks, scales = parts
        weight = torch.empty_strided(
            like.shape, like.stride(), dtype=like.dtype, device=blocks.device
        )
        for expert in range(weight.shape[0]):
            dequantize(blocks[expert], scales[expert], weight.dtype, out=weight[expert].T)
        return (weight,)

    def not_finite(self, tensors: tuple[Tensor, ...]) -> list[int]:
        weight = tensors[0].detach()
        ends = [torch.stack(torch.aminmax(expert)) for expert in weight if expert.numel()]
        if not ends:
            return []
        found: list[int] = (~torch.stack(ends).isfinite().all(dim=1)).nonzero().flatten().tolist()
        return found


class Mxfp4(Encoding):
    """Blocks [E, N, K/32, 16] and scales [E, N, K/32], both uint8, in checkpoint order."""

    name = "mxfp4"
    layout = CHECKPOINT_ORDER

    def sizes(self, tensors: tuple[Tensor, ...]) -> tuple[int, int, int]:
        blocks, scales = (tuple(tensor.shape) for tensor in tensors)
        if len(blocks) != 4 or blocks != (*scales, BYTES_PER_BLOCK):
            raise WeightError(
                f"packed expert weights must be blocks [E, N, K/{BLOCK}, {BYTES_PER_BLOCK}] and "
                f"scales [E, N, K/{BLOCK}]; these are {blocks} and {scales}"
            )
        e, n, groups = scales
        return e, n, groups * BLOCK

    def to_mxfp4(self, tensors: tuple[Tensor, ...], expert: int) -> Parts:
        blocks, scales = tensors
        return blocks[expert], scales[expert]

    def from_mxfp4(self, parts: Parts, like: Tensor) -> tuple[Tensor, ...]:
        return parts

    def not_finite(self, tensors: tuple[Tensor, ...]) -> list[int]:
        return []  # its NaN are the checkpoint's own


FLOATS, MXFP4 = Floats(), Mxfp4()


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Source:
    """The tensors of a model that hold one expert weight.

    Attributes:
        tensors: parameters as a rule, in the order of the encoding.
        encoding: how they hold the weight.
    """

    tensors: tuple[Tensor, ...]
    encoding: Encoding
