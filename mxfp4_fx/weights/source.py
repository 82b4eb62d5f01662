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
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER, HUB_LAYOUTS, LAYOUTS

# A weight in MXFP4: blocks and scales, of all experts or of one.
Parts = tuple[Tensor, Tensor]


class Encoding(ABC):
    """How the tensors of a source hold a weight. Each subclass has one object.

    To add an encoding: subclass this, and let ``lower_moe`` bind sources of it. Enter a native
    function that fills a layout from it in ``swizzle.NATIVE``.

    Attributes:
        name: the encoding's key in ``swizzle.NATIVE``.
        layouts: the layouts that the tensors have already, or that are views of them.
        of_parameters: whether the tensors are parameters of the model; plain tensors if not.
    """

    name: str
    layouts: tuple[str, ...] = ()
    of_parameters: bool = True

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

    def view(self, tensors: tuple[Tensor, ...], layout: str) -> Parts:
        """Return the weight in one of ``layouts``, in the memory of the tensors."""
        blocks, scales = tensors
        return blocks, scales

    def not_finite(self, tensors: tuple[Tensor, ...]) -> list[int]:
        """Return the experts with infinite or NaN elements, which MXFP4 cannot represent.

        Weights in MXFP4 have none; their NaN are the checkpoint's own.
        """
        return []


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
    layouts = (CHECKPOINT_ORDER,)

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


class Swizzled(Encoding):
    """Blocks and scales in a layout of the package triton_kernels.

    transformers' own MXFP4 modules hold them as plain tensors, not as parameters.
    """

    of_parameters = False

    def __init__(self, layout: str) -> None:
        self.name = layout
        # Checkpoint order is a transposed view of the strided one.
        self.layouts = (layout, CHECKPOINT_ORDER) if layout == "hub_strided" else (layout,)

    def sizes(self, tensors: tuple[Tensor, ...]) -> tuple[int, int, int]:
        blocks, scales = (tuple(tensor.shape) for tensor in tensors)
        e, groups, n = scales if len(scales) == 3 else (0, 0, 0)
        wanted, _ = LAYOUTS[self.name].shapes(n, groups * BLOCK)
        if len(scales) != 3 or blocks != (e, *wanted):
            raise WeightError(
                f"expert weights in layout {self.name!r} must be scales [E, K/{BLOCK}, N] and "
                f"blocks that fit them; these are {scales} and {blocks}"
            )
        return e, n, groups * BLOCK

    def to_mxfp4(self, tensors: tuple[Tensor, ...], expert: int) -> Parts:
        _, n, k = self.sizes(tensors)
        blocks, scales = tensors
        return LAYOUTS[self.name].unswizzle(blocks[expert], scales[expert], n, k)

    def from_mxfp4(self, parts: Parts, like: Tensor) -> tuple[Tensor, ...]:
        e, n, groups = parts[1].shape
        held = LAYOUTS[self.name].empty(e, n, groups * BLOCK, parts[0].device)
        for expert in range(e):
            one = LAYOUTS[self.name].swizzle(parts[0][expert], parts[1][expert])
            for room, part in zip(held, one, strict=True):
                room[expert].copy_(part)
        return held

    def view(self, tensors: tuple[Tensor, ...], layout: str) -> Parts:
        blocks, scales = super().view(tensors, layout)
        if layout == self.name:
            return blocks, scales
        return blocks.mT.unflatten(2, (-1, BYTES_PER_BLOCK)), scales.mT


FLOATS, MXFP4 = Floats(), Mxfp4()
# The layout in which a model holds a packed weight -> the encoding.
PACKED: dict[str, Encoding] = {
    CHECKPOINT_ORDER: MXFP4,
    **{layout: Swizzled(layout) for layout in HUB_LAYOUTS},
}


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Source:
    """The tensors of a model that hold one expert weight.

    Attributes:
        tensors: in the order of the encoding.
        encoding: how they hold the weight.
    """

    tensors: tuple[Tensor, ...]
    encoding: Encoding
