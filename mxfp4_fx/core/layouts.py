"""Layouts: the orders in which kernels read the MXFP4 bytes of an expert.

A layout is an invertible pair. ``swizzle`` turns checkpoint order (``blocks`` [N, K/32, 16] and
``scales`` [N, K/32] of one expert) into the kernels' order; ``unswizzle`` turns it back. Experts
do not depend on one another, so weights are swizzled one expert at a time, in bounded memory.

To add one: subclass :class:`Layout`, enter it in :data:`LAYOUTS`, let ``target.choose`` name it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, E8M0_BIAS, E8M0_NAN, pack, unpack

CHECKPOINT_ORDER = "row_major"
MXFP8_ROWS = "mxfp8_rows"


class Layout(ABC):
    """An invertible order of one expert's bytes. Shape letters: N output rows, K contraction."""

    name: str

    @abstractmethod
    def shapes(self, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes (blocks, scales) of one swizzled expert; both are uint8."""

    @abstractmethod
    def swizzle(self, blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Reorder [N, K/32, 16] and [N, K/32] from checkpoint order to ``shapes(N, K)``."""

    @abstractmethod
    def unswizzle(self, blocks: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        """Invert :meth:`swizzle`."""

    def extremes(self, scales: Tensor) -> Tensor | None:
        """Return the flags in swizzled ``scales`` of one or more experts: nonzero if extreme.

        A layout says what is extreme; NaN, 255, always is. None: this one has no flags.
        """
        return None

    def empty(self, e: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Allocate ``e`` swizzled experts: ``shapes(n, k)`` behind a leading expert axis."""
        blocks, scales = self.shapes(n, k)
        return (
            torch.empty((e, *blocks), dtype=torch.uint8, device=device),
            torch.empty((e, *scales), dtype=torch.uint8, device=device),
        )


class RowMajor(Layout):
    """Checkpoint order, which plain PyTorch reads."""

    name = CHECKPOINT_ORDER

    def shapes(self, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (n, k // BLOCK, BYTES_PER_BLOCK), (n, k // BLOCK)

    def swizzle(self, blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return blocks, scales

    def unswizzle(self, blocks: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        return blocks, scales


class CpuPanels(Layout):
    """The layout of the CPU's C++ kernels; ``ops/cpu_kernels/panels.h`` describes every byte.

    A panel is 32 rows, stored as a stream of Q pairs of blocks: [P, Q, 1088]. In a pair the scales
    come first. The second tensor holds a flag per panel: 1 if a scale byte is outside ``SCALES``.
    """

    name = "cpu_panels"

    ROWS, LANES = 32, 16  # of a panel: row 2 r + h is lane r of half h
    DWORDS = BYTES_PER_BLOCK // 4  # of a row in a block; each holds eight codes
    PAIR_SCALES = 2 * ROWS  # the bytes of scales at the beginning of a pair of blocks
    SCALES = (2, 252)  # the smallest and the largest under which weights are normal in bfloat16

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

    def extremes(self, scales: Tensor) -> Tensor:
        return scales


class Fragments(Layout):
    """Tiles of 16 rows and 64 columns (K), in the register order of NVIDIA's matrix instructions.

    Lane 4 g + t of a warp reads four adjacent words of 32 bits: 512 bytes a tile. A word holds
    eight codes, four in each half, and becomes four registers of an operand. Each register takes
    one code from each half. ``ops/triton_kernels/decode.py`` does this. Row 8 r + g of a tile is
    the matrix's row 2 g + r, so that one thread gets both gate and up of a SwiGLU. There is no
    padding where N is a multiple of 16 and K of 64.

    Scales are stored tile by tile, too, as bytes in the order (g, kb, r). Each byte has 126 added,
    modulo 256: a code at its place in a bfloat16 lacks a factor 2^126, which the biased scale
    supplies. A scale above ``LARGEST_SCALE`` cannot supply it. So one more tile of bytes holds
    flags: all are 1 if a scale of these 16 rows is that large, and the kernel then decodes these
    rows in a slower, exact way.
    """

    ROWS, COLUMNS = 16, 64
    TILE_BYTES, TILE_SCALES = ROWS * COLUMNS // 2, ROWS * COLUMNS // BLOCK
    STORED_BIAS = 126
    LARGEST_SCALE = 254 - STORED_BIAS  # above it the sum is not the exponent of a finite bfloat16

    # Axes of a tile's K, and the order in which codes are stored: [..., half of a word, register].
    _k_axes: tuple[int, ...]
    _order: tuple[int, ...]

    def shapes(self, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        n_tiles, k_tiles = -(-n // self.ROWS), -(-k // self.COLUMNS)
        return (n_tiles, k_tiles, self.TILE_BYTES), (n_tiles, k_tiles + 1, self.TILE_SCALES)

    def swizzle(self, blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        n, groups = scales.shape
        (n_tiles, k_tiles, _), _ = self.shapes(n, groups * BLOCK)
        missing = (0, 2 * k_tiles - groups, 0, n_tiles * self.ROWS - n)
        codes = unpack(pad(blocks, (0, 0, *missing)).flatten(1))
        codes = codes.view(n_tiles, 8, 2, k_tiles, *self._k_axes).permute(self._order)
        words = _interleave(codes.reshape(n_tiles, k_tiles, self.TILE_BYTES // 2, 4))
        rows = pad(scales, missing, value=E8M0_BIAS).view(n_tiles, 8, 2, k_tiles, 2)
        rows = rows.permute(0, 3, 1, 4, 2).reshape(n_tiles, k_tiles, self.TILE_SCALES)
        is_wide = (rows > self.LARGEST_SCALE).flatten(1).any(dim=1).byte()
        flags = is_wide[:, None, None].expand(-1, 1, self.TILE_SCALES)
        return words, torch.cat([rows + self.STORED_BIAS, flags], dim=1)

    def unswizzle(self, blocks: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        n_tiles, k_tiles = -(-n // self.ROWS), -(-k // self.COLUMNS)
        shape = [(n_tiles, 8, 2, k_tiles, *self._k_axes)[axis] for axis in self._order]
        inverse = [self._order.index(axis) for axis in range(len(self._order))]
        codes = _take_apart(blocks).view(shape).permute(inverse)
        codes = codes.reshape(n_tiles * self.ROWS, k_tiles * self.COLUMNS)
        rows = scales[:, :k_tiles].reshape(n_tiles, k_tiles, 8, 2, 2) - self.STORED_BIAS
        rows = rows.permute(0, 2, 4, 1, 3).reshape(n_tiles * self.ROWS, 2 * k_tiles)
        groups = k // BLOCK
        blocks = pack(codes[:n, :k]).view(n, groups, BYTES_PER_BLOCK)
        return blocks, rows[:n, :groups].contiguous()

    def extremes(self, scales: Tensor) -> Tensor:
        return scales[..., -1, :]


class WgmmaFragments(Fragments):
    """The layout for ``wgmma`` (sm_90).

    K = 16 s + 8 a + 2 t + h is in word s, register 2 a + r, half h.
    """

    name = "wgmma_fragments"

    _k_axes = (4, 2, 4, 2)  # s, a, t, h
    _order = (0, 3, 1, 6, 4, 7, 5, 2)  # N tile, K tile, g, t, s, h, a, r


class MmaFragments(Fragments):
    """The layout for ``mma.sync`` (sm_80, 86, 89, 120).

    K = 32 kb + 16 d + 4 t + 2 c + h is in word 2 kb + r, register c + 2 d, half h. A thread's
    activations are then four neighbours.
    """

    name = "mma_fragments"

    _k_axes = (2, 2, 4, 2, 2)  # kb, d, t, c, h
    _order = (0, 3, 1, 6, 4, 2, 8, 5, 7)  # N tile, K tile, g, t, kb, r, h, d, c


class HubStrided(Layout):
    """Checkpoint order transposed, [K/2, N] and [K/32, N] with K contiguous.

    transformers' MXFP4 modules hold it (``StridedLayout`` of the package triton_kernels) on every
    GPU but Hopper's. The bytes of a row are padded to a multiple of ``ALIGNED``.
    """

    name = "hub_strided"

    ALIGNED = 1

    def shapes(self, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (-(-(k // 2) // self.ALIGNED) * self.ALIGNED, n), (k // BLOCK, n)

    def swizzle(self, blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        rows = blocks.flatten(1)
        return pad(rows, (0, -rows.shape[1] % self.ALIGNED)).T, scales.T

    def unswizzle(self, blocks: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        return blocks.T[:, : k // 2].reshape(n, k // BLOCK, BYTES_PER_BLOCK), scales.T

    def empty(self, e: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
        blocks, scales = (
            torch.empty((e, *reversed(shape)), dtype=torch.uint8, device=device).mT
            for shape in self.shapes(n, k)
        )
        return blocks, scales


class HubBlackwell(HubStrided):
    """``BlackwellMXValueLayout`` of newer versions of triton_kernels: rows of whole 128 bytes."""

    name = "hub_blackwell"

    ALIGNED = 128


class HubHopper(HubStrided):
    """``HopperMXValueLayout`` of triton_kernels: [2 K, N/4], with K padded to 64 and N to 16.

    Row n = 16 tile + 8 a + 2 g + s goes with byte 32 q + 8 u + 4 b + t of its K into the words of
    :class:`Fragments`: word (tile, g, q, s, t, u), code 2 b + a, the low nibble in the low half.
    The scales are those of :class:`HubStrided`.
    """

    name = "hub_hopper"

    _axes = (2, 4, 2), (4, 2, 4, 2)  # a, g, s of a tile's rows; u, b, t, nibble of 64 columns
    # tile, g, q, s, t, u, nibble, b, a
    _order = (0, 2, 4, 3, 7, 5, 8, 6, 1)

    def shapes(self, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (-(-k // 64) * 128, -(-n // 16) * 4), (k // BLOCK, n)

    def swizzle(self, blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        n, groups = scales.shape
        (rows, columns), _ = self.shapes(n, groups * BLOCK)
        missing = (0, rows // 4 - groups * BYTES_PER_BLOCK, 0, columns * 4 - n)
        codes = unpack(pad(blocks.flatten(1), missing)).view(self._split(rows, columns))
        words = _interleave(codes.permute(self._order).reshape(columns, rows // 2, 4))
        return words.T, scales.T

    def unswizzle(self, blocks: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        rows, columns = blocks.shape
        split = self._split(rows, columns)
        shape = [split[axis] for axis in self._order]
        inverse = [self._order.index(axis) for axis in range(len(self._order))]
        codes = _take_apart(blocks.T.contiguous()).view(shape).permute(inverse)
        codes = codes.reshape(columns * 4, rows // 2)[:n, :k]
        return pack(codes).view(n, k // BLOCK, BYTES_PER_BLOCK), scales.T

    def _split(self, rows: int, columns: int) -> tuple[int, ...]:
        (of_rows, of_columns) = self._axes
        return (columns // 4, *of_rows, rows // 128, *of_columns)


def _interleave(codes: Tensor) -> Tensor:
    """Interleave the bits of four codes in each half of a word: [.., halves, 4] -> [.., bytes].

    Code 0 has its sign at bit 15 of a half and its other bits at 8:6. Codes 1 and 2 lie 3 and 6
    bits lower. Code 3 fills the gaps: sign at 14, exponent at 11:10, mantissa at 13.
    """
    codes = codes.int()
    halves = torch.zeros(codes.shape[:-1], dtype=torch.int32, device=codes.device)
    for j in range(3):
        code = codes[..., j]
        halves |= ((code >> 3) << 15 | (code & 7) << 6) >> 3 * j
    code = codes[..., 3]
    halves |= (code >> 3) << 14 | (code >> 1 & 3) << 10 | (code & 1) << 13
    # Little-endian, as every GPU is; the host may not be.
    return torch.stack([halves & 255, halves >> 8], dim=-1).byte().flatten(-2)


def _take_apart(data: Tensor) -> Tensor:
    """Invert :func:`_interleave`: [.., bytes] -> [.., halves of words, 4]."""
    low, high = data.int().unflatten(-1, (-1, 2)).unbind(-1)
    halves = low | high << 8
    codes = [(halves << 3 * j) >> 12 & 8 | (halves << 3 * j) >> 6 & 7 for j in range(3)]
    codes.append(halves >> 11 & 8 | halves >> 9 & 6 | halves >> 13 & 1)
    return torch.stack(codes, dim=-1).byte()


def _reorder_nibbles(dwords: Tensor) -> Tensor:
    """Swap codes 1 and 4, and 3 and 6, of each dword: checkpoint order <-> the panels' order."""
    differences = (dwords ^ dwords >> 12) & 0xF0F0
    return dwords ^ differences ^ differences << 12


class Mxfp8Rows(Layout):
    """Rows of MXFP8 (``core/mxfp8.py``), in which its kernels read a weight as it is quantized.

    Codes are [N, K] and scales [N, K/32]. This is no order of MXFP4's bytes: here both arguments of
    ``swizzle`` have these shapes.
    """

    name = MXFP8_ROWS

    def shapes(self, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (n, k), (n, k // BLOCK)

    def swizzle(self, blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return blocks, scales

    def unswizzle(self, blocks: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        return blocks, scales

    def extremes(self, scales: Tensor) -> Tensor:
        return scales == E8M0_NAN


# How modules of transformers hold their weights for the kernels of the hub.
HUB_LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (HubStrided(), HubHopper(), HubBlackwell())
}
LAYOUTS: dict[str, Layout] = {
    **{
        layout.name: layout
        for layout in (RowMajor(), CpuPanels(), WgmmaFragments(), MmaFragments())
    },
    **HUB_LAYOUTS,
}
# All that the store makes: of experts, and of other weights.
STORED_LAYOUTS: dict[str, Layout] = {**LAYOUTS, MXFP8_ROWS: Mxfp8Rows()}
