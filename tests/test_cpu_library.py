"""The C functions of the CPU's library (api.h), one by one, on every path that runs here.

What is exact is compared bit for bit, with outputs that held other bytes before and with several
numbers of threads.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import struct
from ctypes import c_int32, c_int64, c_void_p

import oracle
import processes
import pytest
import torch
from combinations import covering, exhaustive
from models import DTYPES
from oracle import assert_within, random_logits, random_routes
from torch import Tensor

from mxfp4_fx.core import formats
from mxfp4_fx.core.hardware import runnable_paths
from mxfp4_fx.core.layouts import LAYOUTS
from mxfp4_fx.ops import native, reference

PANELS = LAYOUTS["cpu_panels"]
CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 0, torch.int64: 1}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
THREADS = (1, 2, 5)

Pair = tuple[Tensor, Tensor]
Routes = tuple[Tensor, ...]


class Library:
    """The functions with tensors for arguments."""

    def __init__(self, path: str) -> None:
        self.functions = native.load(path)

    def call(self, name: str, *arguments: Tensor | int) -> None:
        status = self.status(name, *arguments)
        assert status == 0, os.strerror(status)

    def status(self, name: str, *arguments: Tensor | int) -> int:
        """Numbers are int64_t, but for dtypes and threads, which a caller passes as c_int32."""
        values = (
            c_void_p(a.data_ptr())
            if isinstance(a, Tensor)
            else (c_int64(a) if isinstance(a, int) else a)
            for a in arguments
        )
        return int(getattr(self.functions, name)(*values))

    def quantize(self, values: Tensor, threads: int = 1, out: Pair | None = None) -> Pair:
        """Values [E, N, K], or pairs of rows [E, N/2, 2, K], of any strides."""
        if values.ndim == 3:
            (e, n, k), (of_e, of_n, of_k) = values.shape, values.stride()
            strides = of_e, 2 * of_n, of_n, of_k
        else:
            (e, pairs, _, k), strides = values.shape, values.stride()
            n = 2 * pairs
        out = dirty_panels(e, n, k) if out is None else out
        sizes = e, n, k, *strides
        dtype = c_int32(CODE[values.dtype])
        self.call("mxfp4_quantize", values, dtype, *sizes, *out, c_int32(threads))
        return out

    def swizzle(
        self, blocks: Tensor, scales: Tensor, threads: int = 1, concatenated: bool = False
    ) -> Pair:
        e, n, groups = scales.shape
        out = dirty_panels(e, n, 32 * groups)
        sizes = (e, n, 32 * groups, *((1, n // 2) if concatenated else (2, 1)))
        self.call("mxfp4_swizzle", blocks, scales, *sizes, *out, c_int32(threads))
        return out

    def unswizzle(self, panels: Tensor, n: int, k: int, threads: int = 1) -> Pair:
        e = panels.shape[0]
        out = dirty(e, n, k // 32, 16), dirty(e, n, k // 32)
        self.call("mxfp4_unswizzle", panels, e, n, k, *out, c_int32(threads))
        return out

    def routing(
        self, logits: Tensor, top_k: int, threads: int = 1, first: int = 0, held: int | None = None
    ) -> Routes:
        t, e = logits.shape
        held = e if held is None else held
        out = dirty_routes(t * top_k, held)
        sizes = (t, logits.stride(0), e, top_k, held, first)
        assert self.route(logits, out, *sizes, threads=threads) == 0
        return out

    def route(self, logits: Tensor, out: Routes, *sizes: int, threads: int = 1) -> int:
        """The status of ``mxfp4_routing``; ``sizes`` as in ``mxfp4_router``."""
        pointers = (part.data_ptr() for part in (logits, *out))
        numbers = *sizes, CODE[logits.dtype], threads
        return int(self.functions.mxfp4_routing(struct.pack("5P6q2i", *pointers, *numbers)))

    def routes(
        self, ids: Tensor, weights: Tensor, experts: int, first: int = 0, threads: int = 1
    ) -> Routes:
        ids, weights = ids.contiguous(), weights.contiguous()
        out = dirty_routes(ids.numel(), experts)
        inputs = ids, c_int32(CODE[ids.dtype]), weights, c_int32(CODE[weights.dtype])
        sizes = (*ids.shape, experts, first)
        self.call("mxfp4_routing_routes", *inputs, *sizes, *out, c_int32(threads))
        return out


@pytest.fixture(scope="module", params=runnable_paths())
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)


def dirty(*shape: int) -> Tensor:
    return torch.full(shape, 0xA5, dtype=torch.uint8)


def dirty_panels(e: int, n: int, k: int) -> Pair:
    panels, flags = PANELS.shapes(n, k)
    return dirty(e, *panels), dirty(e, *flags)


def dirty_routes(rows: int, experts: int) -> Routes:
    indices = [torch.full((size,), -77, dtype=torch.int32) for size in (rows, rows, experts + 1)]
    return torch.full((rows,), -77.0), *indices


def each_expert(blocks: Tensor, scales: Tensor) -> Pair:
    """[E, N, K/32, 16] and [E, N, K/32] swizzled in Python."""
    e, n, groups = scales.shape
    out = PANELS.empty(e, n, 32 * groups, torch.device("cpu"))
    for expert in range(e):
        for room, part in zip(out, PANELS.swizzle(blocks[expert], scales[expert]), strict=True):
            room[expert] = part
    return out


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


# ---- quantize

SIZES = [(2, 64, 128), (3, 70, 160), (1, 33, 32), (2, 1, 64), (1, 2, 32), (1, 300, 96)]  # E, N, K


def orders(values: Tensor) -> dict[str, Tensor]:
    """The same [E, N, K] values in several orders of memory; also as pairs of rows."""
    e, n, k = values.shape
    spread = values.new_empty((e, 2 * n, 3 * k))[:, ::2, 1::3]
    of_pairs = {}
    if n % 2 == 0:
        pairs = values.unflatten(1, (-1, 2))
        of_pairs = {
            "gates before ups": pairs.transpose(1, 2).contiguous().transpose(1, 2),
            "gates are neighbours": pairs.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
        }
    return {
        **of_pairs,
        "rows are neighbours": values.transpose(1, 2).contiguous().transpose(1, 2),
        "columns are neighbours": values.contiguous(),
        "experts are neighbours": values.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "no neighbours": spread.copy_(values),
    }


def assert_quantizes(library: Library, values: Tensor, threads: tuple[int, ...] = THREADS) -> None:
    expected = each_expert(*formats.quantize(values))
    for ordered in orders(values).values():
        for count in threads:
            assert_same_bits(library.quantize(ordered, count), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_quantize_gives_the_bits_of_formats(
    library: Library, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    assert_quantizes(library, torch.randn(size).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rounds_every_bit_pattern(library: Library, dtype: torch.dtype) -> None:
    # All of 16 bits, so many of 32. Shifts make the large patterns of some rows rare, or none.
    width = 8 * dtype.itemsize
    patterns = torch.arange(1 << 16).view(1, 512, 128) << (width - 16)
    patterns |= torch.randint(0, 1 << (width - 16), patterns.shape)
    patterns = patterns.flatten()[torch.randperm(1 << 16)].view(1, 512, 128)
    sign = 1 << (width - 1)
    for shifts in (0, torch.arange(512).view(1, 512, 1) % (width - 1)):
        bits = (patterns & sign) | ((patterns & (sign - 1)) >> shifts)
        signed = torch.where(bits < sign, bits, bits - 2 * sign)
        assert_quantizes(library, signed.to(BITS[dtype]).view(dtype), threads=(2,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_rounds_ties_to_even_under_every_scale(
    library: Library, dtype: torch.dtype
) -> None:
    info = torch.finfo(dtype)
    lowest, highest = (math.frexp(v)[1] - 1 for v in (info.smallest_normal * info.eps, info.max))
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    ulp = info.eps * torch.exp2(ties.clamp(min=0.25).log2().floor())
    values = torch.cat([ties, ties + ulp, (ties - ulp).abs(), -ties])
    # What the scale is chosen by: E2M1's largest number and its neighbours, powers of two.
    largest = torch.tensor(
        [6, 6 * (1 + info.eps), 6 * (1 - info.eps), 4, 7.75], dtype=torch.float64
    )
    rows = values.repeat(5, 1)
    rows[:, 0] = largest
    exponents = torch.arange(lowest - 2, highest + 1, dtype=torch.float64)
    blocks = rows[None] * torch.exp2(exponents)[:, None, None]
    assert_quantizes(library, blocks.view(1, -1, 32).to(dtype), threads=(2,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, "largest", "smallest"])
def test_quantize_of_a_special_value_among_others(
    library: Library, value: float | str, dtype: torch.dtype
) -> None:
    info = torch.finfo(dtype)
    named = {"largest": -info.max, "smallest": -info.smallest_normal * info.eps}
    for others in (torch.zeros(1, 40, 64), torch.randn(1, 40, 64)):
        values = others.to(dtype)
        values[0, 5, 40] = values[0, 37, 0] = named[value] if isinstance(value, str) else value
        assert_quantizes(library, values, threads=(1,))


def test_quantize_of_no_experts_and_no_rows(library: Library) -> None:
    for shape in ((0, 40, 64), (3, 0, 64)):
        library.quantize(torch.empty(shape), 2)


# ---- swizzle

BLOCK_SIZES = [
    *((0, 5, 1), (2, 64, 4), (3, 33, 5), (1, 31, 2), (2, 6, 1), (1, 1, 3), (40, 64, 3)),
    *((1, 64, 8), (2, 70, 19)),  # groups of eight blocks, alone and with a rest
]


@pytest.mark.parametrize("size", BLOCK_SIZES)  # E, N, K / 32
def test_swizzle_and_unswizzle_are_those_of_the_layout(
    library: Library, size: tuple[int, int, int]
) -> None:
    _, n, groups = size
    blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8)
    scales = torch.randint(0, 256, size, dtype=torch.uint8)
    expected = each_expert(blocks, scales)
    for threads in THREADS:
        panels, flags = library.swizzle(blocks, scales, threads)
        assert_same_bits((panels, flags), expected)
        back = library.unswizzle(panels, n, 32 * groups, threads)
        assert_same_bits(back, (blocks, scales))
        if n % 2 == 0:
            concatenated = (
                part.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
                for part in (blocks, scales)
            )
            assert_same_bits(library.swizzle(*concatenated, threads, True), expected)


def test_panels_may_begin_at_any_byte(library: Library) -> None:
    blocks = torch.randint(0, 256, (2, 64, 9, 16), dtype=torch.uint8)
    scales = torch.randint(0, 256, (2, 64, 9), dtype=torch.uint8)
    expected = each_expert(blocks, scales)
    panels, flags = dirty_panels(2, 64, 288)
    memory = dirty(panels.numel() + 64)
    for start in (0, 1, 16, 32):
        memory.fill_(0xA5)
        panels = memory[start : start + panels.numel()].view(panels.shape)
        library.call("mxfp4_swizzle", blocks, scales, 2, 64, 288, 2, 1, panels, flags, c_int32(2))
        assert_same_bits((panels, flags), expected)
        assert (memory[:start] == 0xA5).all()
        assert (memory[start + panels.numel() :] == 0xA5).all()


@pytest.mark.parametrize("place", range(19))
@pytest.mark.parametrize("scale", [1, 253])
def test_one_scale_sets_the_flag_wherever_it_is(library: Library, place: int, scale: int) -> None:
    blocks, scales = dirty(1, 64, 19, 16), torch.full((1, 64, 19), 127, dtype=torch.uint8)
    scales[0, 32 + 31 - place, place] = scale
    assert library.swizzle(blocks, scales)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("by", ["swizzle", "quantize"])
def test_flags_are_those_of_the_layout_for_every_scale(library: Library, by: str) -> None:
    scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(33).view(256, 33, 1)
    scales[:, 1:] = 127
    blocks = torch.full((256, 33, 1, 16), 0x77, dtype=torch.uint8)
    expected = each_expert(blocks, scales)
    if by == "swizzle":
        assert_same_bits(library.swizzle(blocks, scales), expected)
    else:
        values = formats.dequantize(blocks, scales, torch.float32)[:253]  # 6 * 2^126 is infinite
        flags = library.quantize(values)[1]
        assert torch.equal(flags, expected[1][:253])


# ---- routing


@pytest.mark.parametrize(
    ("e", "dtype"),
    [
        *((e, torch.float32) for e in (1, 2, 3, 8, 17, 32, 64, 128, 513)),
        *((32, dtype) for dtype in DTYPES[1:]),
        *(exhaustive(e, torch.float32) for e in (5, 200)),
        *(exhaustive(e, dtype) for e in (1, 2, 3, 5, 8, 17, 64, 128, 200) for dtype in DTYPES[1:]),
    ],
)
def test_equal_logits_choose_the_experts_of_topk(
    library: Library, e: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(e)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    for levels in (1, 3, 50):
        logits = torch.randint(0, levels, (24, e), generator=generator).float()
        rare = torch.rand((24, e), generator=generator) < torch.arange(24)[:, None] % 3 * 0.2
        logits[rare] = special[torch.randint(0, 5, (int(rare.sum()),), generator=generator)]
        logits = logits.to(dtype)
        for k in {1, 2, 3, 4, 8, e // 64, e // 64 + 1, e // 2, e - 1, e} & {*range(1, e + 1)}:
            gammas, *indices = library.routing(logits, k, 2)
            expected, *expected_indices = reference.routing(logits, k)
            assert_same_bits(tuple(indices), tuple(expected_indices))
            assert torch.equal(gammas.isnan(), expected.isnan())
            assert torch.equal(gammas == 0, expected == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("t", "e", "k"), [(0, 4, 2), (1, 32, 4), (7, 1, 1), (9, 6, 6), (257, 128, 8)]
)
def test_gammas_are_the_softmax_of_the_chosen(
    library: Library, t: int, e: int, k: int, dtype: torch.dtype
) -> None:
    logits = random_logits(t, e, dtype)
    indices, weights = oracle.route(logits, k)
    gammas, _, scatter, _ = routes = library.routing(logits, k)
    expected = oracle.sort_routes(indices, e)
    assert [part.tolist() for part in routes[1:]] == list(expected)
    assert_within(gammas, weights.view(t * k)[scatter.long()])


def test_routing_of_rows_with_a_stride(library: Library) -> None:
    logits = random_logits(50, 24)[:, 3:12]
    assert_same_bits(library.routing(logits, 3), library.routing(logits.contiguous(), 3))


@pytest.mark.parametrize(("t", "e", "k"), [(3000, 32, 4), (700, 100, 3)])
def test_routing_is_the_same_for_any_number_of_threads(
    library: Library, t: int, e: int, k: int
) -> None:
    logits = random_logits(t, e, torch.bfloat16)
    for here in ((0, e), (e // 4, e // 2)):
        alone = library.routing(logits, k, 1, *here)
        for threads in (2, 3, 4):
            assert_same_bits(library.routing(logits, k, threads, *here), alone)


@pytest.mark.parametrize(("first", "held"), [(0, 0), (0, 3), (3, 4), (6, 9), (-(2**63), 2)])
def test_experts_elsewhere_are_chosen_and_belong_to_nobody(
    library: Library, first: int, held: int
) -> None:
    logits = random_logits(31, 7)
    expected = reference.routing(logits, 3, first, held)
    gammas, *indices = library.routing(logits, 3, 2, first, held)
    assert_same_bits(tuple(indices), expected[1:])
    assert torch.equal(gammas == 0, expected[0] == 0)
    order, slots = oracle.route(logits, 3), expected[2].long()
    of_routes = order[1].view(-1)[slots]
    is_here = expected[0] > 0
    assert_within(gammas[is_here], of_routes[is_here])


def test_routing_refuses_what_has_no_result(library: Library) -> None:
    logits, out = torch.zeros(2, 4), dirty_routes(10, 4)
    for tokens, every, top_k, held in (
        (2, 4, 5, 4), (2, 4, 0, 4), (1 << 31, 4, 1, 4), (2, 4, 2, -1), (2, 1 << 31, 1, 4),
    ):  # fmt: skip
        assert library.route(logits, out, tokens, 4, every, top_k, held, 0) == errno.EINVAL


def test_given_routes_to_fewer_than_no_experts_are_refused(library: Library) -> None:
    ids, weights, out = torch.zeros(2, 2).long(), torch.ones(2, 2), dirty_routes(4, 1)
    inputs = ids, c_int32(CODE[ids.dtype]), weights, c_int32(CODE[weights.dtype])
    status = library.status("mxfp4_routing_routes", *inputs, 2, 2, -1, 0, *out, c_int32(1))
    assert status == errno.EINVAL


# ---- routing.routes


@pytest.mark.parametrize(
    ("t", "e", "a", "first", "less", "index_dtype", "dtype"),
    covering(
        [(0, 3, 2), (5, 4, 0), (1, 1, 1), (9, 5, 3), (257, 7, 4)],
        [(0, 0), (1, 1), (2, 0), (-1, 0)],
        (torch.int32, torch.int64),
        DTYPES,
    ),
)
def test_given_routes_are_sorted_as_the_reference_does(
    library: Library, t: int, e: int, a: int, first: int, less: int, index_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    ids = torch.randint(-2, e + 3, (t, a)).to(index_dtype)
    weights = torch.rand(t, a).to(dtype)
    weights[(ids < first) | (ids >= first + e - less)] = math.nan  # counts nothing
    expected = reference.routing_from_routes(ids, weights, e - less, first)
    assert_same_bits(library.routes(ids, weights, e - less, first), expected)


def test_ids_far_outside_belong_to_nobody(library: Library) -> None:
    ids = torch.tensor([[-(2**63), 2], [2**63 - 1, 2**32 + 2]])
    gammas, _, scatter, offsets = library.routes(ids, torch.ones(2, 2), 3)
    assert gammas.tolist() == [1, 0, 0, 0]
    assert scatter.tolist() == [1, 0, 2, 3]
    assert offsets.tolist() == [0, 0, 0, 1]


def test_given_routes_are_the_same_for_any_number_of_threads(library: Library) -> None:
    ids, weights = random_routes(9001, 6, 4)
    expected = reference.routing_from_routes(ids, weights, 4, 1)
    for threads in (1, 2, 4):
        assert_same_bits(library.routes(ids, weights, 4, 1, threads), expected)


# ---- the process


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_can_call_it_after_its_parent_used_threads(library: Library) -> None:
    values = torch.randn(4, 256, 64)
    expected = library.quantize(values, 4)
    shared = [torch.frombuffer(mmap.mmap(-1, part.numel()), dtype=torch.uint8) for part in expected]
    panels, flags = (s.view(part.shape) for s, part in zip(shared, expected, strict=True))
    child = os.fork()
    if not child:
        try:
            library.quantize(values, 4, out=(panels, flags))
            os._exit(0)
        finally:
            os._exit(1)
    assert processes.exit_status(child) == 0
    assert_same_bits((panels, flags), expected)


def test_asking_for_huge_pages_changes_no_bytes(library: Library) -> None:
    memory = torch.randint(0, 256, (5 << 20,), dtype=torch.uint8)
    before = memory.clone()
    for start, size in ((memory[17:], (4 << 20) + 5), (memory, 100), (memory, 0)):
        library.functions.mxfp4_huge_pages(c_void_p(start.data_ptr()), c_int64(size))
    assert torch.equal(memory, before)
