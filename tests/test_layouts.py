"""Every layout is an invertible pair whose shapes are known without the values."""

from __future__ import annotations

import importlib
import itertools
import os

import pytest
import torch

from mxfp4_fx.core.layouts import HUB_LAYOUTS, LAYOUTS
from mxfp4_fx.weights.source import FLOATS, MXFP4, Source
from mxfp4_fx.weights.swizzle import swizzle_weight

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
    parts = swizzle_weight(Source((torch.randn(3, 64, 10),), FLOATS), name)
    assert tuple(part.shape[1:] for part in parts) == LAYOUTS[name].shapes(10, 64)
    assert {part.shape[0] for part in parts} == {3}
    assert all(LAYOUTS[name].name == name for name in LAYOUTS)


# ---- cpu_panels, from the words of ops/cpu_kernels/panels.h


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


# ---- fragments, from the words of layouts.Fragments


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("name", ["wgmma_fragments", "mma_fragments"])
def test_the_bytes_of_a_fragment_lie_as_a_matrix_instruction_reads_them(
    name: str, n: int, k: int
) -> None:
    blocks = torch.randint(0, 256, (n, k // 32, 16), dtype=torch.uint8)
    scales = torch.randint(0, 129, (n, k // 32), dtype=torch.uint8)
    tiles, _ = LAYOUTS[name].swizzle(blocks, scales)
    assert tiles.tolist() == expected_fragments(name, blocks.flatten(1).tolist(), n, k)


def expected_fragments(name: str, rows: list[list[int]], n: int, k: int) -> list[list[list[int]]]:
    """[N tiles][K tiles][512] by a loop over the operand of an instruction, PTX ISA's figures.

    Of m16n8k16's and wgmma's left operand, register j of lane 4 g + t holds row g + 8 (j % 2) and
    columns 2 t + h + 8 (j // 2). With mma.sync a lane takes columns that are four neighbours.
    """

    def code(row: int, column: int) -> int:
        if row >= n or column >= k:
            return 0
        byte = rows[row][column // 2]
        return byte >> 4 if column % 2 else byte & 15

    def half(codes: list[int]) -> int:
        bits = 0
        for j, value in enumerate(codes):
            sign, exponent, mantissa = value >> 3, value >> 1 & 3, value & 1
            if j < 3:
                bits |= (sign << 15 | exponent << 7 | mantissa << 6) >> 3 * j
            else:
                bits |= sign << 14 | exponent << 10 | mantissa << 13
        return bits

    def tile(row_tile: int, column_tile: int) -> list[int]:
        data: list[int] = []
        for g, t, word, h in itertools.product(range(8), range(4), range(4), range(2)):
            codes = []
            for j in range(4):
                if name == "wgmma_fragments":
                    r, column = j % 2, 16 * word + 8 * (j // 2) + 2 * t + h
                else:
                    r, column = word % 2, 32 * (word // 2) + 16 * (j // 2) + 4 * t + 2 * (j % 2) + h
                codes.append(code(16 * row_tile + 2 * g + r, 64 * column_tile + column))
            bits = half(codes)
            data += [bits & 255, bits >> 8]
        return data

    return [[tile(i, j) for j in range(-(-k // 64))] for i in range(-(-n // 16))]


@pytest.mark.parametrize("name", ["wgmma_fragments", "mma_fragments"])
def test_scales_of_a_fragment_lie_beside_it_126_higher(name: str) -> None:
    n, groups = 33, 3
    scales = torch.randint(0, 129, (n, groups), dtype=torch.uint8)
    _, stored = LAYOUTS[name].swizzle(torch.zeros((n, groups, 16), dtype=torch.uint8), scales)
    for i, j, g, kb, r in itertools.product(range(3), range(2), range(8), range(2), range(2)):
        row, block = 16 * i + 2 * g + r, 2 * j + kb
        scale = int(scales[row, block]) if row < n and block < groups else 127
        assert stored[i, j, 4 * g + 2 * kb + r] == scale + 126


@pytest.mark.parametrize("scale", [0, 128, 129, 255])
@pytest.mark.parametrize("name", ["wgmma_fragments", "mma_fragments"])
def test_rows_are_flagged_if_a_scale_is_too_large_for_them(name: str, scale: int) -> None:
    scales = torch.full((65, 3), 127, dtype=torch.uint8)
    scales[40, 2] = scale
    _, stored = LAYOUTS[name].swizzle(torch.zeros((65, 3, 16), dtype=torch.uint8), scales)
    assert stored[:, -1].tolist() == [[int(i == 2 and scale > 128)] * 32 for i in range(5)]


# ---- as transformers' MXFP4 modules hold weights, from the words of layouts.HubStrided and others


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("name", HUB_LAYOUTS)
def test_the_bytes_of_a_hub_layout_lie_as_its_kernels_read_them(name: str, n: int, k: int) -> None:
    blocks = torch.randint(0, 256, (n, k // 32, 16), dtype=torch.uint8)
    scales = torch.randint(0, 256, (n, k // 32), dtype=torch.uint8)
    codes, held = LAYOUTS[name].swizzle(blocks, scales)
    assert torch.equal(held, scales.T)
    assert codes.tolist() == expected_of_hub(name, blocks.flatten(1).tolist(), n, k)


def expected_of_hub(name: str, rows: list[list[int]], n: int, k: int) -> list[list[int]]:
    """[bytes along K][columns] by a loop over all that the layout has room for."""

    def byte(row: int, at: int) -> int:
        return rows[row][at] if row < n and at < k // 2 else 0

    if name != "hub_hopper":
        height = -(-k // 256) * 128 if name == "hub_blackwell" else k // 2
        return [[byte(row, at) for row in range(n)] for at in range(height)]
    columns, height = -(-n // 16) * 4, -(-k // 64) * 128
    data = [[0] * columns for _ in range(height)]
    for tile, g in itertools.product(range(columns // 4), range(4)):
        for word, (q, s, t, u) in enumerate(
            itertools.product(range(height // 128), range(2), range(4), range(4))
        ):
            # One word: four bytes of checkpoint order; the low nibbles lie in its low half.
            four = [
                byte(16 * tile + 8 * a + 2 * g + s, 32 * q + 8 * u + 4 * b + t)
                for b, a in itertools.product(range(2), range(2))
            ]
            halves = [interleaved([part >> shift & 15 for part in four]) for shift in (0, 4)]
            for at, half in enumerate(halves):
                data[4 * word + 2 * at][4 * tile + g] = half & 255
                data[4 * word + 2 * at + 1][4 * tile + g] = half >> 8
    return data


def interleaved(codes: list[int]) -> int:
    """The half of a word that holds four codes, bit by bit."""
    places = [(6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (13, 10, 11, 14)]
    bits = [(codes[c] >> b & 1) << at for c in range(4) for b, at in enumerate(places[c])]
    return sum(bits)


@pytest.mark.skipif(
    "MXFP4_FX_TRITON_KERNELS" not in os.environ,
    reason="MXFP4_FX_TRITON_KERNELS names the folder that triton_kernels is in",
)
@pytest.mark.parametrize(("n", "k"), [(n, k) for n, k in SIZES if n])
def test_hub_layouts_are_those_of_the_real_package(
    n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(os.environ["MXFP4_FX_TRITON_KERNELS"])
    tensor = importlib.import_module("triton_kernels.tensor")
    order = importlib.import_module("triton_kernels.tensor_details.layout")
    blocks = torch.randint(0, 256, (1, n, k // 32, 16), dtype=torch.uint8)
    scales = torch.zeros((1, n, k // 32), dtype=torch.uint8)
    wrapped = tensor.wrap_torch_tensor(blocks.flatten(2).mT, dtype=tensor.FP4)
    for name, kind, options in (
        ("hub_strided", order.StridedLayout, {}),
        ("hub_hopper", order.HopperMXValueLayout, {"mx_axis": 1}),
        ("hub_blackwell", order.BlackwellMXValueLayout, {}),
    ):
        data = tensor.convert_layout(wrapped, kind, **options).storage.data
        ours = swizzle_weight(Source((blocks, scales), MXFP4), name)[0]
        assert torch.equal(ours, data)
        assert ours.stride() == data.stride()
