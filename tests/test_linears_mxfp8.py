"""``mxfp4::linears_mxfp8``: the reference, the native kernel on every path, and gradients."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from combinations import covering
from implementations import CPU_PATHS, chosen, randn
from models import DTYPES
from oracle import Bounded, assert_within, linear
from torch import Tensor

from mxfp4_fx.core import hardware
from mxfp4_fx.ops import cpu_mxfp8

linears = torch.ops.mxfp4.linears_mxfp8
ROWS = 9  # more than are multiplied at a time
MANY = 17  # more than are multiplied without panels

Weight = tuple[Tensor, Tensor]


@pytest.fixture(params=CPU_PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    with chosen(f"cpu:{request.param}"):
        yield


@pytest.fixture
def few_rows(path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to ROWS rows go to the native kernel; anything else is a failure."""
    _only_natively(monkeypatch, ROWS)


@pytest.fixture
def panels(path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of rows goes to the native kernel; anything else is a failure."""
    _only_natively(monkeypatch, 1 << 30)


def _only_natively(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    def others(*_: object) -> None:
        raise AssertionError("the kernel was not asked")

    monkeypatch.setattr(hardware, "mxfp8_rows", lambda dtype: most)
    monkeypatch.setattr(cpu_mxfp8, "_many", others)
    monkeypatch.setattr(cpu_mxfp8.reference_around, "linears_mxfp8", others)


@pytest.fixture
def slabs(path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of rows multiplies values, in several slabs of a weight."""

    def reference(*_: object) -> None:
        raise AssertionError("the kernel was not asked")

    monkeypatch.setattr(hardware, "mxfp8_rows", lambda dtype: 0)
    monkeypatch.setattr(cpu_mxfp8, "_SLAB_VALUES", 1000)
    monkeypatch.setattr(cpu_mxfp8.reference_around, "linears_mxfp8", reference)


def random_weight(n: int, k: int, seed: int = 0) -> Weight:
    """Codes of all kinds but NaN, under scales of 2^-14 to 2^-6."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 255, (1, n, k), generator=generator).to(torch.uint8)
    codes[(codes & 127) == 127] = 3
    scales = torch.randint(113, 122, (1, n, k // 32), generator=generator)
    return codes, scales.to(torch.uint8)


def values_of(weight: Weight) -> Tensor:
    """The weight in float64, by the table of the format."""
    codes, scales = weight
    code = codes[0].int()
    exponent, mantissa = code >> 3 & 15, (code & 7).double() / 8
    size = torch.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    size = torch.where((code & 127) == 127, torch.nan, size)
    scale = torch.exp2(scales[0].double() - 127).masked_fill(scales[0] == 255, torch.nan)
    return torch.where(code >> 7 == 1, -size, size) * scale.repeat_interleave(32, dim=1)


def run(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], by: str = "cpu"
) -> list[Tensor]:
    codes, scales = [w[0] for w in weights], [w[1] for w in weights]
    results: list[Tensor] = linears(x, codes, scales, biases, by)
    return results


def check(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], by: str = "cpu"
) -> list[Tensor]:
    """Hold results against the oracle."""
    results = run(x, weights, biases, by)
    for y, weight, bias in zip(results, weights, biases, strict=True):
        exact = values_of(weight)
        n = len(exact)
        rows = Bounded.exact(x.reshape(-1, x.shape[-1]))
        of_bias = torch.zeros(n) if bias is None else bias
        expected = linear(rows, exact, of_bias.double()).rounded(x.dtype)
        assert y.dtype == x.dtype
        assert y.shape == (*x.shape[:-1], n)
        assert y.is_contiguous()
        assert_within(y.view(-1, n), expected)
    return results


def most_with_the_same_bits() -> int:
    """Up to how many rows each has the bits that it has alone: ``FEW_ROWS`` of the kernels."""
    if platform.machine() == "aarch64":
        return 2
    return 4 if hardware.cpu_path() == "avx2" else ROWS


@pytest.mark.usefixtures("few_rows")
class TestFewRows:
    @pytest.mark.parametrize(
        ("dtype", "rows", "n", "k"),
        covering(DTYPES, (1, 2, 3, 4, 5, 6, ROWS), (1, 8, 33), (32, 64, 96, 160, 672)),
    )
    def test_any_sizes(self, dtype: torch.dtype, rows: int, n: int, k: int) -> None:
        bias = randn(n, dtype=dtype, seed=3) if n % 2 else None
        check(randn(rows, k, dtype=dtype), [random_weight(n, k)], [bias])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_several_of_one_input_of_three_dimensions(self, dtype: torch.dtype) -> None:
        weights = [random_weight(n, 96, seed=n) for n in (40, 3, 17)]
        biases = [randn(40, dtype=dtype), None, randn(17, dtype=dtype)]
        check(randn(2, 3, 96, dtype=dtype), weights, biases)

    def test_inputs_with_gaps_and_transposed_ones(self) -> None:
        weight = random_weight(20, 64)
        check(randn(3, 81)[:, 5:69], [weight], [None])
        check(randn(64, 4).T, [weight], [randn(23)[3:]])

    def test_a_vector(self) -> None:
        weight, x = random_weight(20, 64), randn(64)
        assert torch.equal(run(x, [weight], [None])[0], run(x[None], [weight], [None])[0][0])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_row_has_the_same_bits_beside_any_others(self, dtype: torch.dtype) -> None:
        x, weight = randn(ROWS, 320, dtype=dtype), random_weight(50, 320)
        alone = torch.cat([run(row[None], [weight], [None])[0] for row in x])
        for rows in range(2, most_with_the_same_bits() + 1):
            together = torch.cat([run(some, [weight], [None])[0] for some in x.split(rows)])
            assert torch.equal(together, alone)

    @pytest.mark.parametrize(
        ("dtype", "rows"), [(torch.float32, 3), (torch.bfloat16, 3), (torch.bfloat16, 1)]
    )
    def test_same_bits_for_any_number_of_threads(self, dtype: torch.dtype, rows: int) -> None:
        """The weights are large enough for four threads, and the last rows are no whole group."""
        weights = [random_weight(n, 1024, seed=n) for n in (1203, 901)]
        x, results, before = randn(rows, 1024, dtype=dtype), [], torch.get_num_threads()
        try:
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                results.append(torch.cat(run(x, weights, [None, None]), dim=1))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results[1:])

    @pytest.mark.parametrize(
        ("dtype", "value", "rows"), covering(DTYPES, (torch.nan, torch.inf, -torch.inf), (1, 4, 7))
    )
    def test_nan_and_infinity_in_a_row_of_x(
        self, dtype: torch.dtype, value: float, rows: int
    ) -> None:
        x, weight = randn(rows, 96, dtype=dtype), random_weight(20, 96)
        x[-1, 69] = value
        (y,), expected = run(x, [weight], [None]), x.double() @ values_of(weight).T
        for is_special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(is_special(y), is_special(expected))

    @pytest.mark.parametrize(("dtype", "rows"), covering(DTYPES, (1, 5)))
    def test_nan_in_a_row_of_the_weight(self, dtype: torch.dtype, rows: int) -> None:
        """As a code, or as the scale of a block."""
        codes, scales = random_weight(20, 96)
        codes[0, 3, 70], codes[0, 4, 1], scales[0, 5, 2] = 0x7F, 0xFF, 255
        codes[0, 5] &= 0x7F  # so that no infinities of different signs make a NaN
        (y,) = run(randn(rows, 96, dtype=dtype).abs(), [(codes, scales)], [None])
        assert y.isnan().any(0).nonzero().flatten().tolist() == [3, 4, 5]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_all_scales_that_values_have(self, dtype: torch.dtype) -> None:
        """Subnormal weights count, and large ones are no infinities."""
        codes, scales = random_weight(248, 64)
        scales[:] = torch.arange(248, dtype=torch.uint8)[None, :, None]
        x = randn(2, 64, dtype=dtype) * 2.0**-10
        check(x, [(codes, scales)], [None])

    def test_bfloat16_of_any_size(self) -> None:
        """Subnormal numbers count, and so does what is left where two products cancel."""
        codes, scales = torch.ones(1, 8, 64, dtype=torch.uint8), random_weight(8, 64)[1]
        scales[:] = 127 + 40
        x = torch.zeros(ROWS, 64)
        x[:, 38], x[:, 39] = 1 + 2.0**-7, -1
        sizes = torch.tensor([-126, -118, -109, -105, -104, -103, -102, -20, 60])
        x *= torch.exp2(sizes.double()).float()[:, None]
        x[0, 60] = 2.0**-133
        for y in check(x.bfloat16(), [(codes, scales)], [None]):
            assert y.all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_of_different_sizes_beside_each_other(self, dtype: torch.dtype) -> None:
        """Units of bfloat16 would read some as zeros; a factor would make some infinite."""
        codes, scales = random_weight(19, 160)
        weight = (codes, scales + 16)
        sizes = torch.tensor([0, -128, -130, 0, 0, 100, 0, 95, -110])
        x = (randn(ROWS, 160).double() * torch.exp2(sizes.double())[:, None]).to(dtype)
        check(x, [weight], [None])
        alone, together = (
            torch.cat([run(some, [weight], [None])[0] for some in x.split(rows)])
            for rows in (1, most_with_the_same_bits())
        )
        assert torch.equal(together, alone)

    @pytest.mark.parametrize("size", [2.0**13, 2.0**15, 2.0**17])
    def test_large_activations(self, size: float) -> None:
        """A factor that kernels may multiply them by makes no infinities."""
        check(randn(2, 64) * size, [random_weight(8, 64)], [None])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_sums_that_only_the_scale_makes_finite(self, dtype: torch.dtype) -> None:
        codes, scales = random_weight(8, 64)
        codes[:], scales[:] = 0x7E, 107  # the largest value, times 2^-20
        check(torch.full((2, 64), 1.875 * 2.0**123).to(dtype), [(codes, scales)], [None])

    def test_a_tiny_activation_beside_a_large_one_counts(self) -> None:
        """Times weights above 1, its products have bits that smaller ones would lose."""
        codes, scales = random_weight(8, 64)
        codes[:, :, 3] = 0  # of the large one
        x = randn(3, 64) * 2.0**-140
        x[1, 3] = 1000
        check(x, [(codes, scales + 20)], [None])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_flushing_of_subnormals_by_torch_changes_nothing(self, dtype: torch.dtype) -> None:
        """Neither of weights nor, in the last row, of activations."""
        codes, scales = random_weight(9, 64)
        scales[:] = 2
        scales[0, 5:] = 220
        x = randn(3, 64, dtype=dtype)
        x[2] *= 2.0**-130
        (expected,) = run(x, [(codes, scales)], [None])
        try:
            assert torch.set_flush_denormal(True)
            assert torch.equal(run(x, [(codes, scales)], [None])[0], expected)
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.usefixtures("panels")
class TestPanels:
    @pytest.mark.parametrize(
        ("dtype", "rows", "n", "k"),
        covering(DTYPES, (MANY, MANY + 1, 50), (1, 31, 64, 70), (32, 96, 128, 416)),
    )
    def test_any_sizes(self, dtype: torch.dtype, rows: int, n: int, k: int) -> None:
        bias = randn(n, dtype=dtype, seed=3) if n % 2 else None
        check(randn(rows, k, dtype=dtype), [random_weight(n, k)], [bias])

    def test_rows_that_are_packed_in_several_groups(self) -> None:
        check(randn(70, 4096), [random_weight(33, 4096)], [None])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_several_of_one_input_with_gaps(self, dtype: torch.dtype) -> None:
        weights = [random_weight(n, 96, seed=n) for n in (40, 3, 100)]
        biases = [randn(40, dtype=dtype), None, randn(100, dtype=dtype)]
        check(randn(4, 5, 107, dtype=dtype)[..., 7:103], weights, biases)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_same_bits_for_any_number_of_threads(self, dtype: torch.dtype) -> None:
        weights = [random_weight(n, 192, seed=n) for n in (203, 101)]
        x, results, before = randn(50, 192, dtype=dtype), [], torch.get_num_threads()
        try:
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                results.append(torch.cat(run(x, weights, [None, None]), dim=1))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results[1:])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_nan_and_infinity_in_a_row_of_x(self, value: float) -> None:
        x, weight = randn(MANY, 96), random_weight(20, 96)
        x[-1, 69] = value
        (y,), expected = run(x, [weight], [None]), x.double() @ values_of(weight).T
        for is_special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(is_special(y), is_special(expected))

    def test_nan_in_a_row_of_the_weight(self) -> None:
        """As a code, or as the scale of a block."""
        codes, scales = random_weight(40, 96)
        codes[0, 3, 70], codes[0, 34, 1], scales[0, 5, 2] = 0x7F, 0xFF, 255
        codes[0, 5] &= 0x7F  # so that no infinities of different signs make a NaN
        (y,) = run(randn(MANY, 96).abs(), [(codes, scales)], [None])
        assert y.isnan().all(0).nonzero().flatten().tolist() == [3, 5, 34]
        assert y.isnan().any(0).sum() == 3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_all_scales_that_values_have(self, dtype: torch.dtype) -> None:
        """Subnormal weights count. At 247 the largest codes are infinite, as `dequantize` says."""
        codes, scales = random_weight(247, 64)
        scales[:] = torch.arange(247, dtype=torch.uint8)[None, :, None]
        check(randn(MANY, 64, dtype=dtype) * 2.0**-10, [(codes, scales)], [None])

    def test_activations_of_any_size(self) -> None:
        """Among them subnormal ones, and those that a factor would make infinite."""
        codes, scales = random_weight(33, 64)
        sizes = torch.arange(MANY)[:, None] * 15 - 140
        x = (randn(MANY, 64).double() * torch.exp2(sizes.double())).float()
        check(x, [(codes, scales)], [None])


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_slabs(dtype: torch.dtype) -> None:
    weights = [random_weight(50, 96), random_weight(3, 96, seed=1)]
    check(randn(2, 20, 96, dtype=dtype), weights, [randn(50, dtype=dtype), None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype: torch.dtype) -> None:
    weights = [random_weight(50, 96), random_weight(3, 96, seed=1)]
    for by in ("reference", "pytorch"):
        check(randn(3, 96, dtype=dtype), weights, [randn(50, dtype=dtype), None], by)


@pytest.mark.parametrize("rows", [0, 3])
def test_what_the_reference_computes_for_the_native_kernel(rows: int) -> None:
    """No rows, and codes that are not contiguous."""
    codes, scales = random_weight(7, 64)
    strided = codes.mT.contiguous().mT
    x = randn(rows, 64)
    expected = run(x, [(codes, scales)], [None], "reference")[0]
    assert torch.equal(run(x, [(strided, scales)], [None])[0], expected)


@pytest.mark.parametrize("by", ["cpu", "reference"])
def test_opcheck(by: str) -> None:
    (a, b), (c, d) = random_weight(7, 64), random_weight(2, 64, seed=1)
    for x in (randn(3, 64), randn(2, 3, 64), randn(3, 64).requires_grad_()):
        torch.library.opcheck(linears.default, (x, [a, c], [b, d], [None, randn(2)], by))


WRONG: dict[str, tuple[Any, ...]] = {
    "x must be": (randn(3, 64), [random_weight(7, 64)], []),
    r"codes must be \[1, N, 64\]": (randn(3, 64), [random_weight(7, 96)], [None]),
    "some are": (randn(3, 64), [(random_weight(7, 64)[0], random_weight(7, 96)[1])], [None]),
    r"must be \[7\]": (randn(3, 64), [random_weight(7, 64)], [randn(6)]),
    "must be uint8": (randn(3, 64), [tuple(p.int() for p in random_weight(7, 64))], [None]),
}


@pytest.mark.parametrize("message", WRONG)
def test_operands_that_do_not_fit(message: str) -> None:
    x, weights, biases = WRONG[message]
    for device in ("cpu", "meta"):
        moved = [None if b is None else b.to(device) for b in biases]
        there = [tuple(part.to(device) for part in weight) for weight in weights]
        with pytest.raises(ValueError, match=message):
            run(x.to(device), there, moved)


# ---- gradients


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_x(dtype: torch.dtype) -> None:
    """Of two linears, one of which nobody reads in the second case."""
    weights = [random_weight(33, 64), random_weight(5, 64, seed=1)]
    exact = [values_of(weight) for weight in weights]
    grads = [randn(3, 33, dtype=dtype), randn(3, 5, dtype=dtype, seed=1)]
    for used in (2, 1):
        x = randn(3, 64, dtype=dtype, seed=2).requires_grad_()
        results = run(x, weights, [None, None])[:used]
        torch.autograd.backward(results, grads[:used])
        assert x.grad is not None
        joined = torch.cat(grads[:used], dim=1)
        matrix = torch.cat(exact[:used])
        expected = linear(Bounded.exact(joined), matrix.T, torch.zeros(64)).rounded(dtype)
        assert_within(x.grad, expected)


def of(n: int, k: int = 64) -> tuple[Tensor, Weight]:
    return randn(3, n), random_weight(n, k)


WRONG_BACKWARD: dict[str, list[tuple[Tensor, Weight]]] = {
    "one or more gradients": [],
    r"codes must be \[1, N, 64\]": [of(7), of(2, 96)],
    r"must be torch.float32 \(3, 2\)": [of(7), (randn(4, 2), random_weight(2, 64))],
    r"one is torch.float32 \(3, 5\)": [of(7), (randn(3, 5), random_weight(2, 64))],
    r"one is torch.float16 \(3, 2\)": [of(7), (randn(3, 2).half(), random_weight(2, 64))],
    "must be uint8": [(randn(3, 7), (torch.zeros(1, 7, 64), torch.zeros(1, 7, 2)))],
}


@pytest.mark.parametrize("message", WRONG_BACKWARD)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gradients_that_do_not_fit(message: str, device: str) -> None:
    given = [(grad, *weight) for grad, weight in WRONG_BACKWARD[message]]
    grads, codes, scales = ([one[at].to(device) for one in given] for at in range(3))
    with pytest.raises(ValueError, match=message):
        torch.ops.mxfp4.linears_mxfp8_backward(grads, codes, scales)


def test_a_bias_has_no_gradient() -> None:
    bias = randn(7).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient for a bias"):
        run(randn(3, 64), [random_weight(7, 64)], [bias])


def test_gradients_by_functions() -> None:
    weight, x = random_weight(7, 64), randn(3, 64)
    of_x = torch.func.grad(lambda x: run(x, [weight], [None])[0].sum())(x)
    matrix = values_of(weight)
    expected = linear(Bounded.exact(torch.ones(3, 7)), matrix.T, torch.zeros(64))
    assert_within(of_x, expected.rounded(of_x.dtype))
