"""``mxfp4::linears_mxfp8`` by Triton's kernels: each order of K, splits, tiles, gradients.

On a GPU if there is one, otherwise in Triton's interpreter.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from combinations import covering
from implementations import DEVICE, randn
from models import DTYPES
from oracle import UNDERFLOW, Bounded, assert_within, linear
from test_linears_mxfp8 import Weight, random_weight, values_of
from torch import Tensor

pytest.importorskip("triton")

from mxfp4_fx.core import hardware
from mxfp4_fx.ops import tiles, triton_mxfp8
from mxfp4_fx.ops.tiles import Tile

ops = torch.ops.mxfp4
IS_INTERPRETED = DEVICE == "cpu"
# On a GPU bfloat16 units make zeros of products below float32's normal numbers.
LOST = UNDERFLOW if IS_INTERPRETED else 2.0**-126
UNITS = ("none", "mma", "wgmma")
SMALL = Tile("any", 0, 0, 16, 16, 64, 1, 4, 1)


def use(
    monkeypatch: pytest.MonkeyPatch,
    units: str = "none",
    tile: Tile = SMALL,
) -> None:
    """Let launches bring K into an order that any device can compute, with a tile for few steps."""
    monkeypatch.setattr(triton_mxfp8, "_units", lambda gpu: units)
    monkeypatch.setattr(tiles, "choose_mxfp8", lambda *_: tile)


def run(x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    codes, scales = ([weight[i].to(DEVICE) for weight in weights] for i in (0, 1))
    there = [None if bias is None else bias.to(DEVICE) for bias in biases]
    return [y.cpu() for y in ops.linears_mxfp8(x.to(DEVICE), codes, scales, there, "triton")]


def check(x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> None:
    """Hold results against the oracle."""
    for y, weight, bias in zip(run(x, weights, biases), weights, biases, strict=True):
        exact = values_of(weight)
        of_bias = torch.zeros(len(exact)) if bias is None else bias
        rows = Bounded.exact(x.reshape(-1, x.shape[-1]))
        expected = linear(rows, exact, of_bias.double(), LOST).rounded(x.dtype)
        assert y.dtype == x.dtype
        assert y.shape == (*x.shape[:-1], len(exact))
        assert y.is_contiguous()
        assert_within(y.view(-1, len(exact)), expected)


@pytest.mark.parametrize(
    ("dtype", "units", "rows", "n", "k", "splits"),
    covering(DTYPES, UNITS, (1, 5, 17), (1, 16, 33), (32, 64, 160), (1, 3)),
)
def test_any_sizes(
    dtype: torch.dtype,
    units: str,
    rows: int,
    n: int,
    k: int,
    splits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, units, Tile("any", 0, 0, 16, 16, 64, splits, 4, 1))
    bias = randn(n, dtype=dtype, seed=3) if n % 2 else None
    check(randn(rows, k, dtype=dtype), [random_weight(n, k)], [bias])


@pytest.mark.parametrize(
    ("units", "k", "dtype"), covering(UNITS, (96, 128), (torch.bfloat16, torch.float16))
)
def test_many_rows_in_the_order_of_the_units(
    units: str, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, units, Tile("any", 0, 0, 64, 64, 128, 1, 4, 1))
    check(randn(65, k, dtype=dtype), [random_weight(20, k)], [None])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The names of the kernels that are launched, and their grids; with a small tile."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    class Noting:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append((self.name, grid))
            return self.kernel[grid]

    use(monkeypatch)
    for name, kernel in list(vars(triton_mxfp8).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(triton_mxfp8, name, Noting(name, kernel))
    return seen


@pytest.mark.parametrize("splits", [1, 2])
def test_three_of_one_input_are_one_launch(
    splits: int, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = Tile("any", 0, 0, 16, 16, 64, splits, 4, 1)
    monkeypatch.setattr(tiles, "choose_mxfp8", lambda *_: tile)
    sizes = (40, 3, 17)
    weights = [random_weight(n, 96, seed=n) for n in sizes]
    biases = [randn(n, dtype=torch.bfloat16, seed=n) for n in sizes]
    check(randn(2, 3, 96, dtype=torch.bfloat16), weights, biases)
    sums = [("sum_splits_kernel", (2 * 3,))]
    assert launches == [("linears_mxfp8_kernel", (3 + 1 + 2, splits)), *(sums * (splits > 1))]


def test_what_shares_no_launch(launches: list[Any]) -> None:
    """Linears with a bias and without one, and a fourth; of no columns there is none."""
    weights = [random_weight(8, 32, seed=seed) for seed in range(5)]
    check(randn(2, 32), weights, [None, None, None, None, randn(8)])
    assert run(randn(2, 32), [random_weight(0, 32)], [None])[0].shape == (2, 0)
    assert launches == [("linears_mxfp8_kernel", (count, 1)) for count in (3, 1, 1)]


def test_k_is_split_while_there_are_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = Tile("any", 0, 0, 16, 16, 64, 8, 4, 1)
    for k, programs, splits in (
        (640, 1, 5),  # whole steps are divided evenly
        (640, 100, 5),
        (640, 200, 2),
        (640, 300, 1),
        (64, 1, 1),
        (672, 1, 6),  # 11 steps, the last of which is half of one: two for each but the last
    ):
        assert triton_mxfp8._splits(tile, programs, k) == splits


def test_inputs_with_gaps_and_transposed_ones() -> None:
    weight = random_weight(20, 64)
    check(randn(3, 81)[:, 5:69], [weight], [None])
    check(randn(64, 4).T, [weight], [randn(23)[3:]])
    vector = randn(64)
    assert torch.equal(run(vector, [weight], [None])[0], run(vector[None], [weight], [None])[0][0])


def test_no_rows() -> None:
    assert run(randn(2, 0, 64), [random_weight(7, 64)], [None])[0].shape == (2, 0, 7)


@pytest.mark.parametrize("units", UNITS)
def test_all_scales_that_values_have(units: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subnormal weights count, and large ones are no infinities."""
    use(monkeypatch, units)
    codes, scales = random_weight(247, 64)
    scales[:] = torch.arange(247, dtype=torch.uint8)[None, :, None]
    check(randn(2, 64) * 2.0**-10, [(codes, scales)], [None])


def test_a_block_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of infinities, which would not cancel here."""
    use(monkeypatch)
    codes, scales = random_weight(20, 96)
    codes[0, 5], scales[0, 5, 2] = 3, 255
    (y,) = run(torch.ones(2, 96, dtype=torch.bfloat16), [(codes, scales)], [None])
    assert y.isnan().any(0).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_in_a_row_of_x(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch)
    weight = random_weight(20, 96)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = randn(3, 96, dtype=dtype)
        x[-1, 69] = value
        (y,), expected = run(x, [weight], [None]), x.double() @ values_of(weight).T
        for is_special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(is_special(y), is_special(expected))


def test_dtypes_that_are_not_served() -> None:
    for x in (randn(2, 32).double(), randn(2, 32).to(torch.float8_e4m3fn)):
        with pytest.raises(TypeError, match="kernels='triton' computes in float32, bfloat16 and"):
            run(x, [random_weight(8, 32)], [None])


def test_operands_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"codes must be \[1, N, 64\]"):
        run(randn(3, 64), [random_weight(7, 96)], [None])


def test_opcheck() -> None:
    (a, b), (c, d) = ([p.to(DEVICE) for p in random_weight(n, 64)] for n in (7, 2))
    for x in (randn(2, 3, 64), randn(3, 64).requires_grad_()):
        there = x.detach().to(DEVICE).requires_grad_(x.requires_grad)
        bias = randn(2).to(DEVICE)
        given = there, [a, c], [b, d], [None, bias], "triton"
        torch.library.opcheck(ops.linears_mxfp8.default, given)


# ---- gradients


@pytest.mark.parametrize(("dtype", "k", "count"), covering(DTYPES, (32, 160), (1, 2, 4)))
def test_the_gradient_of_x(
    dtype: torch.dtype, k: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of up to three linears in one launch, of more in several."""
    use(monkeypatch, tile=Tile("any", 0, 0, 16, 64, 64, 1, 4, 1))
    sizes = (70, 5, 33, 6)[:count]
    weights = [random_weight(n, k, seed=n) for n in sizes]
    codes, scales = ([weight[i].to(DEVICE) for weight in weights] for i in (0, 1))
    grads = [randn(3, 2, n, dtype=dtype, seed=n) for n in sizes]
    x = randn(3, 2, k, dtype=dtype).to(DEVICE).requires_grad_()
    results = ops.linears_mxfp8(x, codes, scales, [None] * len(sizes), "triton")
    torch.autograd.backward(results, [grad.to(DEVICE) for grad in grads])
    assert x.grad is not None
    joined = torch.cat(grads, dim=2).flatten(0, 1)
    matrix = torch.cat([values_of(weight) for weight in weights])
    expected = linear(Bounded.exact(joined), matrix.T, torch.zeros(k), LOST).rounded(dtype)
    assert x.grad.dtype == dtype
    assert_within(x.grad.cpu().view(6, k), expected)


def with_gaps(part: Tensor) -> Tensor:
    return torch.stack([part, part + 1], -1)[..., 0].to(DEVICE)


@pytest.mark.parametrize("strided", ["codes", "scales", "grad"])
def test_the_gradient_of_parts_with_gaps(strided: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tile=Tile("any", 0, 0, 16, 64, 64, 1, 4, 1))
    codes, scales = random_weight(40, 96)
    given = {"grad": randn(3, 40), "codes": codes, "scales": scales}
    there = {k: with_gaps(v) if k == strided else v.to(DEVICE) for k, v in given.items()}
    parts = ([there[name]] for name in given)
    gradient = ops.linears_mxfp8_backward(*parts, "triton").cpu()
    exact = Bounded.exact(given["grad"])
    expected = linear(exact, values_of((codes, scales)).T, torch.zeros(96), LOST)
    assert_within(gradient, expected.rounded(torch.float32))


def test_the_gradient_of_no_rows() -> None:
    x = randn(0, 64).to(DEVICE).requires_grad_()
    codes, scales = (part.to(DEVICE) for part in random_weight(7, 64))
    ops.linears_mxfp8(x, [codes], [scales], [None], "triton")[0].sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 64)


# ---- tables


@pytest.mark.parametrize("gpu", ["sm_75", "sm_80", "sm_90", "sm_100", "gfx942", "xpu"])
def test_a_gpu_has_tiles(gpu: str) -> None:
    table = tiles.table(f"mxfp8_{gpu}")
    found = {tiles.choose_mxfp8(gpu, rows) for rows in (1, 16, 17, 32, 64, 65, 1024, 1025, 8192)}
    assert found == set(table)
    for tile in table:
        assert all(size & size - 1 == 0 for size in (tile.block_m, tile.block_n, tile.block_k))
        assert min(tile.block_n, tile.block_k) >= 64  # columns that are decoded together


def test_gpus_without_a_table_have_another_ones() -> None:
    for gpu, other in (("sm_89", "sm_80"), ("sm_120", "sm_80"), ("gfx950", "gfx942")):
        assert tiles.choose_mxfp8(gpu, 1) == tiles.table(f"mxfp8_{other}")[0]


@pytest.mark.parametrize(("tuned", "other"), [("", "mxfp8_"), ("mxfp8_", "")])
def test_a_tuned_table_of_one_kind_is_none_of_the_other(
    tuned: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in tiles.FOLDER.iterdir():
        shutil.copy(path, tmp_path)
    shutil.copy(tmp_path / f"{tuned}sm_80.json", tmp_path / f"{tuned}sm_89.json")
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    find = tiles.table_name.__wrapped__  # what is not cached
    assert find("sm_89", "mma_fragments", tuned) == f"{tuned}sm_89"
    assert find("sm_89", "mma_fragments", other) == f"{other}sm_80"


def test_activations_of_several_terms_have_fewer_rows() -> None:
    assert [tiles.choose_mxfp8("sm_90", 8192, terms).block_m for terms in (1, 2, 3)] == [
        256,
        64,
        32,
    ]


@pytest.mark.skipif(not IS_INTERPRETED, reason="on a GPU the launcher serves that GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_turing_multiplies_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpu_name", lambda device: "sm_75")
    check(randn(3, 96, dtype=dtype), [random_weight(40, 96)], [None])
