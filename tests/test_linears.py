"""``mxfp4::linears``: the native kernel on every path that runs here, and when torch computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from combinations import covering
from implementations import CPU_PATHS, chosen, randn
from models import DTYPES
from oracle import Bounded, assert_within, linear
from torch import Tensor
from torch.nn import functional as F

from mxfp4_fx.core import hardware
from mxfp4_fx.ops import cpu_linear

linears = torch.ops.mxfp4.linears
ROWS = 9  # more than are multiplied at a time


@pytest.fixture(params=CPU_PATHS)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Computes all linears of up to ROWS rows natively; asking torch is a failure."""

    def torch_linears(*_: object) -> None:
        raise AssertionError("torch's linear was called")

    monkeypatch.setattr(hardware, "linear_rows", lambda dtype: ROWS)
    monkeypatch.setattr(cpu_linear.reference_around, "linears", torch_linears)
    with chosen(f"cpu:{request.param}"):
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    results: list[Tensor] = linears(x, weights, biases, "cpu")
    return results


def check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Hold the kernel's results against the oracle."""
    results = run(x, weights, biases)
    for y, weight, bias in zip(results, weights, biases, strict=True):
        exact = torch.zeros(len(weight)) if bias is None else bias
        rows = Bounded.exact(x.reshape(-1, x.shape[-1]))
        expected = linear(rows, weight.double(), exact.double()).rounded(x.dtype)
        assert y.dtype == x.dtype
        assert y.shape == (*x.shape[:-1], len(weight))
        assert y.is_contiguous()
        assert_within(y.view(-1, len(weight)), expected)
    return results


@pytest.mark.usefixtures("native")
class TestKernel:
    @pytest.mark.parametrize(
        ("dtype", "rows", "n", "k"),
        covering(DTYPES, (1, 2, 3, 4, 5, 6, ROWS), (1, 8, 33), (1, 31, 32, 100)),
    )
    def test_any_sizes(self, dtype: torch.dtype, rows: int, n: int, k: int) -> None:
        bias = randn(n, dtype=dtype, seed=3) * 4 if n % 2 else None
        check(randn(rows, k, dtype=dtype), [randn(n, k, dtype=dtype, seed=2)], [bias])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_several_of_one_input(self, dtype: torch.dtype) -> None:
        weights = [randn(n, 70, dtype=dtype, seed=n) for n in (40, 3, 17)]
        biases = [randn(40, dtype=dtype), None, randn(17, dtype=dtype)]
        check(randn(2, 3, 70, dtype=dtype), weights, biases)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_with_gaps_at_any_address(self, dtype: torch.dtype) -> None:
        weight = randn(20, 90, dtype=dtype)[:, 3:73]
        assert weight.stride() == (90, 1)
        check(randn(3, 81, dtype=dtype)[:, 5:75], [weight], [randn(23, dtype=dtype)[3:]])

    def test_an_input_that_is_transposed(self) -> None:
        check(randn(70, 4).T, [randn(20, 70)], [None])
        check(randn(2, 70, 4).transpose(1, 2), [randn(20, 70)], [None])

    def test_a_vector(self) -> None:
        weight, bias, x = randn(20, 70), randn(20), randn(70)
        assert torch.equal(run(x, [weight], [bias])[0], check(x[None], [weight], [bias])[0][0])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_row_has_the_same_bits_beside_any_others(self, dtype: torch.dtype) -> None:
        x, weight = randn(ROWS, 300, dtype=dtype), randn(50, 300, dtype=dtype)
        alone = torch.cat([run(row[None], [weight], [None])[0] for row in x])
        for rows in range(2, ROWS + 1):
            assert torch.equal(run(x[:rows], [weight], [None])[0], alone[:rows])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_same_bits_for_any_number_of_threads(self, dtype: torch.dtype, threads: None) -> None:
        """The weights are large enough for four threads, and the last rows are no whole group."""
        weights = [randn(n, 512, dtype=dtype, seed=n) for n in (1203, 901)]
        x, results = randn(3, 512, dtype=dtype), []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(torch.cat(run(x, weights, [None, None]), dim=1))
        assert all(torch.equal(result, results[0]) for result in results[1:])

    @pytest.mark.parametrize(
        ("dtype", "value", "rows"), covering(DTYPES, (torch.nan, torch.inf, -torch.inf), (1, 4, 7))
    )
    def test_nan_and_infinity(self, dtype: torch.dtype, value: float, rows: int) -> None:
        """In a row of x they reach that row, in a row of the weight that column, and no others."""
        x, weight = randn(rows, 70, dtype=dtype), randn(20, 70, dtype=dtype)
        x[-1, 69] = value
        weight[5, 33] = value
        (y,), expected = run(x, [weight], [None]), x.double() @ weight.double().T
        for is_special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(is_special(y), is_special(expected))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_subnormal_numbers_count(self, dtype: torch.dtype) -> None:
        tiny = torch.finfo(dtype).smallest_normal
        x = (randn(3, 40).double() * tiny / 4).to(dtype)
        weight = torch.full((9, 40), 2.0**20, dtype=dtype) if dtype != torch.float16 else None
        check(x, [randn(9, 40, dtype=dtype) if weight is None else weight], [None])

    def test_flushing_of_subnormals_by_torch_changes_nothing(self) -> None:
        x, weight = randn(3, 64) * 2.0**-100, randn(9, 64) * 2.0**-45
        (expected,) = run(x, [weight], [None])
        try:
            assert torch.set_flush_denormal(True)
            assert torch.equal(run(x, [weight], [None])[0], expected)
        finally:
            torch.set_flush_denormal(False)

    def test_a_bias_is_added_before_rounding(self) -> None:
        """1 + 2^-8 is no bfloat16 number; that plus 2^-8 is."""
        x = torch.tensor([[1.0, 2.0**-8]]).bfloat16()
        bias = torch.tensor([2.0**-8]).bfloat16()
        assert run(x, [torch.ones(1, 2).bfloat16()], [bias])[0].item() == 1 + 2.0**-7


def limit(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(hardware, "linear_rows", lambda dtype: rows if dtype in DTYPES else 0)


LEFT_TO_TORCH = {
    "more rows": (randn(5, 40), randn(7, 40), randn(7)),
    "more rows in three dimensions": (randn(2, 3, 40), randn(7, 40), randn(7)),
    "no rows": (randn(0, 40), randn(7, 40), randn(7)),
    "no columns": (randn(2, 0), randn(7, 0), randn(7)),
    "float64": (randn(2, 40).double(), randn(7, 40).double(), None),
    "a transposed weight": (randn(2, 40), randn(40, 7).T, None),
    "a bias with gaps": (randn(2, 40), randn(7, 40), randn(14)[::2]),
}


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_what_is_left_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 4)
    monkeypatch.setattr(cpu_linear, "library", None)
    x, weight, bias = LEFT_TO_TORCH[name]
    (y,) = run(x, [weight], [bias])
    assert torch.equal(y, F.linear(x, weight, bias))
    assert y.is_contiguous()


def test_a_path_that_was_not_measured_leaves_all_to_torch() -> None:
    with chosen("cpu:portable"):
        assert [hardware.linear_rows(dtype) for dtype in DTYPES] == [0, 0, 0]


@pytest.mark.parametrize("by", ["cpu", "pytorch", "reference"])
def test_opcheck(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 4)
    for x in (randn(3, 40), randn(2, 3, 40), randn(4, 40).T.contiguous().T):
        arguments = (x, [randn(7, 40), randn(2, 40)], [None, randn(2)], by)
        torch.library.opcheck(linears.default, arguments)


WRONG = {
    "x must be": (randn(3, 40), [randn(7, 40)], []),
    r"a weight must be \[N, 40\]": (randn(3, 40), [randn(7, 41)], [None]),
    r"must be \[7\]": (randn(3, 40), [randn(7, 40)], [randn(6)]),
}


@pytest.mark.parametrize("message", WRONG)
def test_shapes_that_do_not_fit(message: str) -> None:
    x, weights, biases = WRONG[message]
    for device in ("cpu", "meta"):
        moved = [None if b is None else b.to(device) for b in biases]
        with pytest.raises(ValueError, match=message):
            linears(x.to(device), [w.to(device) for w in weights], moved, "cpu")
