"""Layouts: the order in which a target's kernels want the MXFP4 bytes of an expert.

A layout is an invertible pair. ``swizzle`` turns checkpoint order (``blocks`` [N, K/32, 16] and
``scales`` [N, K/32] of one expert) into the kernels' order, ``unswizzle`` turns it back. Experts
are independent of one another: weights are swizzled one expert at a time, in bounded memory.

To add one: subclass :class:`Layout`, enter it in :data:`LAYOUTS`, let ``target.choose`` name it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mxfp4_fx.formats import BLOCK, BYTES_PER_BLOCK


class Layout(ABC):
    """An invertible order of one expert's bytes. Shape letters: N output rows, K contraction."""

    name: str

    @abstractmethod
    def shapes(self, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes (blocks, scales) of one swizzled expert; both are uint8."""

    @abstractmethod
    def swizzle(self, blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """[N, K/32, 16] and [N, K/32] in checkpoint order -> tensors of ``shapes(N, K)``."""

    @abstractmethod
    def unswizzle(self, blocks: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`swizzle`."""

    def empty(self, e: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Room for ``e`` swizzled experts: ``shapes(n, k)`` behind a leading expert axis."""
        blocks, scales = self.shapes(n, k)
        return (
            torch.empty((e, *blocks), dtype=torch.uint8, device=device),
            torch.empty((e, *scales), dtype=torch.uint8, device=device),
        )


class RowMajor(Layout):
    """Checkpoint order as it is: what plain PyTorch reads."""

    name = "row_major"

    def shapes(self, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (n, k // BLOCK, BYTES_PER_BLOCK), (n, k // BLOCK)

    def swizzle(self, blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return blocks, scales

    def unswizzle(self, blocks: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        return blocks, scales


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (RowMajor(),)}
