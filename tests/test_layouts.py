"""Every layout is an invertible pair whose shapes are known without the values."""

from __future__ import annotations

import pytest
import torch

from mxfp4_fx.layouts import LAYOUTS
from mxfp4_fx.weights import swizzle_weight

# Panels and pairs of blocks that are full, partly filled, and none.
SIZES = [(64, 128), (48, 96), (33, 160), (31, 64), (5, 32), (1, 64), (0, 32)]


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_unswizzle_undoes_swizzle(name: str, n: int, k: int) -> None:
    blocks = torch.randint(0, 256, (n, k // 32, 16), dtype=torch.uint8)
    scales = torch.randint(0, 256, (n, k // 32), dtype=torch.uint8)
    scales.view(-1)[:256] = torch.arange(256)[: scales.numel()]
    layout = LAYOUTS[name]
    back = layout.unswizzle(*layout.swizzle(blocks, scales), n, k)
    assert torch.equal(back[0], blocks)
    assert torch.equal(back[1], scales)


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_shapes_are_those_that_come_out(name: str, n: int, k: int) -> None:
    layout = LAYOUTS[name]
    blocks = torch.empty((n, k // 32, 16), dtype=torch.uint8, device="meta")
    scales = torch.empty((n, k // 32), dtype=torch.uint8, device="meta")
    assert tuple(part.shape for part in layout.swizzle(blocks, scales)) == layout.shapes(n, k)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_whole_weight_has_the_experts_in_front(name: str) -> None:
    parts = swizzle_weight(torch.randn(3, 64, 10), name)
    assert tuple(part.shape[1:] for part in parts) == LAYOUTS[name].shapes(10, 64)
    assert {part.shape[0] for part in parts} == {3}
    assert all(LAYOUTS[name].name == name for name in LAYOUTS)


# ---- cpu_panels, from the words of ops/cpu/panels.h


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_the_bytes_of_a_panel_lie_as_the_kernels_read_them(n: int, k: int) -> None:
    blocks = torch.randint(0, 256, (n, k // 32, 16), dtype=torch.uint8)
    scales = torch.randint(0, 256, (n, k // 32), dtype=torch.uint8)
    panels, _ = LAYOUTS["cpu_panels"].swizzle(blocks, scales)
    assert panels.tolist() == expected_panels(blocks.tolist(), scales.tolist(), k // 32)


def expected_panels(
    blocks: list[list[list[int]]], scales: list[list[int]], groups: int
) -> list[list[list[int]]]:
    """[P][Q][1088] by a loop over all that a panel has room for."""
    n = len(scales)

    def code(row: int, block: int, k: int) -> int:
        if row >= n or block >= groups:
            return 0
        byte = blocks[row][block][k // 2]
        return byte >> 4 if k % 2 else byte & 15

    def pair(panel: int, first: int) -> list[int]:
        data = [0] * 1088
        for b in range(2):
            for h in range(2):
                for r in range(16):
                    row, block = 32 * panel + 2 * r + h, first + b
                    there = row < n and block < groups
                    data[32 * b + 16 * h + r] = scales[row][block] if there else 127
                    for g in range(4):
                        for j, first_k in enumerate((0, 2, 1, 3)):
                            low = code(row, block, 8 * g + first_k)
                            high = code(row, block, 8 * g + 4 + first_k)
                            at = 64 + 512 * b + 256 * h + 64 * g + 4 * r + j
                            data[at] = low | high << 4
        return data

    return [[pair(p, q) for q in range(0, groups, 2)] for p in range((n + 31) // 32)]


@pytest.mark.parametrize("scale", [0, 1, 2, 127, 252, 253, 255])
def test_a_panel_is_flagged_if_a_scale_makes_no_normal_bfloat16(scale: int) -> None:
    blocks = torch.zeros((65, 3, 16), dtype=torch.uint8)
    scales = torch.full((65, 3), 127, dtype=torch.uint8)
    scales[40, 2] = scale
    _, flags = LAYOUTS["cpu_panels"].swizzle(blocks, scales)
    assert flags.tolist() == [0, int(scale not in range(2, 253)), 0]
