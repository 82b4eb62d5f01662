"""The source of one weight: the model's tensors that hold it, and their encoding.

It is a weight of experts, which is kept in MXFP4, or of a linear, which is kept in MXFP8.

Shape letters: E experts, N output rows, K contraction.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mxfp4_fx.core import mxfp8
from mxfp4_fx.core.errors import WeightError
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, dequantize, quantize
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER, HUB_LAYOUTS, LAYOUTS, MXFP8_ROWS
from mxfp4_fx.core.orders import GPT_OSS, Order

# A weight in MXFP4: blocks and scales, of all experts or of one.
Parts = tuple[Tensor, Tensor]


class Encoding(ABC):
    """How the tensors of a source hold a weight. There is one object of each kind and order.

    To add an encoding: subclass this, and let ``lower_moe`` bind sources of it. Enter a native
    function that fills a layout from it in ``swizzle.NATIVE``.

    Attributes:
        name: the encoding's key in ``swizzle.NATIVE``.
        layouts: the layouts that the tensors have already, or that are views of them.
        of_parameters: whether the tensors are parameters of the model; plain tensors if not.
        of_linears: whether the weight is a linear's: one "expert", kept in MXFP8. Its blocks in
            checkpoint order are then codes [N, K].
    """

    name: str
    layouts: tuple[str, ...] = ()
    of_parameters: bool = True
    of_linears: bool = False

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

    def arranged(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """View the tensors for a native function, with rows behind the axis of E.

        The rows, [E, N, ...], are in the order of the kernels; pairs of rows, [E, I, 2, ...], if
        the weight is concatenated.
        """
        return tensors

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
    """One tensor of float32, bfloat16 or float16, in an order: [E, K, N] or [E, N, K]."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.name = "floats of pairs" if order.is_concatenated else "floats"

    def sizes(self, tensors: tuple[Tensor, ...]) -> tuple[int, int, int]:
        shape = tuple(tensors[0].shape)
        axes = "[E, K, N]" if self.order.is_transposed else "[E, N, K]"
        e, k, n = shape if len(shape) == 3 else (0, 0, 0)
        if not self.order.is_transposed:
            n, k = k, n
        if len(shape) != 3 or k % BLOCK:
            raise WeightError(
                f"expert weights must be {axes} with K a multiple of {BLOCK}; this one is {shape}"
            )
        _check_height(n, self.order)
        return e, n, k

    def arranged(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (weight,) = tensors
        rows = weight.transpose(1, 2) if self.order.is_transposed else weight
        return (_alternating(rows, self.order),)

    def to_mxfp4(self, tensors: tuple[Tensor, ...], expert: int) -> Parts:
        return _in_rows(quantize(self.order.rows_of(tensors[0][expert])), self.order)

    def from_mxfp4(self, parts: Parts, like: Tensor) -> tuple[Tensor, ...]:
        blocks, scales = parts
        weight = torch.empty_strided(
            like.shape, like.stride(), dtype=like.dtype, device=blocks.device
        )
        for expert in range(weight.shape[0]):
            rows = self.order.rows_of(weight[expert])
            one = blocks[expert], scales[expert]
            dequantize(*_like_rows(one, self.order), weight.dtype, out=rows)
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

    def __init__(self, order: Order) -> None:
        self.order = order
        self.name = "mxfp4 of pairs" if order.is_concatenated else "mxfp4"
        self.layouts = () if order.is_concatenated else (CHECKPOINT_ORDER,)

    def sizes(self, tensors: tuple[Tensor, ...]) -> tuple[int, int, int]:
        blocks, scales = (tuple(tensor.shape) for tensor in tensors)
        if len(blocks) != 4 or blocks != (*scales, BYTES_PER_BLOCK):
            raise WeightError(
                f"packed expert weights must be blocks [E, N, K/{BLOCK}, {BYTES_PER_BLOCK}] and "
                f"scales [E, N, K/{BLOCK}]; these are {blocks} and {scales}"
            )
        e, n, groups = scales
        _check_height(n, self.order)
        return e, n, groups * BLOCK

    def arranged(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(_alternating(tensor, self.order) for tensor in tensors)

    def to_mxfp4(self, tensors: tuple[Tensor, ...], expert: int) -> Parts:
        blocks, scales = (self.order.alternating(tensor[expert]) for tensor in tensors)
        return _in_rows((blocks, scales), self.order)

    def from_mxfp4(self, parts: Parts, like: Tensor) -> tuple[Tensor, ...]:
        if not self.order.is_concatenated:
            return parts
        return tuple(part.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) for part in parts)


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


class Linear(Encoding):
    """One tensor [N, K] of float32, bfloat16 or float16: the weight of a linear."""

    name = "linear"
    of_linears = True

    def sizes(self, tensors: tuple[Tensor, ...]) -> tuple[int, int, int]:
        shape = tuple(tensors[0].shape)
        if len(shape) != 2 or shape[1] % BLOCK:
            raise WeightError(
                f"a linear's weight must be [N, K], K a multiple of {BLOCK}; this one is {shape}"
            )
        return 1, *shape

    def arranged(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (tensors[0][None],)

    def to_mxfp4(self, tensors: tuple[Tensor, ...], expert: int) -> Parts:
        return mxfp8.quantize(tensors[0])

    def from_mxfp4(self, parts: Parts, like: Tensor) -> tuple[Tensor, ...]:
        codes, scales = parts
        weight = torch.empty_strided(
            like.shape, like.stride(), dtype=like.dtype, device=codes.device
        )
        return (mxfp8.dequantize(codes[0], scales[0], like.dtype, out=weight),)

    def not_finite(self, tensors: tuple[Tensor, ...]) -> list[int]:
        is_finite = all(part.isfinite().all() for part in tensors[0].detach().split(1 << 10))
        return [] if is_finite else [0]


class Mxfp8(Encoding):
    """A linear's codes [1, N, K] and scales [1, N, K/32], both uint8, as the store keeps them."""

    name = "mxfp8"
    layouts = (MXFP8_ROWS,)
    of_linears = True

    def sizes(self, tensors: tuple[Tensor, ...]) -> tuple[int, int, int]:
        e, n, k = tensors[0].shape
        return e, n, k

    def to_mxfp4(self, tensors: tuple[Tensor, ...], expert: int) -> Parts:
        return tensors[0][expert], tensors[1][expert]

    def from_mxfp4(self, parts: Parts, like: Tensor) -> tuple[Tensor, ...]:
        return parts


def _check_height(n: int, order: Order) -> None:
    if order.is_concatenated and n % 2:
        raise WeightError(f"a weight of gate and up must have an even number of rows; N is {n}")


def _alternating(rows: Tensor, order: Order) -> Tensor:
    """View rows [E, N, ...] in the order of the kernels, as pairs if concatenated."""
    return rows.unflatten(1, (2, -1)).transpose(1, 2) if order.is_concatenated else rows


def _in_rows(parts: Parts, order: Order) -> Parts:
    """Return one expert's parts [N, ...], of pairs of rows [I, 2, ...] if concatenated."""
    blocks, scales = parts
    return (blocks.flatten(0, 1), scales.flatten(0, 1)) if order.is_concatenated else parts


def _like_rows(parts: Parts, order: Order) -> Parts:
    """Undo :func:`_in_rows`."""
    blocks, scales = parts
    if not order.is_concatenated:
        return parts
    return blocks.unflatten(0, (-1, 2)), scales.unflatten(0, (-1, 2))


_ORDERS = tuple(Order(*order) for order in itertools.product((True, False), repeat=2))
_FLOATS = {order: Floats(order) for order in _ORDERS}
FLOATS, MXFP4 = _FLOATS[GPT_OSS], Mxfp4(GPT_OSS)
LINEAR, MXFP8 = Linear(), Mxfp8()
_CONCATENATED = Mxfp4(Order(is_concatenated=True))
_SWIZZLED = {layout: Swizzled(layout) for layout in HUB_LAYOUTS}


def encoding_of(order: Order, layout: str | None = None) -> Encoding:
    """Return how a model's tensors hold a weight.

    Args:
        order: the order of the weight; packed weights have an order of their rows only.
        layout: the layout in which the model holds a packed weight, or None for floats.
    """
    if layout is None:
        return _FLOATS[order]
    if layout == CHECKPOINT_ORDER:
        return _CONCATENATED if order.is_concatenated else MXFP4
    return _SWIZZLED[layout]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Source:
    """The tensors of a model that hold one weight.

    Attributes:
        tensors: in the order of the encoding.
        encoding: how they hold the weight.
    """

    tensors: tuple[Tensor, ...]
    encoding: Encoding
