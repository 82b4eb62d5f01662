"""The Triton kernels where they differ from others: regimes, tiles, scales, launches.

On a GPU if there is one, otherwise in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from combinations import exhaustive
from implementations import TRITON, Kernels, check_matmul, chosen, int32, randn
from models import DTYPES
from oracle import Bounded, Matrices, assert_within, random_logits, random_routes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from mxfp4_fx.core import hardware
from mxfp4_fx.ops import tiles
from mxfp4_fx.ops import triton as launcher

LAYOUTS = [spec.partition(":")[2] for spec in TRITON]


@pytest.fixture(params=TRITON)
def triton(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    with chosen(request.param) as kernels:
        yield kernels


@pytest.fixture
def any_layout() -> Iterator[Kernels]:
    """For what does not depend on the layout."""
    with chosen(TRITON[0]) as kernels:
        yield kernels


def entries(layout: str) -> tuple[tiles.Tile, ...]:
    name = hardware.gpu_name(torch.device(Kernels(TRITON[0]).device))
    return tiles.table(tiles.table_name(name, layout))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes many programs would take the interpreter minutes with the tables' tiles."""
    tile = tiles.Tile("any", 0, 0, 16, 32, 64, 1, 4, 1)
    monkeypatch.setattr(tiles, "choose", lambda *_: tile)


# ---- regimes

# Tokens and experts, two a token: problems that an entry of the tables serves and the one before it
# does not.
PROBLEMS = {
    "one token": (1, 3),
    "decode": (16, 3),
    "up to 8": (36, 10),
    "up to 16": (36, 5),
    "up to 64": (36, 2),
    "more": (100, 2),
}


@pytest.mark.parametrize(("tokens", "experts"), PROBLEMS.values(), ids=PROBLEMS)
def test_every_regime(triton: Kernels, tokens: int, experts: int) -> None:
    indices = random_routes(tokens, experts, 2)[0]
    x = randn(tokens, 96, dtype=torch.bfloat16)
    matrices = Matrices.random(experts, 48, 96, torch.bfloat16)
    check_matmul(triton, x, matrices, indices, scatter=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_those_problems_take_every_entry_of_a_table(layout: str) -> None:
    name = hardware.gpu_name(torch.device(Kernels(TRITON[0]).device))
    taken = [tiles.choose(name, layout, 2 * tokens, e, 96) for tokens, e in PROBLEMS.values()]
    assert {(tile.rows, tile.rows_per_expert) for tile in taken} == {
        (tile.rows, tile.rows_per_expert) for tile in entries(layout)
    }


# ---- routings

BM = 16  # of the smallest tile


@pytest.mark.parametrize(
    "counts",
    [[BM, BM, BM], [BM + 1, 0, BM - 1], [0, 0, 2 * BM + 1]],
    ids=str,
)
def test_tiles_that_are_full_and_nearly_empty(any_layout: Kernels, counts: list[int]) -> None:
    indices = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))[:, None]
    x, matrices = randn(len(indices), 64), Matrices.random(3, 48, 64)
    check_matmul(any_layout, x, matrices, indices, scatter=False)


@pytest.mark.parametrize("tokens", [5, 40])
def test_rows_of_nobody_become_zero_in_slots(triton: Kernels, tokens: int) -> None:
    """Expert parallelism: of eight experts, 2 to 4 are here."""
    indices, weights = random_routes(tokens, 8, 4)
    matrices = Matrices.random(3, 48, 64)
    gammas, gather_index, scatter_index, offsets = triton.routing_from_routes(
        indices, weights, 3, 2
    )
    x = randn(tokens, 64)
    y = triton.matmul_ogs(
        x, matrices, offsets, gather_index, scatter_index, gammas, experts_per_token=4
    )
    local = indices - 2
    rows = oracle.grouped_linear(
        Bounded.exact(x.repeat_interleave(4, dim=0)), local.flatten(), *matrices.exact
    )
    here = (local >= 0) & (local < 3)
    factors = Bounded.exact(weights.where(here, 0.0).flatten())[:, None]
    slots = oracle.times(rows, factors).view(tokens, 4, 48)
    assert_within(y, oracle.combine(slots).rounded(torch.float32))


@pytest.mark.usefixtures("small_tiles", "poisoned_memory")
def test_as_many_tiles_as_there_can_be(any_layout: Kernels) -> None:
    """Each group, that of nobody among them, has one row more than fills its tiles."""
    indices = torch.arange(4).repeat_interleave(BM + 1)[:, None]
    matrices, x = Matrices.random(3, 32, 64), randn(4 * (BM + 1), 64)
    _, gather_index, _, offsets = any_layout.routing_from_routes(indices, torch.ones(68, 1), 3)
    y = any_layout.matmul_ogs(x, matrices, offsets, gather_index)
    rows = oracle.grouped_linear(Bounded.exact(x), indices.flatten(), *matrices.exact)
    assert_within(y, rows.rounded(torch.float32))


@pytest.mark.exhaustive
def test_65537_tokens(any_layout: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = tiles.Tile("any", 0, 0, 1024, 16, 64, 1, 4, 1)  # as few programs as can be
    monkeypatch.setattr(tiles, "choose", lambda *_: tile)
    monkeypatch.setattr(launcher, "_COMBINE_TILE", (1024, 16))
    tokens = (1 << 16) + 1
    logits = random_logits(tokens, 3, torch.float32)
    gammas, gather_index, scatter_index, offsets = any_layout.routing(logits, 1)
    matrices, x = Matrices.random(3, 16, 32), randn(tokens, 32)
    y = any_layout.matmul_ogs(x, matrices, offsets, gather_index, scatter_index, gammas)
    rows = oracle.grouped_linear(Bounded.exact(x), logits.argmax(dim=1), *matrices.exact)
    assert_within(y, oracle.combine(rows.view(tokens, 1, 16)).rounded(torch.float32))


# ---- sizes


@pytest.mark.parametrize("k", [32, exhaustive(64), 96, exhaustive(288), 320, exhaustive(960)])
def test_any_number_of_columns(triton: Kernels, k: int) -> None:
    """Steps that take one tile of K, or several, or half of one; splits of one step and more."""
    x, matrices = randn(2, k, dtype=torch.bfloat16), Matrices.random(2, 34, k, torch.bfloat16)
    check_matmul(triton, x, matrices, random_routes(2, 2, 2)[0], activation="none")


@pytest.mark.parametrize("k", [exhaustive(32), exhaustive(64), 96, exhaustive(288), 320, 384])
def test_any_number_of_columns_of_many_rows(triton: Kernels, k: int) -> None:
    """Of the streaming entry for up to 64 rows an expert."""
    x, matrices = randn(66, k, dtype=torch.bfloat16), Matrices.random(2, 34, k, torch.bfloat16)
    indices = torch.arange(66)[:, None] % 2
    check_matmul(triton, x, matrices, indices, scatter=False, activation="none")


@pytest.mark.parametrize(
    ("n", "activation"),
    [
        *((2, "none"), (30, "swiglu"), (64, "none"), (130, "swiglu")),
        *(exhaustive(n, "none") for n in (16, 30, 34, 130, 258)),
        *(exhaustive(n, "swiglu") for n in (2, 16, 34, 64, 258)),
    ],
)
def test_any_number_of_output_columns(triton: Kernels, n: int, activation: str) -> None:
    matrices, indices = Matrices.random(1, n, 64), torch.zeros((2, 1), dtype=torch.long)
    check_matmul(triton, randn(2, 64), matrices, indices, activation=activation)


@pytest.mark.parametrize("a", [exhaustive(1), 3, exhaustive(4)])
def test_splits_of_k_are_summed(triton: Kernels, a: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table's decode entry splits K; how often it can is the first number that divides.

    The sums are several tiles of tokens and of columns, of which the last ones are not full.
    """
    monkeypatch.setattr(launcher, "_COMBINE_TILE", (2, 32))
    tile = tiles.choose("sm_90", triton.layout, 3 * a, 3, 960, splits=True)
    assert tile.splits == 3
    x = randn(3 * a, 960, dtype=torch.bfloat16)
    matrices = Matrices.random(a, 48, 960, torch.bfloat16)
    indices = random_routes(3, a, a)[0]
    check_matmul(triton, x, matrices, indices, gather=False, activation="none")


# ---- scales


@pytest.fixture
def any_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's dot_scaled takes activations through float16, which cannot hold all."""
    if hardware.gpu_name(torch.device(Kernels(TRITON[0]).device)) == "interpreter":
        monkeypatch.setattr(
            launcher, "_WITHOUT_DOT_SCALED", {("interpreter", t) for t in (1, 2, 3)}
        )


@pytest.mark.usefixtures("small_tiles", "any_activation")
@pytest.mark.parametrize(("k", "dtype"), [(64, torch.float32), (96, torch.bfloat16)])
def test_every_scale(triton: Kernels, k: int, dtype: torch.dtype) -> None:
    """Row n of expert e has scale byte 16 e + n, and its tokens are such that results are normal.

    255 is the last one's: the only NaN.
    """
    scales = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(-1, -1, k // 32)
    blocks = Matrices.random(16, 16, k).blocks
    # 6 * 2^126 would be no float32 any more, and the weights are float32 numbers before all else.
    blocks[scales >= 253] &= 0b1011_1011
    matrices = Matrices(blocks, scales.contiguous(), torch.zeros((16, 16), dtype=dtype))
    exponents = (127 - 8 - 16 * torch.arange(16)).clamp(min=-80, max=112)
    x = (randn(16, k).double() * torch.exp2(exponents.double())[:, None]).to(dtype)
    indices = torch.arange(16)[:, None]
    parts = {"scatter": False, "gammas": False, "activation": "none"}
    y = check_matmul(triton, x, matrices, indices, **parts)
    assert y.isnan().nonzero().tolist() == [[15, 15]]


@pytest.mark.parametrize(
    ("tokens", "scale"),
    [
        *((4, scale) for scale in (0, 128, 129, 254, 255)),
        *(exhaustive(70, scale) for scale in (0, 128, 129, 254, 255)),
    ],
)
def test_one_scale_at_the_edge_among_ordinary_ones(
    triton: Kernels, tokens: int, scale: int
) -> None:
    """It sends its own tile the exact way; 128 is the largest that a fragment's fast way holds."""
    # The tile of row 70 is one of several.
    matrices = Matrices.random(1, 144 if tokens == 4 else 272, 128)
    scales, blocks = matrices.scales.clone(), matrices.blocks.clone()
    scales[0, 70, 1] = scale
    blocks[0, 70, 1] &= 0b1011_1011
    x = randn(tokens, 128)
    x[:, 32:64] *= 2.0**-80  # what meets that scale
    indices = torch.zeros((tokens, 1), dtype=torch.long)
    matrices = Matrices(blocks, scales, matrices.bias)
    y = check_matmul(triton, x, matrices, indices, scatter=False, activation="none")
    assert y[:, 70].isnan().all() == (scale == 255)


@pytest.mark.parametrize("scale", [0, 1, 2, 128, 129, 252, 253, 254])
def test_a_weight_of_one_scale(triton: Kernels, scale: int) -> None:
    """All of it counts: in checkpoint order, too, where few scales go by ``tl.dot_scaled``."""
    matrices = Matrices.random(1, 16, 64, torch.bfloat16)
    blocks, scales = matrices.blocks & 0b1011_1011, torch.full_like(matrices.scales, scale)
    matrices = Matrices(blocks, scales, torch.zeros_like(matrices.bias))
    # Results are normal numbers, and float16 can hold the activations.
    x = randn(5, 64, dtype=torch.bfloat16) * 2.0 ** (12 if scale < 127 else -8)
    indices = torch.zeros((5, 1), dtype=torch.long)
    check_matmul(triton, x, matrices, indices, scatter=False, activation="none")


# ---- activations


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_nan_or_infinity(triton: Kernels, dtype: torch.dtype) -> None:
    """It is one term of several; the others must not turn infinity into NaN, nor NaN into it."""
    matrices = Matrices.random(1, 34, 64)
    blocks = matrices.blocks.clone()
    blocks[..., 0] |= 0b0001_0001  # 0 times infinity is NaN
    matrices = Matrices(blocks, matrices.scales, matrices.bias)
    x, values = randn(5, 64, dtype=dtype), torch.tensor([torch.nan, torch.inf, -torch.inf])
    x[1:4, 1] = values
    y = triton.matmul_ogs(x, matrices, int32([0, 5]))
    rows = oracle.linear(Bounded.exact(x), matrices.weight[0], matrices.exact[1][0])
    assert_within(y[::4], rows[::4].rounded(dtype))
    expected = matrices.weight[0, :, 1] * values[:, None]
    assert torch.equal(y[1:4].isnan(), expected.isnan())
    assert torch.equal(y[1:4].nan_to_num(), expected.nan_to_num().to(dtype).nan_to_num())


def test_a_nan_whose_upper_half_is_infinity_stays_nan(triton: Kernels) -> None:
    x = randn(3, 32)
    x.view(torch.int32)[1:, 3] = 0x7F800000 + torch.tensor([1, 0x10000 - 1])
    y = triton.matmul_ogs(x, Matrices.random(1, 16, 32), int32([0, 3]))
    assert y[1:].isnan().all()
    assert not y[0].isnan().any()


# ---- routing


@pytest.mark.parametrize("given", [False, True], ids=["logits", "routes"])
@pytest.mark.parametrize("e", [4, 32, 200])
def test_one_program_and_many_sort_alike(
    any_layout: Kernels, e: int, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 70
    logits = random_logits(tokens, e)
    indices, weights = random_routes(tokens, e, 4)

    def route(*here: int) -> tuple[Tensor, ...]:
        if given:
            return any_layout.routing_from_routes(indices, weights, e // 2, 1)
        return any_layout.routing(logits, 4, *here)

    held = [()] if given else [(), (1, e // 2)]
    one = [route(*here) for here in held]
    monkeypatch.setattr(launcher, "_ONE_PROGRAM_ROUTES", 0)
    for here, alone in zip(held, one, strict=True):
        with launches() as counted:
            many = route(*here)
        assert counted == {"decide_kernel": 1, "scan_kernel": 1, "place_kernel": 1}
        for some, others in zip(alone, many, strict=True):
            assert torch.equal(some, others)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else would take many thousands of tokens: several steps of all that is done in steps."""
    monkeypatch.setattr(launcher, "_ONE_PROGRAM_ROUTES", 0)
    monkeypatch.setattr(launcher, "_SCAN_TILE", (2, 2))
    monkeypatch.setattr(launcher, "_tokens_per_block", lambda *_: 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("given", [False, True], ids=["logits", "routes"])
def test_a_scan_of_several_steps(any_layout: Kernels, given: bool) -> None:
    tokens, e, a = 19, 6, 3
    logits, (indices, weights) = random_logits(tokens, e), random_routes(tokens, e, a)
    if given:
        routes = any_layout.routing_from_routes(indices, weights, 4, 1)
        expected = oracle.sort_routes(indices, 4, 1)
    else:
        routes = any_layout.routing(logits, a)
        expected = oracle.sort_routes(oracle.route(logits, a)[0], e)
    assert [part.tolist() for part in routes[1:]] == list(expected)


@pytest.mark.parametrize(
    ("tokens", "e"),
    [
        *((1, 5), (511, 1), (513, 5), (65, 128)),
        *(exhaustive(*case) for case in ((1, 1), (513, 1), (511, 5), (1, 128), (511, 128))),
        exhaustive(513, 128),
    ],
)
def test_routing_of_many_tokens(any_layout: Kernels, tokens: int, e: int) -> None:
    a = min(e, 4)
    logits = random_logits(tokens, e, torch.bfloat16)
    indices, weights = oracle.route(logits, a)
    gammas, *sorted_ = any_layout.routing(logits, a)
    for actual, values in zip(sorted_, oracle.sort_routes(indices, e), strict=True):
        assert actual.tolist() == values
    assert_within(gammas, weights.view(tokens * a)[sorted_[1].long()])


def test_nan_of_either_sign_is_chosen_first(any_layout: Kernels) -> None:
    """As torch.topk has it."""
    logits = torch.tensor([[1.0, torch.nan, torch.inf], [1.0, 2.0, torch.nan]])
    logits[0].view(torch.int32)[1] |= -(2**31)
    assert torch.equal(torch.topk(logits, 1).indices, torch.tensor([[1], [2]]))
    gammas, _, scatter_index, offsets = any_layout.routing(logits, 1)
    assert offsets.tolist() == [0, 0, 1, 2]
    assert scatter_index.tolist() == [0, 1]
    assert gammas.isnan().all()


def test_all_of_many_experts_may_be_chosen(any_layout: Kernels) -> None:
    logits = random_logits(3, 40)
    gammas, _, scatter_index, offsets = any_layout.routing(logits, 40)
    assert offsets.tolist() == list(range(0, 123, 3))
    _, weights = oracle.route(logits, 40)
    assert_within(gammas, weights.view(120)[scatter_index.long()])


# ---- launches


class launches:
    """Counts the kernels that are launched, by name; without ``run`` they do not run."""

    def __init__(self, run: bool = True) -> None:
        self.counted: Counter[str] = Counter()
        self.run = run
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Counter[str]:
        for name, kernel in vars(launcher).items():
            if name.endswith("_kernel"):
                counting = _Counting(name, kernel if self.run else None, self.counted)
                self.patch.setattr(launcher, name, counting)
        return self.counted

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


class _Counting:
    def __init__(self, name: str, kernel: Any, counted: Counter[str]) -> None:
        self.name, self.kernel, self.counted = name, kernel, counted

    def __getitem__(self, grid: Any) -> Any:
        self.counted[self.name] += 1
        return self.kernel[grid] if self.kernel else lambda *_, **__: None


def run_mlp(kernels: Kernels, tokens: int, e: int, a: int = 4) -> Tensor:
    hidden, logits = randn(tokens, 64, dtype=torch.bfloat16), random_logits(tokens, e)
    gate_up, down = (Matrices.random(e, 64, k, torch.bfloat16) for k in (64, 32))
    gammas, gather_index, scatter_index, offsets = kernels.routing(logits, a)
    inner = kernels.matmul_ogs(hidden, gate_up, offsets, gather_index, activation="swiglu")
    return kernels.matmul_ogs(
        inner, down, offsets, None, scatter_index, gammas, experts_per_token=a
    )


@pytest.mark.parametrize(("tokens", "e"), [(1, 32), (16, 32), (64, 16), (256, 32), (512, 32)])
def test_an_mlp_takes_four_launches_beside_the_router(
    any_layout: Kernels, tokens: int, e: int
) -> None:
    with launches(run=False) as counted:
        run_mlp(any_layout, tokens, e)
    assert counted == {"routing_kernel": 1, "matmul_ogs_kernel": 2, "combine_kernel": 1}


def test_every_launch_is_on_the_tensors_device(
    any_layout: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on torch's current device, which may be another one."""
    entered: list[tuple[str, int]] = []

    with launches(run=False) as counted:

        @contextlib.contextmanager
        def on(device: torch.device) -> Iterator[None]:
            before = counted.total()
            yield
            entered.append((device.type, counted.total() - before))

        monkeypatch.setattr(hardware, "on", on)
        run_mlp(any_layout, 1, 4)
    assert entered == [(any_layout.device, launched) for launched in (1, 1, 2)]


class NothingReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        ), f"{func} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 600])
def test_the_host_never_waits_for_the_device(any_layout: Kernels, tokens: int) -> None:
    with NothingReadBack(), launches(run=False):
        run_mlp(any_layout, tokens, 8)


def test_another_layout_is_an_error() -> None:
    matrices = Matrices.random(1, 64, 64)
    with chosen("cpu:portable") as cpu, pytest.raises(ValueError, match="reads layouts wgmma_frag"):
        torch.ops.mxfp4.matmul_ogs(
            randn(2, 64), *cpu.operands(matrices), int32([0, 2]), layout="cpu_panels",
            kernels="triton",
        )  # fmt: skip
