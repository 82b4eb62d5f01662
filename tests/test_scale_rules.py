"""The scale rule "search" against a search of all scale bytes in integers of any length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
import torch
from combinations import exhaustive
from torch import Tensor

from mxfp4_fx.core import formats
from mxfp4_fx.core.formats import (
    BLOCK,
    E2M1_MAX,
    E2M1_VALUES,
    E8M0_BIAS,
    E8M0_NAN,
    SCALE_RULES,
    dequantize,
    pack,
    quantize,
    unpack,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAGNITUDES = sorted(set(map(abs, E2M1_VALUES)))
# float32 and all products of a code and a scale are multiples of 2^-149 and 2^-128.
UNIT = 149


def integers(block: Tensor) -> list[int]:
    """The magnitudes of 32 finite values in units of 2^-149, exactly."""
    return [int(abs(Fraction(value)) * 2**UNIT) for value in block.double().tolist()]


def least_error(magnitudes: list[int], byte: int) -> int:
    """The least sum of squared errors that any codes give under a scale byte."""
    grid = [int(Fraction(code) * Fraction(2) ** (byte - E8M0_BIAS + UNIT)) for code in MAGNITUDES]
    return sum(min((value - number) ** 2 for number in grid) for value in magnitudes)


def error_of(magnitudes: list[int], blocks: Tensor, byte: int) -> int:
    """The sum of squared errors of the codes that were chosen."""
    scale = Fraction(2) ** (byte - E8M0_BIAS + UNIT)
    numbers = [int(Fraction(abs(E2M1_VALUES[code])) * scale) for code in unpack(blocks).tolist()]
    return sum((a - b) ** 2 for a, b in zip(magnitudes, numbers, strict=True))


def assert_best(values: Tensor, *, also_bytes: range = range(E8M0_NAN)) -> Tensor:
    """Checks blocks [n, 32] one by one; returns where the scale is not that of "max"."""
    blocks, scales = (part.squeeze(1) for part in quantize(values, scale_rule="search"))
    first = quantize(values)[1].squeeze(1)
    for block, codes, scale, largest in zip(values, blocks, scales, first, strict=True):
        magnitudes, byte = integers(block), int(scale)
        errors = {other: least_error(magnitudes, other) for other in also_bytes}
        errors[int(largest)] = least_error(magnitudes, int(largest))
        assert error_of(magnitudes, codes, byte) == min(errors.values())
        if errors[int(largest)] == min(errors.values()):
            assert byte == int(largest), "a tie is the max rule's"
    return scales != first


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heavy_tailed(n: int, seed: int = 0) -> Tensor:
    """Student's t with two degrees of freedom."""
    normal = torch.randn(n, BLOCK, generator=generator(seed))
    other = torch.randn(n, BLOCK, 2, generator=generator(seed + 1)).square().mean(-1)
    return normal / other.sqrt()


RANDOM: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n, BLOCK, generator=generator()),
    "uniform": lambda n: torch.rand(n, BLOCK, generator=generator()) - 0.5,
    "heavy-tailed": heavy_tailed,
    "all magnitudes": lambda n: (
        (torch.rand(n, BLOCK, generator=generator()) * 250 - 125).exp2()
        * (torch.randint(0, 2, (n, BLOCK), generator=generator(1)) * 2 - 1)
    ),
    "one large element": lambda n: torch.cat(
        [torch.linspace(3, 6, n)[:, None], torch.rand(n, BLOCK - 1, generator=generator())], 1
    ),
    "two large elements": lambda n: torch.cat(
        [torch.linspace(3, 6, n)[:, None].expand(n, 2), torch.full((n, BLOCK - 2), 0.27)], 1
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in RANDOM),
        *(("heavy-tailed", dtype) for dtype in DTYPES[1:]),
        *(exhaustive(n, dtype) for n in RANDOM if n != "heavy-tailed" for dtype in DTYPES[1:]),
    ],
)
def test_no_scale_byte_has_a_smaller_error(name: str, dtype: torch.dtype) -> None:
    values = RANDOM[name](12).to(dtype)
    assert_best(values[values.isfinite().all(1)])


@pytest.mark.parametrize("name", ["normal", "heavy-tailed", "two large elements"])
def test_both_scales_occur(name: str) -> None:
    values = RANDOM[name](64)
    lower = assert_best(values, also_bytes=range(100, 140))
    assert lower.any()
    assert not lower.all()


def test_the_rule_of_the_specification_is_never_nearer() -> None:
    """MX 6.3: the exponent of the largest element less that of 6, which is 2."""
    values = heavy_tailed(64)
    blocks, scales = quantize(values, scale_rule="search")
    exponents = values.abs().amax(1).log2().floor() - 2 + E8M0_BIAS
    for block, codes, scale, other in zip(values, blocks, scales, exponents, strict=True):
        magnitudes = integers(block)
        assert error_of(magnitudes, codes[0], int(scale)) <= least_error(magnitudes, int(other))


# --- where the two scales meet


def block_of(largest: float, others: float, count: int = BLOCK - 1, factor: float = 1.0) -> Tensor:
    """[1, 32] float32: one element, `count` others, and zeros."""
    block = torch.zeros(1, BLOCK)
    block[0, 0] = largest
    block[0, 1 : 1 + count] = others
    return block * factor


# 31 others a quarter off gain 1/16 each; the largest costs 2 A - 7 from 3.5 to 5.
MEETING_POINTS = [
    *((3.5 + n / 32, others, n) for n in (1, 2, 17, 31) for others in (0.25, 0.75, -0.25)),
    *((3.5 + n / 64, others, n) for n in (2, 31) for others in (0.1875, 0.3125, 0.6875)),
]


@pytest.mark.parametrize(
    ("largest", "others", "count", "factor"),
    [
        *((*point, 1.0) for point in MEETING_POINTS),
        *((*MEETING_POINTS[-1], factor) for factor in (2.0**-126, 2.0**-20, 2.0**100)),
        *(
            exhaustive(*point, factor)
            for point in MEETING_POINTS[:-1]
            for factor in (2.0**-126, 2.0**-20, 2.0**100)
        ),
    ],
)
def test_a_tie_is_decided_exactly(largest: float, others: float, count: int, factor: float) -> None:
    """At the tie the scale is that of "max", one bit below it is the half."""
    tie = block_of(largest, others, count, factor)
    below = tie.clone()
    below[0, 0] = torch.nextafter(tie[0, 0], tie.new_tensor(0.0))
    above = tie.clone()
    above[0, 0] = torch.nextafter(tie[0, 0], tie.new_tensor(math.inf))
    near = range(max(0, int(quantize(tie)[1]) - 3), int(quantize(tie)[1]) + 4)
    found = [bool(assert_best(block, also_bytes=near)) for block in (below, tie, above)]
    assert found == [True, False, False]


def test_the_smallest_difference_that_there_is_decides() -> None:
    """One bit of the smallest element that gains, against gains of all the others."""
    tie = block_of(3.5 + 30 / 32, 0.25)  # the gain of 30 others pays for the largest
    tie[0, 1] = 0.125  # where the gain begins
    assert not assert_best(tie, also_bytes=range(120, 135))
    tie[0, 1] = torch.nextafter(tie[0, 1], tie.new_tensor(1.0))
    assert assert_best(tie, also_bytes=range(120, 135))


def test_between_3_and_3_5_the_half_scale_costs_nothing() -> None:
    values = torch.cat([block_of(a, 0.25, 1) for a in (3.0000002, 3.25, 3.5)])
    assert assert_best(values).all()


# --- what is MXFP4 already, and the special blocks


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_values_get_the_bytes_of_max(dtype: torch.dtype) -> None:
    """Every scale byte, with all codes and with those up to each magnitude only."""
    for largest in range(8):
        codes = torch.arange(16, dtype=torch.uint8).repeat(2)
        codes = (codes & 8) | (codes & 7).clamp(max=largest)
        scales = torch.arange(256, dtype=torch.uint8)[:, None]
        values = dequantize(pack(codes).expand(256, 1, -1), scales, dtype)
        if dtype == torch.float16:  # where the values are those of the bytes
            values = values[104:]
        for got, expected in zip(
            quantize(values, scale_rule="search"), quantize(values), strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizing_twice_changes_nothing(dtype: torch.dtype) -> None:
    values = heavy_tailed(512).to(dtype)
    once = dequantize(*quantize(values, scale_rule="search"), dtype)
    twice = dequantize(*quantize(once, scale_rule="search"), dtype)
    assert torch.equal(once, twice)
    assert torch.equal(once.signbit(), twice.signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -125, 124, 125])
def test_both_ends_of_the_range(exponent: int, dtype: torch.dtype) -> None:
    """Subnormal blocks, the last scale without a half, and the largest finite values."""
    values = torch.cat([block_of(3 + n / 16, 0.25 + n / 64) for n in range(48)])
    values = values.double().mul(math.ldexp(1.0, exponent)).to(dtype)
    values = values[values.isfinite().all(1)]
    assert len(values) > 0
    assert_best(values, also_bytes=range(4) if exponent < 0 else range(250, 255))


def test_float16_subnormals() -> None:
    values = (heavy_tailed(64) * 2.0**-20).to(torch.float16)
    assert (values.abs().amax(1) < torch.finfo(torch.float16).smallest_normal).any()
    assert_best(values, also_bytes=range(95, 125))


def test_elements_saturate_at_six_with_their_signs() -> None:
    block = block_of(3.5, 0.25)
    block[0, 1], block[0, 2] = -3.4, -0.0
    blocks, scales = quantize(block, scale_rule="search")
    values = dequantize(blocks, scales, torch.float32)[0, :4].tolist()
    assert scales.tolist() == [[E8M0_BIAS - 1]]
    assert values == [E2M1_MAX / 2, -E2M1_MAX / 2, 0.0, 0.25]
    assert math.copysign(1, values[2]) == -1


# --- views, slabs, threads, devices, modes

VIEWS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: heavy_tailed(30).view(96, 10).t(),
    "batched transposed": lambda: heavy_tailed(36).view(3, 64, 6).transpose(1, 2),
    "every second K": lambda: heavy_tailed(20).view(5, 128)[:, ::2],
    "expanded": lambda: heavy_tailed(2).view(1, 64).expand(4, 64),
    "leading dimensions swapped": lambda: heavy_tailed(12).view(3, 4, 32).transpose(0, 1),
}


@pytest.mark.parametrize("slab_values", [1, 200, 1 << 20])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_gets_the_bytes_of_its_copy(
    name: str, slab_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = VIEWS[name]()
    expected = quantize(view.clone(memory_format=torch.contiguous_format), scale_rule="search")
    monkeypatch.setattr(formats, "SLAB_VALUES", slab_values)
    for got, wanted in zip(quantize(view, scale_rule="search"), expected, strict=True):
        assert torch.equal(got, wanted)
        assert got.is_contiguous()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_threads_change_nothing(one_thread: None) -> None:
    values = heavy_tailed(4096)
    alone = quantize(values, scale_rule="search")
    torch.set_num_threads(4)
    for got, wanted in zip(quantize(values, scale_rule="search"), alone, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0, 64), (3, 0), (2, 5, 96)])
def test_shapes_on_the_meta_device(shape: tuple[int, ...]) -> None:
    blocks, scales = quantize(torch.empty(shape, device="meta"), scale_rule="search")
    assert blocks.shape == (*shape[:-1], shape[-1] // BLOCK, BLOCK // 2)
    assert scales.shape == blocks.shape[:-1]


@pytest.fixture
def flushed_subnormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("scale", [1, 2, 20, 240, 252])
def test_flushing_subnormals_leaves_normal_values_alone(
    scale: int, flushed_subnormals: None
) -> None:
    """Scale byte 1 halves to 2^-127, which a product with it would lose."""
    factor = math.ldexp(1.0, scale - E8M0_BIAS)
    values = torch.tensor([3.25, -3.25, 2.0, 1.0]).repeat(8)
    values[2] = 3.0
    scaled = values.double().mul(factor).float()
    flushed = quantize(scaled, scale_rule="search")
    torch.set_flush_denormal(False)
    for got, wanted in zip(flushed, quantize(scaled, scale_rule="search"), strict=True):
        assert torch.equal(got, wanted)


# --- the argument


def test_max_is_the_default() -> None:
    values = heavy_tailed(64)
    for got, wanted in zip(quantize(values), quantize(values, scale_rule="max"), strict=True):
        assert torch.equal(got, wanted)
    assert SCALE_RULES == ("max", "search")


def test_an_unknown_rule_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"'mse'.*max or search"):
        quantize(torch.ones(BLOCK), scale_rule="mse")
