"""``ops/pytorch.py``: how it goes about its work. That its values are right, test_ops.py tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from implementations import Kernels, check_matmul, randn
from oracle import Matrices, random_routes
from torch import Tensor

from mxfp4_fx.ops import pytorch

PYTORCH = Kernels("pytorch")


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 10])
@pytest.mark.parametrize(("activation", "n"), [("none", 5), ("none", 48), ("swiglu", 48)])
def test_panels_of_any_height(
    monkeypatch: pytest.MonkeyPatch, activation: str, n: int, rows: int
) -> None:
    monkeypatch.setattr(pytorch, "PANEL_BYTES", rows * 64 * 4)
    matrices, indices = Matrices.random(3, n, 64), random_routes(7, 3, 2)[0]
    check_matmul(PYTORCH, randn(7, 64), matrices, indices, activation=activation)


@pytest.fixture
def dequantized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """(blocks, weight) of each time that the kernels dequantize."""
    seen: list[tuple[Tensor, Tensor]] = []
    original = pytorch.dequantize

    def record(blocks: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = original(blocks, *args, **kwargs)
        seen.append((blocks, weight))
        return weight

    monkeypatch.setattr(pytorch, "dequantize", record)
    return seen


def test_hit_experts_are_dequantized_once_and_a_panel_at_a_time(
    monkeypatch: pytest.MonkeyPatch, dequantized: list[tuple[Tensor, Tensor]]
) -> None:
    monkeypatch.setattr(pytorch, "PANEL_BYTES", 10 * 64 * 4)
    matrices = Matrices.random(5, 48, 64)
    check_matmul(PYTORCH, randn(9, 64), matrices, torch.tensor([[1, 3]]).repeat(9, 1))
    bytes_per_row = matrices.blocks[0, 0].numel()
    start = matrices.blocks.data_ptr()
    rows = []
    for blocks, weight in dequantized:
        assert weight.numel() * weight.element_size() <= pytorch.PANEL_BYTES
        first = (blocks.data_ptr() - start) // bytes_per_row
        rows += range(first, first + blocks.shape[0])
    assert sorted(rows) == [*range(48, 96), *range(144, 192)]
