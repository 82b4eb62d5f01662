"""MXFP4 numbers against the types of ml_dtypes, and against their definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from allocations import LargestAllocation, OutOfMemoryOnce
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mxfp4_fx.core import formats
from mxfp4_fx.core.formats import (
    BLOCK,
    BYTES_PER_BLOCK,
    E2M1_MAX,
    E2M1_VALUES,
    E8M0_BIAS,
    E8M0_NAN,
    SCALE_RULES,
    count_nan,
    dequantize,
    pack,
    quantize,
    unpack,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# MX 5.3.3: sign, exponent and mantissa, and the value they stand for.
E2M1_TABLE = [
    (0b0000, "+0.0"),
    (0b0001, "+0.5"),
    (0b0010, "+1.0"),
    (0b0011, "+1.5"),
    (0b0100, "+2.0"),
    (0b0101, "+3.0"),
    (0b0110, "+4.0"),
    (0b0111, "+6.0"),
    (0b1000, "-0.0"),
    (0b1001, "-0.5"),
    (0b1010, "-1.0"),
    (0b1011, "-1.5"),
    (0b1100, "-2.0"),
    (0b1101, "-3.0"),
    (0b1110, "-4.0"),
    (0b1111, "-6.0"),
]


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal in shape, dtype and every bit (so in the sign of zeros); all NaNs count as one."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[expected.element_size()]
    wrong = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    wrong &= ~(actual.isnan() & expected.isnan())
    assert not wrong.any(), f"{int(wrong.sum())} differ, first at {wrong.nonzero()[0].tolist()}"


def every_code_and_scale() -> tuple[Tensor, Tensor]:
    """One block a scale byte, [256, 1, 16] and [256, 1], with all 16 codes in each, twice."""
    blocks = pack(torch.arange(16, dtype=torch.uint8).repeat(2)).expand(256, 1, -1).contiguous()
    return blocks, torch.arange(256, dtype=torch.uint8)[:, None]


def reference_dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    codes = np.stack([blocks.numpy() & 0xF, blocks.numpy() >> 4], axis=-1)
    elements = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factors = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    with np.errstate(over="ignore"):
        single = (elements * factors[..., None, None]).astype(np.float32)
        if dtype == torch.float16:
            single = single.astype(np.float16)
    if dtype == torch.bfloat16:
        single = single.astype(ml_dtypes.bfloat16).view(np.int16)
    return torch.from_numpy(single).view(dtype).flatten(-3)


def random_mxfp4(*shape: int) -> tuple[Tensor, Tensor]:
    """Blocks and scales of values [*shape], of the magnitudes that weights have."""
    generator = torch.Generator().manual_seed(0)
    *lead, k = shape
    blocks = torch.randint(0, 256, (*lead, k // BLOCK, BYTES_PER_BLOCK), generator=generator)
    scales = torch.randint(115, 125, (*lead, k // BLOCK), generator=generator)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def random_values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(dtype)


def in_block_with(values: Tensor, largest: float) -> Tensor:
    """[n, 32]: each value in a block of its own, whose scale `largest` determines."""
    block = values.new_full((len(values), BLOCK), largest)
    block[:, 1:] = values[:, None]
    return block


# --- constants, pack, unpack


@pytest.mark.parametrize(("code", "value"), E2M1_TABLE)
def test_every_code_has_the_value_of_the_specification(code: int, value: str) -> None:
    assert f"{E2M1_VALUES[code]:+}" == value


def test_constants_are_those_of_the_reference_types() -> None:
    assert len(E2M1_VALUES) == 16
    assert max(E2M1_VALUES) == E2M1_MAX == float(ml_dtypes.finfo(ml_dtypes.float4_e2m1fn).max)
    scales = np.array([E8M0_BIAS, E8M0_NAN], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    assert scales[0] == 1
    assert np.isnan(scales[1])


def test_the_low_nibble_is_the_even_element() -> None:
    packed = torch.tensor([0x21, 0x43], dtype=torch.uint8)
    codes = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert unpack(packed).tolist() == codes.tolist()
    assert pack(codes).tolist() == packed.tolist()


def test_unpack_inverts_pack_for_every_byte() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(2, 4, 32)
    assert unpack(every_byte).shape == (2, 4, 64)
    assert torch.equal(pack(unpack(every_byte)), every_byte)


BYTE_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "columns": lambda x: x[:, 1:9],
    "every second": lambda x: x[:, ::2],
    "odd start": lambda x: x[1:2, 3:5],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("name", BYTE_VIEWS)
def test_pack_and_unpack_take_any_strides(name: str) -> None:
    codes = BYTE_VIEWS[name](torch.arange(192, dtype=torch.uint8).reshape(12, 16) % 16)
    assert torch.equal(pack(codes), codes[..., 0::2] + 16 * codes[..., 1::2])
    assert torch.equal(unpack(codes), torch.stack([codes & 15, codes >> 4], -1).flatten(-2))


# --- dequantize


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_exact_for_every_code_and_scale(dtype: torch.dtype) -> None:
    blocks, scales = every_code_and_scale()
    assert_same_bits(dequantize(blocks, scales, dtype), reference_dequantize(blocks, scales, dtype))


def test_dequantize_gives_bfloat16_unless_told_otherwise() -> None:
    assert dequantize(*random_mxfp4(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32,), (5, 64), (2, 3, 96), (2, 1, 3, 32)])
def test_dequantize_keeps_leading_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    blocks, scales = random_mxfp4(*shape)
    assert_same_bits(dequantize(blocks, scales, dtype), reference_dequantize(blocks, scales, dtype))


@pytest.mark.parametrize("slab_values", [1, 32, 96, 128, 1000])
def test_slabs_do_not_change_what_dequantize_gives(
    slab_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, scales = random_mxfp4(3, 7, 160)
    whole = dequantize(blocks, scales)
    monkeypatch.setattr(formats, "SLAB_VALUES", slab_values)
    assert_same_bits(dequantize(blocks, scales), whole)


def test_dequantize_takes_blocks_of_any_strides() -> None:
    blocks, scales = random_mxfp4(6, 3, 64)
    transposed = dequantize(blocks.transpose(0, 1), scales.transpose(0, 1))
    assert_same_bits(transposed, dequantize(blocks, scales).transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_fills_a_transposed_out(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "SLAB_VALUES", 256)
    blocks, scales = random_mxfp4(2, 10, 96)
    parameter = torch.empty(2, 96, 10, dtype=dtype)
    out = parameter.transpose(1, 2)
    assert dequantize(blocks, scales, dtype, out=out) is out
    assert_same_bits(parameter, reference_dequantize(blocks, scales, dtype).transpose(1, 2))


def test_dequantize_fills_an_out_that_starts_at_an_odd_element() -> None:
    blocks, scales = random_mxfp4(3, 64)
    storage = torch.zeros(1 + 3 * 64 + 1, dtype=torch.bfloat16)
    dequantize(blocks, scales, out=storage[1:-1].view(3, 64))
    assert_same_bits(storage[1:-1].view(3, 64), dequantize(blocks, scales))
    assert storage[0] == storage[-1] == 0


def test_dequantize_into_a_parameter_counts_as_a_change_of_it() -> None:
    parameter = torch.nn.Parameter(torch.empty(64, 3))
    before = parameter._version
    dequantize(*random_mxfp4(3, 64), torch.float32, out=parameter.t())
    assert parameter._version > before
    assert parameter.grad_fn is None


@pytest.mark.parametrize("operator", ["new_empty", "arange", "gather"])
def test_dequantize_goes_on_after_an_out_of_memory_error(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_pair_tables", {})
    blocks, scales = random_mxfp4(4, 64)
    with OutOfMemoryOnce(operator) as device:
        values = dequantize(blocks, scales)
    assert device.failed
    assert_same_bits(values, reference_dequantize(blocks, scales, torch.bfloat16))


# --- quantize: the scale


def smallest_scale_that_fits(amax: float) -> int:
    """The definition, in exact rational arithmetic of Python floats (float64)."""
    exponent = -E8M0_BIAS
    while amax > E2M1_MAX * math.ldexp(1.0, exponent):
        exponent += 1
    return exponent + E8M0_BIAS


def largest_magnitudes(dtype: torch.dtype) -> Tensor:
    """Around every power of two of the dtype: where the scale steps, and both neighbours."""
    info = torch.finfo(dtype)
    limits = [math.ldexp(m, e) for e in range(-152, 130) for m in (1.0, 1.25, 1.5, 1.75)]
    inside = [limit for limit in limits if info.smallest_normal / 64 < limit <= info.max]
    values = torch.tensor([*inside, info.max], dtype=torch.float64).to(dtype)
    up, down = (torch.nextafter(values, values.new_tensor(to)) for to in (math.inf, 0.0))
    values = torch.cat([values, up, down])
    return values[values.isfinite() & (values > 0)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_is_the_smallest_that_fits_the_largest_element(
    dtype: torch.dtype, sign: int
) -> None:
    amax = largest_magnitudes(dtype)
    block = torch.zeros(len(amax), BLOCK, dtype=dtype)
    block[torch.arange(len(amax)), torch.arange(len(amax)) % BLOCK] = sign * amax
    _, scales = quantize(block)
    assert scales[:, 0].tolist() == [smallest_scale_that_fits(value) for value in amax.tolist()]


def test_no_element_is_further_off_than_half_a_step() -> None:
    """So nothing saturates: the widest step, from 4 to 6, is two scales wide."""
    values = random_values(512, 64)
    blocks, scales = quantize(values)
    error = (dequantize(blocks, scales, torch.float32).double() - values.double()).abs()
    half_step = (scales.double() - E8M0_BIAS).exp2().repeat_interleave(BLOCK, dim=-1)
    assert (error <= half_step).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("scale_rule", "where"), [("max", 0), ("max", 31), ("search", 17)])
def test_a_block_with_a_nan_or_an_infinity_is_nan(
    bad: float, scale_rule: str, where: int, dtype: torch.dtype
) -> None:
    values = random_values(3, 96, dtype=dtype)
    blocks_before, scales_before = quantize(values, scale_rule=scale_rule)
    values[1, 32 + where] = bad
    blocks, scales = quantize(values, scale_rule=scale_rule)
    scales_before[1, 1] = E8M0_NAN
    blocks_before[1, 1] = 0
    assert torch.equal(scales, scales_before)
    assert torch.equal(blocks, blocks_before)


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_of_zeros_has_scale_one_and_keeps_its_signs(
    dtype: torch.dtype, scale_rule: str
) -> None:
    values = torch.tensor([0.0, -0.0], dtype=dtype).repeat(32).view(2, 32)
    blocks, scales = quantize(values, scale_rule=scale_rule)
    assert scales.tolist() == [[E8M0_BIAS], [E8M0_BIAS]]
    assert (blocks == 0x80).all()


# --- quantize: the elements


def grid_with_midpoints(dtype: torch.dtype) -> Tensor:
    """[-6, 6] in steps of 2^-8, every midpoint of two codes, and what is next to each of them."""
    magnitudes = torch.tensor(sorted(set(map(abs, E2M1_VALUES))), dtype=dtype)
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
    edges = torch.cat([magnitudes, midpoints])
    near = [torch.nextafter(edges, edges.new_tensor(to)) for to in (math.inf, -math.inf)]
    tiny = edges.new_tensor([torch.finfo(dtype).smallest_normal, 2.0**-12, 2.0**-23])
    dense = torch.arange(0, 6 * 256 + 1, dtype=torch.float64).div(256).to(dtype)
    positive = torch.cat([edges, *near, tiny, dense]).clamp(0, E2M1_MAX)
    return torch.cat([positive, -positive])


def reference_codes(values: Tensor) -> Tensor:
    rounded = values.double().numpy().astype(ml_dtypes.float4_e2m1fn)
    return torch.from_numpy(rounded.view(np.uint8).copy())


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((torch.float32, scale) for scale in (0, 1, 60, 127, 240, 253)),
        *((torch.bfloat16, scale) for scale in (0, 1, 60, 127, 240, 253)),
        (torch.float16, 127),  # it has no room for the grid under a scale far off
    ],
)
def test_elements_round_to_nearest_even(dtype: torch.dtype, scale: int) -> None:
    grid = grid_with_midpoints(dtype)
    largest = 3.25  # between 3 and 6: the scale is as asked; finite under byte 253 too
    grid = torch.cat([grid[grid.abs() <= largest]] if scale == 253 else [grid])
    factor = math.ldexp(1.0, scale - E8M0_BIAS)
    scaled = in_block_with(grid.double(), largest).mul(factor).to(dtype)
    blocks, scales = quantize(scaled)
    assert (scales == scale).all()
    expected = reference_codes(scaled.double() / factor)
    assert torch.equal(unpack(blocks).flatten(-2), expected)


def test_a_tie_goes_to_the_code_with_mantissa_zero() -> None:
    ties = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    block = in_block_with(torch.tensor([*ties]), E2M1_MAX)
    assert dequantize(*quantize(block))[:, 1].tolist() == [*ties.values()]


def test_float32_is_rounded_once() -> None:
    """Just off a midpoint, by less than float16 or bfloat16 can tell."""
    block = in_block_with(torch.tensor([0.75 - 2**-24, 0.75, 2.5, 2.5 + 2**-22]), E2M1_MAX)
    assert dequantize(*quantize(block))[:, 1].tolist() == [0.5, 1.0, 2.0, 3.0]


# --- quantize of what is MXFP4 already


@pytest.mark.parametrize(
    ("dtype", "lossless"),
    [
        (torch.float32, range(253)),
        (torch.bfloat16, range(253)),
        (torch.float16, range(104, 141)),
    ],
)
def test_mxfp4_values_come_back_equal(dtype: torch.dtype, lossless: range) -> None:
    """Every scale byte, with all codes and with those up to each magnitude only."""
    for largest in range(8):
        codes = torch.arange(16, dtype=torch.uint8).repeat(2)
        codes = (codes & 8) | (codes & 7).clamp(max=largest)
        scales = torch.arange(256, dtype=torch.uint8)[:, None]
        values = dequantize(pack(codes).expand(256, 1, -1), scales, dtype)
        again = dequantize(*quantize(values), dtype)
        for byte in (*lossless, E8M0_NAN):
            assert_same_bits(again[byte], values[byte])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "fits"), [(253, 5), (254, 3)])
def test_the_top_scales_are_lossless_up_to_the_last_finite_code(
    dtype: torch.dtype, scale: int, fits: int
) -> None:
    scales = torch.tensor([scale], dtype=torch.uint8)
    for largest in range(8):
        codes = torch.arange(32, dtype=torch.uint8).clamp(max=largest)
        values = dequantize(pack(codes)[None], scales, dtype)
        assert values.isfinite().all() == (largest <= fits)
        again = dequantize(*quantize(values), dtype)
        assert_same_bits(again, values if largest <= fits else torch.full_like(values, math.nan))


def test_quantize_gives_back_the_bytes_of_blocks_with_a_large_element() -> None:
    blocks, scales = random_mxfp4(16, 320)
    blocks[..., 0] = blocks[..., 0] & 0x80 | 0x17  # elements 6 and +-1
    for dtype in (torch.float32, torch.bfloat16):
        again = quantize(dequantize(blocks, scales, dtype))
        assert torch.equal(again[0], blocks)
        assert torch.equal(again[1], scales)


# --- quantize of views, in slabs


VIEWS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: random_values(96, 10).t(),
    "batched transposed": lambda: random_values(3, 64, 6).transpose(1, 2),
    "one expert transposed": lambda: random_values(3, 64, 6)[1].transpose(0, 1),
    "every second K": lambda: random_values(5, 128)[:, ::2],
    "a slice of rows": lambda: random_values(5, 65)[:, 1:],
    "expanded": lambda: random_values(1, 64).expand(4, 64),
    "one row of a transposed": lambda: random_values(64, 6).t()[2:3],
    "leading dimensions swapped": lambda: random_values(3, 4, 32).transpose(0, 1),
    "one dimension": lambda: random_values(64, 2)[:, 1],
}


@pytest.mark.parametrize("slab_values", [1, 64, 200, 1 << 20])
@pytest.mark.parametrize("name", VIEWS)
def test_quantize_gives_a_view_the_bytes_of_its_copy(
    name: str, slab_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = VIEWS[name]()
    blocks, scales = quantize(view.clone(memory_format=torch.contiguous_format))
    monkeypatch.setattr(formats, "SLAB_VALUES", slab_values)
    slab_blocks, slab_scales = quantize(view)
    assert torch.equal(slab_blocks, blocks)
    assert torch.equal(slab_scales, scales)
    assert slab_blocks.is_contiguous()
    assert slab_scales.is_contiguous()


def test_quantize_of_a_parameter_builds_no_autograd_graph() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        blocks, scales = quantize(torch.nn.Parameter(random_values(4, 32)))
    assert not saved
    assert not blocks.requires_grad
    assert not scales.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_of_a_transposed_parameter_stays_within_the_slab(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "SLAB_VALUES", 2048)
    weight = random_values(2, 128, 96, dtype=dtype)
    with LargestAllocation() as allocations:
        blocks, scales = quantize(weight.transpose(1, 2))
    assert allocations.bytes_besides(weight, blocks, scales) <= 4 * formats.SLAB_VALUES


def test_dequantize_into_a_transposed_parameter_stays_within_the_slab(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(formats, "SLAB_VALUES", 1 << 16)
    blocks, scales = random_mxfp4(2, 512, 512)
    weight = torch.empty(2, 512, 512)
    with LargestAllocation() as allocations:
        dequantize(blocks, scales, torch.float32, out=weight.transpose(1, 2))
    table = 256 * 256 * 2 * 4  # both values of every byte under every scale
    assert allocations.bytes_besides(weight, blocks, scales) <= max(table, 4 * formats.SLAB_VALUES)


# --- devices and modes


SHAPES = [(0,), (0, 64), (3, 0, 64), (3, 0), (2, 5, 96)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_on_every_kind_of_device(device: str, shape: tuple[int, ...]) -> None:
    values = torch.empty(shape, device=device)
    blocks, scales = quantize(values)
    groups = shape[-1] // BLOCK
    assert blocks.shape == (*shape[:-1], groups, BYTES_PER_BLOCK)
    assert scales.shape == (*shape[:-1], groups)
    assert unpack(blocks).shape == (*shape[:-1], groups, BLOCK)
    assert pack(unpack(blocks)).shape == blocks.shape
    assert dequantize(blocks, scales).shape == shape
    assert {blocks.device.type, scales.device.type} == {device}


def test_fake_tensors_go_through() -> None:
    with FakeTensorMode():
        blocks, scales = quantize(torch.empty(2, 64, 6).transpose(1, 2))
        values = dequantize(blocks, scales, torch.float16)
    assert values.shape == (2, 6, 64)
    assert values.dtype == torch.float16
    assert_same_bits(  # nothing fake stays behind
        dequantize(*every_code_and_scale()),
        reference_dequantize(*every_code_and_scale(), torch.bfloat16),
    )


@pytest.fixture
def flushed_subnormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flushing_subnormals_changes_no_normal_value(
    dtype: torch.dtype, flushed_subnormals: None
) -> None:
    blocks, scales = every_code_and_scale()
    values = dequantize(blocks, scales, dtype)
    torch.set_flush_denormal(False)
    expected = reference_dequantize(blocks, scales, dtype)
    normal = ~(expected.abs() < torch.finfo(dtype).smallest_normal) | (expected == 0)
    assert_same_bits(values[normal], expected[normal])


@pytest.mark.parametrize("scale", [0, 1, 2, 20, 240, 253])
def test_flushing_subnormals_leaves_quantize_of_normal_values_alone(
    scale: int, flushed_subnormals: None
) -> None:
    factor = math.ldexp(1.0, scale - E8M0_BIAS)
    values = torch.tensor([2.0, 3.0, -2.0, 3.25]).repeat(8).double().mul(factor).float()
    blocks, scales = quantize(values)
    assert scales.tolist() == [scale]
    assert unpack(blocks).flatten().tolist() == [4, 5, 12, 5] * 8


# --- errors


@pytest.mark.parametrize(
    ("function", "argument", "error", "message"),
    [
        (quantize, torch.ones(3, 33), ValueError, r"\[3, 33\].*transpose.*pad"),
        (quantize, torch.tensor(1.0), ValueError, r"\[\]"),
        (quantize, torch.ones(32).to(torch.int8), TypeError, "int8.*convert"),
        (quantize, torch.ones(32).double(), TypeError, "float64.*convert"),
        (pack, torch.ones(4), TypeError, "codes must be uint8, not torch.float32"),
        (pack, torch.ones(2, 3).byte(), ValueError, r"\[2, 3\].*even"),
        (pack, torch.tensor(1).byte(), ValueError, r"\[\].*even"),
        (unpack, torch.ones(4), TypeError, "packed must be uint8"),
        (unpack, torch.tensor(1).byte(), ValueError, r"\[\.\.\., B\]"),
    ],
)
def test_errors_name_what_is_wrong(
    function: Callable[[Tensor], object], argument: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(argument)


BLOCKS, SCALES = random_mxfp4(2, 64)


@pytest.mark.parametrize(
    ("blocks", "scales", "kwargs", "error", "message"),
    [
        (BLOCKS.int(), SCALES, {}, TypeError, "blocks must be uint8, not torch.int32"),
        (BLOCKS, SCALES.float(), {}, TypeError, "scales must be uint8, not torch.float32"),
        (BLOCKS[:1], SCALES, {}, ValueError, r"\[1, 2, 16\] and scales \[2, 2\]"),
        (BLOCKS[..., :8], SCALES, {}, ValueError, r"\[2, 2, 8\] and scales \[2, 2\]"),
        (BLOCKS[0, 0], SCALES[0, 0], {}, ValueError, r"\[16\] and scales \[\]"),
        (BLOCKS, SCALES.to("meta"), {}, ValueError, "cpu.*meta.*one device"),
        (BLOCKS, SCALES, {"dtype": torch.float64}, TypeError, "float64.*convert"),
        (BLOCKS, SCALES, {"out": torch.ones(2, 64)}, TypeError, "pass dtype=torch.float32"),
        (BLOCKS, SCALES, {"out": torch.ones(64, 2)}, ValueError, r"\[64, 2\].*\[2, 64\]"),
    ],
)
def test_dequantize_errors_name_what_is_wrong(
    blocks: Tensor, scales: Tensor, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dequantize(blocks, scales, **kwargs)


@pytest.mark.parametrize(("spoiled", "count"), [((), 0), ((1,), 30), ((0, 2), 60)])
def test_nan_blocks_are_counted(spoiled: tuple[int, ...], count: int) -> None:
    scales = torch.full((3, 5, 6), E8M0_NAN - 1, dtype=torch.uint8)
    scales[[*spoiled]] = E8M0_NAN
    assert count_nan(scales) == count
    assert count_nan(scales[:0]) == 0


def test_a_kept_table_is_not_given_to_fake_tensors() -> None:
    blocks, scales = random_mxfp4(3, 64)
    dequantize(blocks, scales, torch.float32)
    with FakeTensorMode() as mode:
        fake = dequantize(mode.from_tensor(blocks), mode.from_tensor(scales), torch.float32)
    assert fake.shape == (3, 64)
    assert dequantize(blocks, scales, torch.float32).isfinite().any()
