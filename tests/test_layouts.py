"""Every layout is an invertible pair whose shapes are known without the values."""

from __future__ import annotations

import pytest
import torch

from mxfp4_fx.layouts import LAYOUTS
from mxfp4_fx.weights import swizzle_weight

SIZES = [(48, 96), (5, 32), (1, 64), (0, 32)]


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_unswizzle_undoes_swizzle(name: str, n: int, k: int) -> None:
    blocks = torch.randint(0, 256, (n, k // 32, 16), dtype=torch.uint8)
    scales = torch.randint(0, 256, (n, k // 32), dtype=torch.uint8)
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
