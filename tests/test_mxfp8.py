"""MXFP8 numbers against their definition, ml_dtypes and torch, and natively against these."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from allocations import LargestAllocation
from implementations import CPU_PATHS, chosen
from torch import Tensor

from mxfp4_fx.core.formats import BLOCK, SLAB_VALUES
from mxfp4_fx.core.mxfp8 import DTYPES, E4M3_MAX, dequantize, quantize
from mxfp4_fx.ops import cpu_mxfp8

ONE = 127  # the scale byte of 1


def value_of(code: int) -> float:
    """MX 5.3.1: sign, four exponent bits of bias 7, three mantissa bits; 0x7f and 0xff are NaN."""
    sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return sign * size


CODES = torch.arange(256, dtype=torch.uint8)
VALUES = torch.tensor([value_of(code) for code in range(256)], dtype=torch.float64)
POSITIVE = VALUES[:127]  # in order, up to 448


def of_all_codes(scale: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return dequantize(CODES, torch.full((256 // BLOCK,), scale, dtype=torch.uint8), dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, in the signs of zeros too; a NaN equals a NaN."""
    numbers = ~a.isnan()
    is_same = torch.equal(a.isnan(), b.isnan()) and torch.equal(a[numbers], b[numbers])
    return is_same and torch.equal(a.signbit()[numbers], b.signbit()[numbers])


def test_all_codes() -> None:
    assert VALUES.nan_to_num(0).abs().max() == E4M3_MAX
    assert same(of_all_codes(ONE).double(), VALUES)
    by_numpy = CODES.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert same(torch.from_numpy(by_numpy), VALUES)
    assert same(CODES.view(torch.float8_e4m3fn).double(), VALUES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_scales(dtype: torch.dtype) -> None:
    """The float64 product is exact, and rounds once: to float32, where that is the dtype, or on."""
    for scale in range(255):
        exact = (VALUES * 2.0 ** (scale - 127)).float()
        assert same(of_all_codes(scale, dtype), exact.to(dtype))
    assert of_all_codes(255, dtype).isnan().all()


def nearest(values: Tensor) -> Tensor:
    """The codes of float64 values up to 448: by search among all, ties to the even mantissa."""
    distance = (values.abs()[:, None] - POSITIVE).abs()
    least = distance.amin(1, keepdim=True)
    is_tied = distance == least
    even = torch.arange(127) % 2 == 0
    first = is_tied.int().argmax(1)
    chosen_ = torch.where((is_tied & even).any(1), (is_tied & even).int().argmax(1), first)
    return (chosen_ | values.signbit().int() << 7).to(torch.uint8)


def test_rounding_is_to_nearest_even() -> None:
    """Every value, every midpoint of neighbours, and what lies next to a midpoint."""
    middle = (POSITIVE[1:] + POSITIVE[:-1]) / 2
    near = [middle, middle * (1 + 2.0**-20), middle * (1 - 2.0**-20), POSITIVE]
    values = torch.cat([*near, *(-part for part in near)])
    # In each block 448 fixes the scale.
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    blocks = torch.cat([torch.full((len(blocks), 1), E4M3_MAX, dtype=torch.float64), blocks], dim=1)
    codes, scales = quantize(blocks.float())
    assert (scales == ONE).all()
    assert torch.equal(codes.flatten(), nearest(blocks.flatten()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_is_the_smallest_that_saturates_nothing(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 12, (500, 1), generator=generator).double()
    values = (torch.randn(500, BLOCK, generator=generator).double() * 2**exponents).to(dtype)
    values[0], values[0, 3] = 0, 448.0
    values[1], values[1, 3] = 0, torch.nextafter(torch.tensor(448.0), torch.tensor(500.0)).to(dtype)
    codes, scales = quantize(values)
    scale = torch.exp2(scales.double() - 127)
    largest = values.double().abs().amax(1, keepdim=True)
    assert (largest <= E4M3_MAX * scale).all()
    assert (largest > E4M3_MAX * scale / 2).all()
    assert torch.equal(codes, nearest((values.double() / scale).flatten()).view_as(codes))


def test_tiny_and_large_values() -> None:
    """The scale is 2^-127 at least, and up to 2^120; 248 times that rounds to infinity."""
    values = torch.zeros(4, BLOCK)
    values[:, 0] = torch.tensor([2.0**-149, 2.0**-120, 1.8 * 2.0**127, 248 * 2.0**120])
    codes, scales = quantize(values)
    assert scales.flatten().tolist() == [0, 0, 247, 247]
    exact = values[:, 0].double() / torch.exp2(scales[:, 0].double() - 127)
    assert torch.equal(codes[:, 0], nearest(exact))
    assert dequantize(codes, scales, torch.float32)[:, 0].isinf().tolist() == [False] * 3 + [True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_block_that_is_not_finite_is_nan(value: float) -> None:
    values = torch.ones(2, 2 * BLOCK)
    values[1, 40] = value
    codes, scales = quantize(values)
    assert scales.tolist() == [[ONE - 8, ONE - 8], [ONE - 8, 255]]
    assert not codes[1, BLOCK:].any()
    again = dequantize(codes, scales, torch.bfloat16)
    assert again[1, BLOCK:].isnan().all()
    assert torch.equal(again[0], values[0].bfloat16())


def test_zeros_keep_their_signs() -> None:
    values = torch.zeros(1, BLOCK)
    values[0, 1] = -0.0
    codes, scales = quantize(values)
    assert scales.item() == ONE
    assert codes[0, :3].tolist() == [0, 0x80, 0]


def test_errors() -> None:
    with pytest.raises(TypeError, match="float64"):
        quantize(torch.zeros(32).double())
    with pytest.raises(ValueError, match="blocks of 32"):
        quantize(torch.zeros(2, 33))
    with pytest.raises(TypeError, match="float64"):
        dequantize(CODES, torch.zeros(8, dtype=torch.uint8), torch.float64)
    with pytest.raises(ValueError, match="do not belong together"):
        dequantize(CODES, torch.zeros(7, dtype=torch.uint8), torch.float32)
    with pytest.raises(TypeError, match="uint8"):
        dequantize(CODES.int(), torch.zeros(8, dtype=torch.uint8), torch.float32)


def test_temporaries_are_slabs() -> None:
    values = torch.ones(4 * SLAB_VALUES // 1024, 1024, dtype=torch.bfloat16)
    with LargestAllocation() as quantizing:
        codes, scales = quantize(values)
    with LargestAllocation() as dequantizing:
        again = dequantize(codes, scales, torch.bfloat16)
    assert quantizing.bytes_besides(values, codes) <= 4 * SLAB_VALUES  # a slab in float32
    assert dequantizing.bytes_besides(codes, again) <= 4 * SLAB_VALUES


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_conversions_are_the_same(path: str, dtype: torch.dtype) -> None:
    """Of an odd number of blocks, of rows with gaps, and of every scale that values have."""
    generator = torch.Generator().manual_seed(1)
    most = 15 if dtype == torch.float16 else 127
    exponents = torch.arange(-149 if dtype != torch.float16 else -24, most + 1)
    values = torch.randn(len(exponents), 200, generator=generator).double()
    values *= 2.0 ** exponents[:, None]
    limit = torch.finfo(dtype).max
    values = values.clamp(-limit, limit).to(dtype)[:, 5:101]
    values[3, 40], values[4, 70] = torch.inf, torch.nan
    expected = quantize(values)
    with chosen(f"cpu:{path}"):
        found = tuple(torch.full_like(part, 77) for part in expected)
        cpu_mxfp8.quantize(values[None], *found)
        assert all(map(torch.equal, found, expected))
        for to in DTYPES:
            again = torch.empty(values.shape, dtype=to)
            cpu_mxfp8.dequantize(*expected, again)
            assert same(again, dequantize(*expected, to))


@pytest.mark.parametrize("path", CPU_PATHS)
def test_native_nan_codes(path: str) -> None:
    with chosen(f"cpu:{path}"):
        values = torch.empty(1, 256)
        scales = torch.full((1, 8), ONE, dtype=torch.uint8)
        cpu_mxfp8.dequantize(CODES[None], scales, values)
    assert same(values[0].double(), VALUES)
