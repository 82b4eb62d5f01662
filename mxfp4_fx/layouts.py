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
from torch.nn.functional import pad

from mxfp4_fx.formats import BLOCK, BYTES_PER_BLOCK, E8M0_BIAS


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


class CpuPanels(Layout):
    """What the CPU's C++ kernels read; ``ops/cpu/panels.h`` describes it byte by byte.

    Panels of 32 rows, a stream of pairs of blocks each: [P, Q, 1088], scales first. The second
    tensor holds a flag a panel, 1 if a scale byte is outside ``SCALES``.
    """

    name = "cpu_panels"

    ROWS, LANES = 32, 16  # of a panel: row 2 r + h is lane r of half h
    DWORDS = BYTES_PER_BLOCK // 4  # of a row in a block, eight codes each
    PAIR_SCALES = 2 * ROWS  # bytes that a pair of blocks begins with
    SCALES = (2, 252)  # the smallest and the largest that makes normal bfloat16 numbers

    def shapes(self, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        panels, pairs = -(-n // self.ROWS), -(-k // (2 * BLOCK))
        pair_bytes = self.PAIR_SCALES + 2 * self.ROWS * BYTES_PER_BLOCK
        return (panels, pairs, pair_bytes), (panels,)

    def swizzle(self, blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        n, groups = scales.shape
        (panels, pairs, _), _ = self.shapes(n, groups * BLOCK)
        missing = (0, 2 * pairs - groups, 0, panels * self.ROWS - n)
        dwords = pad(blocks, (0, 0, *missing)).view(torch.int32)
        dwords = dwords.view(panels, self.LANES, 2, pairs, 2, self.DWORDS).permute(0, 3, 4, 2, 5, 1)
        codes = _reorder_nibbles(dwords.contiguous()).flatten(2).view(torch.uint8)
        rows = pad(scales, missing, value=E8M0_BIAS).view(panels, self.LANES, 2, pairs, 2)
        rows = rows.permute(0, 3, 4, 2, 1).flatten(2)
        outside = (rows < self.SCALES[0]) | (rows > self.SCALES[1])
        return torch.cat([rows, codes], dim=-1), outside.flatten(1).any(dim=1).byte()

    def unswizzle(self, blocks: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        (panels, pairs, pair_bytes), _ = self.shapes(n, k)
        size = [self.PAIR_SCALES, pair_bytes - self.PAIR_SCALES]
        rows, codes = blocks.split(size, dim=-1)
        dwords = codes.contiguous().view(torch.int32)
        dwords = dwords.view(panels, pairs, 2, 2, self.DWORDS, self.LANES).permute(0, 5, 3, 1, 2, 4)
        dwords = dwords.reshape(panels * self.ROWS, 2 * pairs, self.DWORDS)
        rows = rows.reshape(panels, pairs, 2, 2, self.LANES).permute(0, 4, 3, 1, 2)
        rows = rows.reshape(panels * self.ROWS, 2 * pairs)
        groups = k // BLOCK
        dwords = _reorder_nibbles(dwords[:n, :groups].contiguous())
        return dwords.view(torch.uint8), rows[:n, :groups].contiguous()


def _reorder_nibbles(dwords: Tensor) -> Tensor:
    """Eight codes of a row: checkpoint order <-> that of panels, where 1 and 4, 3 and 6 swap."""
    differences = (dwords ^ dwords >> 12) & 0xF0F0
    return dwords ^ differences ^ differences << 12


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (RowMajor(), CpuPanels())}
