"""The ops by value, against the oracle; and as torch sees them: schemas, fakes, compiling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import oracle
import pytest
import torch
from combinations import covering, exhaustive
from implementations import (
    ACTIVATIONS,
    ALPHA,
    LIMIT,
    Kernels,
    activated,
    check_matmul,
    int32,
    randn,
)
from models import DTYPES
from oracle import Bounded, Matrices, assert_within, random_logits, random_routes
from test_linears_mxfp8 import random_weight
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mxfp4_fx.core.layouts import LAYOUTS
from mxfp4_fx.core.orders import Order
from mxfp4_fx.ops import schemas
from mxfp4_fx.ops.operands import operands_of

CPU = torch.device("cpu")
REFERENCE = Kernels("reference")
ops = torch.ops.mxfp4


# ---- matmul_ogs alone


@pytest.mark.parametrize(
    ("dtype", "gather", "scatter", "gammas", "activation"),
    covering(DTYPES, *[(False, True)] * 3, ("none", "swiglu")),
)
def test_matmul_with_and_without_each_of_its_parts(
    kernels: Kernels, dtype: torch.dtype, gather: bool, scatter: bool, gammas: bool, activation: str
) -> None:
    t, e, a, k, n = 5, 3, 2, 64, 48
    x = randn(t if gather else t * a, k, dtype=dtype)
    matrices = Matrices.random(e, n, k, dtype)
    check_matmul(
        kernels, x, matrices, random_routes(t, e, a)[0], gather, scatter, gammas, activation
    )


@pytest.mark.parametrize(
    ("e", "a", "t", "activation", "n"),
    covering([(1, 1), (3, 1), (3, 3)], (0, 1, 70), [("none", 5), ("none", 1), ("swiglu", 6)]),
)
def test_matmul_of_any_size(
    kernels: Kernels, e: int, a: int, t: int, activation: str, n: int
) -> None:
    matrices = Matrices.random(e, n, 32)
    x = randn(t, 32)
    y = check_matmul(kernels, x, matrices, random_routes(t, e, a)[0], activation=activation)
    assert y.shape == (t, n // 2 if activation == "swiglu" else n)


@pytest.mark.parametrize("activation", ["none", "swiglu"])
def test_matmul_without_a_bias(kernels: Kernels, activation: str) -> None:
    """N fills no panel and no tile, and without a bias nothing but ``n`` says it."""
    matrices, indices = Matrices.random(3, 34, 32), random_routes(5, 3, 2)[0]
    check_matmul(kernels, randn(5, 32), matrices, indices, activation=activation, bias=False)


@pytest.mark.any_layout
@pytest.mark.parametrize(
    ("activation", "n"),
    [("silu", 34), ("clamped_silu", 6), ("geglu_tanh", 70), ("clamped_geglu", 34), ("relu2", 35)],
)
def test_activations_of_other_families(kernels: Kernels, activation: str, n: int) -> None:
    dtype = {6: torch.float16, 35: torch.bfloat16}.get(n, torch.float32)
    matrices, indices = Matrices.random(3, n, 64, dtype), random_routes(5, 3, 2)[0]
    for scatter in (False, True):
        y = check_matmul(
            kernels, randn(5, 64, dtype=dtype), matrices, indices, scatter=scatter,
            gammas=scatter, activation=activation,
        )  # fmt: skip
        assert y.shape[1] == (n if activation == "relu2" else n // 2)


def test_matmul_of_no_columns_is_the_bias(kernels: Kernels) -> None:
    matrices = Matrices.random(2, 40, 0)
    y = kernels.matmul_ogs(randn(3, 0), matrices, int32([0, 1, 3]))
    assert torch.equal(y, matrices.bias[[0, 1, 1]])


@pytest.mark.parametrize("used", [[2], [0, 4]])
def test_matmul_with_experts_that_nobody_chose(kernels: Kernels, used: list[int]) -> None:
    indices = torch.tensor(used).repeat(3, 1)
    check_matmul(kernels, randn(3, 64), Matrices.random(5, 48, 64), indices)


@pytest.mark.any_layout
def test_matmul_of_x_that_is_not_contiguous(kernels: Kernels) -> None:
    matrices, indices = Matrices.random(3, 48, 64), random_routes(3, 3, 2)[0]
    for x in (randn(64, 3).T, randn(3, 128)[:, ::2], randn(1, 64).expand(3, 64)):
        check_matmul(kernels, x, matrices, indices)


@pytest.mark.any_layout
def test_a_default_device_of_the_user_changes_nothing(kernels: Kernels) -> None:
    """Called past torch's dispatcher, which switches it off for the kernels."""
    if kernels.name == "hub":
        pytest.skip("what the hub's package makes is its own affair")
    x, matrices = randn(3, 64).to(kernels.device), Matrices.random(4, 48, 64)
    operands, logits = kernels.there(kernels.operands(matrices)), random_logits(3, 4)
    routing, matmul = (schemas.kernel(kernels.name, op) for op in ("routing", "matmul_ogs"))
    results = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            _, gather, _, offsets = routing(logits.to(kernels.device), 2)
            flat = operands_of(x, *operands, offsets, gather, layout=kernels.layout)
            results.append(matmul(*flat[:4]))
    assert torch.equal(*results)


def test_matmul_of_a_slice_of_the_experts(kernels: Kernels) -> None:
    whole = Matrices.random(6, 48, 64)
    part = Matrices(*(operand[1::2] for operand in whole.operands))
    check_matmul(kernels, randn(3, 64), part, random_routes(3, 3, 2)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_keep_all_their_bits(kernels: Kernels, dtype: torch.dtype) -> None:
    """Each meets a single weight of one, so that the results are x itself, bit for bit."""
    codes = torch.zeros((64, 64), dtype=torch.uint8)
    codes[torch.arange(64), torch.arange(64)] = 2  # 1.0
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    eye = Matrices(
        packed.view(1, 64, 2, 16), torch.full((1, 64, 2), 127, dtype=torch.uint8),
        torch.zeros((1, 64)),
    )  # fmt: skip
    x = randn(5, 64, dtype=dtype)
    assert torch.equal(kernels.matmul_ogs(x, eye, int32([0, 5])), x)


@pytest.mark.usefixtures("poisoned_memory")
def test_rows_of_nobody_are_zero(kernels: Kernels) -> None:
    x = randn(5, 64)
    x[3:] = torch.nan
    y = kernels.matmul_ogs(x, Matrices.random(2, 8, 64), int32([0, 2, 3]))
    assert torch.equal(y[3:], torch.zeros(2, 8))
    assert (y[:3] != 0).all()


def test_alpha_and_limit_are_those_given(kernels: Kernels) -> None:
    x, matrices = randn(6, 32), Matrices.random(1, 96, 32)
    y = kernels.matmul_ogs(x, matrices, int32([0, 6]), activation="swiglu", alpha=0.9, limit=2.5)
    rows = oracle.linear(Bounded.exact(x), matrices.weight[0], matrices.exact[1][0])
    assert_within(y, oracle.swiglu(rows, 0.9, 2.5).rounded(torch.float32))


ODD_NUMBERS = (-0.5, 0.0, torch.inf, -torch.inf, torch.nan)


@pytest.mark.any_layout
def test_alpha_and_limit_of_odd_values(kernels: Kernels) -> None:
    """As PyTorch's clamp: the upper bound wins, and a bound that is NaN gives NaN."""
    x, matrices = torch.zeros(1, 32), Matrices.random(1, 40, 32)
    matrices.bias[0] = torch.tensor([-8.0, -0.25, 0.0, 0.25, 8.0, torch.nan, 90.0, -90.0]).repeat(5)
    exact = matrices.bias.double()
    for alpha, limit in (*product((ALPHA,), ODD_NUMBERS), *product(ODD_NUMBERS, (LIMIT,))):
        y = kernels.matmul_ogs(
            x, matrices, int32([0, 1]), activation="swiglu", alpha=alpha, limit=limit
        )
        gate, up = exact[:, 0::2].clamp(max=limit), exact[:, 1::2].clamp(-limit, limit)
        expected = gate * torch.sigmoid(alpha * gate) * (up + 1)
        for wrong in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(wrong(y), wrong(expected)), (alpha, limit)
        finite = expected.isfinite()
        if math.isinf(alpha):  # every step is exact, for the sigmoid is 0 or 1
            assert torch.equal(y[finite], expected[finite].float())
            continue
        bounded = oracle.swiglu(Bounded.exact(exact), alpha, limit).rounded(torch.float32)
        assert_within(y[finite], bounded[finite])


@pytest.mark.any_layout
@pytest.mark.parametrize("name", ["silu", "geglu_tanh", "clamped_geglu", "relu2"])
def test_activations_of_numbers_that_are_large_or_none(kernels: Kernels, name: str) -> None:
    """NaN, infinity and zero come out where the formula has them in float32."""
    values = (-torch.inf, -3e38, -1e13, -88.0, -0.0, 1e-30, 1e13, 3e38, torch.inf, torch.nan)
    pairs = torch.tensor(list(product(values, values))).flatten()
    matrices = Matrices.random(1, pairs.numel(), 32)
    matrices.bias[0] = pairs
    y = kernels.matmul_ogs(torch.zeros(1, 32), matrices, int32([0, 1]), **ACTIVATIONS[name])
    expected = activated(Bounded.exact(matrices.bias), name).rounded(torch.float32)
    exact = expected.value.float()
    for wrong in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(wrong(y), wrong(exact)), wrong
    finite = exact.isfinite()
    assert_within(y[finite], expected[finite])


# ---- the whole chain, and the logical ops


def chain(
    kernels: Kernels, hidden: Tensor, logits: Tensor, gate_up: Matrices, down: Matrices, a: int
) -> Tensor:
    """What the graph passes make of an MLP."""
    gammas, gather_index, scatter_index, offsets = kernels.routing(logits, a)
    inner = kernels.matmul_ogs(
        hidden, gate_up, offsets, gather_index, activation="swiglu", alpha=ALPHA, limit=LIMIT
    )
    return kernels.matmul_ogs(
        inner, down, offsets, None, scatter_index, gammas, experts_per_token=a
    )


def expected_chain(
    hidden: Tensor, logits: Tensor, gate_up: Matrices, down: Matrices, a: int
) -> Bounded:
    routes = oracle.route(logits, a)
    parts = gate_up.exact, down.exact
    return oracle.experts(hidden, *routes, *parts, ALPHA, LIMIT, inner_dtype=hidden.dtype)


def random_mlp(t: int, e: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """hidden, logits, gate_up, down of an MLP with H = 64 and I = 32."""
    return (
        randn(t, 64, dtype=dtype),
        random_logits(t, e, dtype),
        Matrices.random(e, 64, 64, dtype),
        Matrices.random(e, 64, 32, dtype, seed=1),
    )


@pytest.mark.any_layout
@pytest.mark.parametrize(
    ("dtype", "e", "a", "t"), covering(DTYPES, [(1, 1), (3, 1), (5, 2), (3, 3)], (0, 1, 70))
)
def test_chain(kernels: Kernels, dtype: torch.dtype, e: int, a: int, t: int) -> None:
    mlp = random_mlp(t, e, dtype)
    y = chain(kernels, *mlp, a)
    assert y.dtype == dtype
    assert_within(y, expected_chain(*mlp, a))


@pytest.mark.any_layout
def test_chain_with_all_tokens_at_one_expert(kernels: Kernels) -> None:
    hidden, _, gate_up, down = random_mlp(33, 4)
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0]).expand(33, 4)
    y = chain(kernels, hidden, logits, gate_up, down, 1)
    assert_within(y, expected_chain(hidden, logits, gate_up, down, 1))


@pytest.mark.any_layout
def test_same_input_same_bits(kernels: Kernels) -> None:
    mlp = random_mlp(70, 3, torch.bfloat16)
    assert torch.equal(chain(kernels, *mlp, 2), chain(kernels, *mlp, 2))


def model_weights(e: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """gate_up [E, H, 2I], its bias, down [E, I, H], its bias as a model has them; H=48, I=20."""
    shapes = (e, 48, 40), (e, 40), (e, 20, 48), (e, 48)
    factors = 0.3, 4.0, 0.3, 1.0
    return tuple(
        (randn(*s, seed=i) * f).to(dtype)
        for i, (s, f) in enumerate(zip(shapes, factors, strict=True))
    )


def expected_moe(
    hidden: Tensor, indices: Tensor, weights: Bounded, parts: tuple[Tensor, ...]
) -> Bounded:
    gate_up, gate_up_bias, down, down_bias = (part.double() for part in parts)
    return oracle.experts(
        hidden, indices, weights, (gate_up.transpose(1, 2), gate_up_bias),
        (down.transpose(1, 2), down_bias), ALPHA, LIMIT, inner_dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("t", [0, 1, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moe(dtype: torch.dtype, t: int) -> None:
    hidden, logits, parts = randn(t, 48, dtype=dtype), random_logits(t, 5), model_weights(5, dtype)
    y = ops.moe(hidden, logits, *parts, 3, ALPHA, LIMIT)
    assert y.dtype == dtype
    assert_within(y, expected_moe(hidden, *oracle.route(logits, 3), parts))


@pytest.mark.parametrize("t", [0, 1, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moe_with_given_routes(dtype: torch.dtype, t: int) -> None:
    hidden, parts = randn(t, 48, dtype=dtype), model_weights(5, dtype)
    indices, weights = random_routes(t, 5, 3)[0], randn(t, 3, dtype=dtype)
    y = ops.moe.routes(hidden, indices, weights, *parts, ALPHA, LIMIT)
    assert y.dtype == dtype
    assert_within(y, expected_moe(hidden, indices, Bounded.exact(weights), parts))


@pytest.mark.parametrize("given", [False, True], ids=["logits", "routes"])
def test_a_moe_of_experts_held_here_leaves_out_the_others(given: bool) -> None:
    hidden, parts = randn(9, 48), model_weights(5, torch.float32)
    logits = random_logits(9, 5)
    indices, weights = oracle.route(logits, 3)
    first, last = 1, 3
    here = [part[first:last] for part in parts]
    if given:
        routes = indices, weights.value.float()
        y = ops.moe.routes(hidden, *routes, *here, ALPHA, LIMIT, first_expert=first)
    else:
        y = ops.moe(hidden, logits, *here, 3, ALPHA, LIMIT, first_expert=first)
    mine = (indices >= first) & (indices < last)
    of_mine = Bounded(weights.value * mine, weights.error * mine + 2.0**-24)
    assert_within(y, expected_moe(hidden, indices, of_mine, parts))


@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "relu2"])
@pytest.mark.parametrize("packed", [False, True], ids=["floats", "packed"])
def test_a_moe_of_weights_in_any_order(packed: bool, activation: str) -> None:
    """The same bits as with rows in the kernels' order, given as matmuls."""
    e, h, i, a = 3, 64, 32, 2
    n = i if activation == "relu2" else 2 * i
    gate_up, down = Matrices.random(e, n, h), Matrices.random(e, h, i, seed=1)
    hidden, logits = randn(7, h), random_logits(7, e)
    constants = {"activation": activation, "alpha": 1.25, "limit": 3.5, "up_offset": 0.5}
    gammas, gather, scatter, offsets = REFERENCE.routing(logits, a)
    routes = logits.topk(a).indices, gammas[scatter.long().argsort()].view(7, a)
    for is_transposed, is_concatenated, bias in product((False, True), repeat=3):
        if (is_concatenated and activation == "relu2") or (packed and is_transposed):
            continue
        inner = REFERENCE.matmul_ogs(hidden, gate_up, offsets, gather, bias=bias, **constants)
        expected = REFERENCE.matmul_ogs(
            inner, down, offsets, None, scatter, gammas, experts_per_token=a, bias=bias
        )
        order = Order(is_transposed, is_concatenated)
        parts, scales = [], []
        for matrices in (gate_up, down):
            held = matrices.operands if packed else (matrices.weight.float(), None, matrices.bias)
            if is_concatenated and matrices is gate_up:
                held = tuple(part if part is None else concatenated(part) for part in held)
            weight = held[0].transpose(1, 2) if is_transposed else held[0]
            parts += [weight, held[2] if bias else None]
            scales.append(held[1])
        numbers = constants["alpha"], constants["limit"], *scales
        named = {"activation": activation, "up_offset": 0.5, **order._asdict()}
        assert torch.equal(ops.moe(hidden, logits, *parts, a, *numbers, **named), expected), order
        y = ops.moe.routes(hidden, *routes, *parts, *numbers, **named)
        assert torch.equal(y, expected), order


def concatenated(rows: Tensor) -> Tensor:
    """Rows [E, N, ...] with those of the gate before those of up."""
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1)


# ---- numbers that are none


@pytest.mark.any_layout
@pytest.mark.parametrize("value", [torch.nan, torch.inf, exhaustive(-torch.inf)])
def test_nan_and_inf_stay_in_their_token(kernels: Kernels, value: float) -> None:
    hidden, *rest = random_mlp(9, 4)
    clean = chain(kernels, hidden, *rest, 2)
    hidden[4, 5] = value
    y = chain(kernels, hidden, *rest, 2)
    others = torch.arange(9) != 4
    assert_within(y[others], expected_chain(hidden, *rest, 2)[others])
    assert not torch.equal(y[4], clean[4])
    if value != value:
        assert y[4].isnan().all()


@pytest.mark.any_layout
def test_a_nan_scale_reaches_what_depends_on_it(kernels: Kernels) -> None:
    """In gate_up: tokens of its expert. In down: one column of these."""
    hidden, logits, gate_up, down = random_mlp(9, 5)
    hit = (oracle.route(logits, 2)[0] == 3).any(dim=1)
    assert hit.any()
    assert not hit.all()
    for matrices, columns in ((gate_up, slice(None)), (down, 17)):
        poisoned = matrices.scales.clone()
        poisoned[3, 17, 0] = 255
        replaced = dataclasses.replace(matrices, scales=poisoned)
        pair = (replaced, down) if matrices is gate_up else (gate_up, replaced)
        y = chain(kernels, hidden, logits, *pair, 2)
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[hit, columns] = True
        assert torch.equal(y.isnan(), expected)
        assert_within(y, expected_chain(hidden, logits, *pair, 2))


# ---- bad input


def bad_matmul(device: str = "cpu", **changes: Any) -> None:
    """Four rows of two experts, N = 6 and K = 64, and what is wrong with them."""
    matrices = Matrices.random(2, 6, 64)
    arguments = {
        "x": randn(2, 64),
        "blocks": matrices.blocks,
        "scales": matrices.scales,
        "bias": matrices.bias,
        "n": 6,
        "expert_offsets": int32([0, 1, 4]),
        "gather_index": int32([0, 0, 1, 1]),
        "scatter_index": int32([0, 1, 2, 3]),
        "gammas": randn(4),
        "experts_per_token": 2,
        **changes,
    }
    ops.matmul_ogs(**tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments))


NAMES = ("blocks", "scales", "bias", "n")
ODD = dict(zip(NAMES, REFERENCE.operands(Matrices.random(2, 5, 64)), strict=True))
BELOW_0 = dict(zip(NAMES, (*LAYOUTS["cpu_panels"].empty(2, 0, 64, CPU), None, -1), strict=True))
BAD_OPERANDS = {
    "layout": ({"layout": "cubic"}, r"layout='cubic' is not one of \['row_major'"),
    "activation": ({"activation": "relu"}, r"activation='relu' is not one of \['none', 'swiglu'"),
    "x_3d": ({"x": randn(2, 2, 64)}, r"x must be \[rows, K\].*\(2, 2, 64\)"),
    "x_dtype": ({"x": randn(2, 64).int()}, "x must be float32, bfloat16 or float16.*int32"),
    "k_40": ({"x": randn(2, 40)}, r"K a multiple of 32.*\(2, 40\)"),
    "k": ({"x": randn(2, 32)}, r"K=32, .*wants blocks \(2, 6, 1, 16\).*they are \(2, 6, 2, 16\)"),
    "n": ({"n": 64, "bias": None}, r"n=64 .*wants blocks \(2, 64, 2, 16\).*they are \(2, 6, 2, 16"),
    "n_below_0": ({"layout": "cpu_panels", **BELOW_0}, "n=-1 and K=64, layout 'cpu_panels' wants"),
    "bias_1d": ({"bias": randn(6)}, r"bias must be None or \[E, N\] = \(2, 6\); it is \(6,\)"),
    "experts": ({"bias": randn(3, 6)}, r"bias .* \[E, N\] = \(2, 6\); it is \(3, 6\)"),
    "no_experts": ({"blocks": torch.tensor(0).byte()}, r"E=0, .*they are \(\) and \(2, 6, 2\)"),
    "scales": ({"scales": torch.zeros(2, 6, 1).byte()}, r"scales .*and \(2, 6, 1\)"),
    "odd_swiglu": ({"activation": "swiglu", **ODD}, "swiglu.*even.*5"),
    "offsets": ({"expert_offsets": int32([0, 4])}, r"expert_offsets must be \[E\+1\].*\(2,\)"),
    "gammas": ({"gammas": randn(1)}, r"gammas must be \[R\].*\(1,\)"),
    "scatter": ({"scatter_index": int32([0, 1])}, r"scatter_index must be \[R\].*\(2,\)"),
    "a": ({"experts_per_token": 3}, "experts_per_token=3 does not divide"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_OPERANDS.values(), ids=BAD_OPERANDS)
def test_bad_operands_are_named(changes: dict[str, Any], message: str) -> None:
    """Also when a graph is captured, by the fake impl."""
    for device in ("cpu", "meta"):
        with pytest.raises((TypeError, ValueError), match=message):
            bad_matmul(device, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.routing(randn(4), 1), r"logits must be \[T, E\].*\(4,\)"),
        (lambda: ops.routing(randn(4, 3), 0), "1 <= top_k <= E.*top_k=0"),
        (lambda: ops.routing(randn(4, 3), 4), r"\(4, 3\) with top_k=4"),
        (lambda: ops.routing(randn(4, 3), 2, 0, -1), "routing: num_experts is negative: -1"),
        (lambda: ops.routing(randn(4, 3), 2, kernels="abacus"), "kernels='abacus' is not one of"),
        (lambda: bad_matmul(kernels="abacus"), "'abacus' is not one of reference, pytorch, cpu"),
        (
            lambda: ops.routing.routes(torch.zeros(4, 2).long(), randn(4, 3), 5),
            r"must both be \[T, A\].*\(4, 2\) and \(4, 3\)",
        ),
        (
            lambda: ops.routing.routes(torch.zeros(4, 2).long(), randn(4, 2), -1),
            "num_experts is negative: -1",
        ),
        (
            lambda: ops.routing.routes(torch.zeros(4).long(), randn(4), 5),
            r"must both be \[T, A\].*\(4,\)",
        ),
    ],
)
def test_bad_routes_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- as torch sees them


def examples(t: int, kernels: Kernels, grad: bool) -> dict[str, tuple[Any, tuple[Any, ...], Any]]:
    """An op, its arguments and its keywords, by name."""
    e, a = 3, 2
    hidden, logits, gate_up, down = random_mlp(t, e)
    gammas, gather_index, scatter_index, offsets = ops.routing(logits, a)
    indices, weights = random_routes(t, e, a)
    inner, dense = randn(t * a, 32), model_weights(e, torch.float32)
    small = randn(t * a, 4)
    factors = [randn(e, 3, 64), randn(e, 64, 3), randn(e, 3, 32), randn(e, 64, 3)]
    for tensor in (hidden, logits, weights, inner, gammas, small, *factors):
        tensor.requires_grad_(grad)
    chosen = {"kernels": kernels.name}
    order = {"layout": kernels.layout, **chosen}
    swiglu = {"activation": "swiglu", "alpha": ALPHA, "limit": LIMIT, "up_offset": 0.5, **order}
    first = (hidden, *kernels.operands(gate_up), offsets, gather_index)
    second = (inner, *kernels.operands(down, bias=False), offsets, None, scatter_index, gammas, a)
    cases: dict[str, tuple[Any, tuple[Any, ...], Any]] = {
        "routing": (ops.routing.default, (logits, a), chosen),
        "routing, one expert": (ops.routing.default, (logits, a, 1, 1), chosen),
        "routing.routes": (ops.routing.routes, (indices, weights, e), chosen),
        "matmul_ogs, first": (ops.matmul_ogs.default, first, swiglu),
        "matmul_ogs, second": (ops.matmul_ogs.default, second, order),
    }
    if kernels.name == "reference":
        cases["grouped_linear"] = (ops.grouped_linear.default, (inner, factors[2], offsets), {})
    if not grad and kernels.name == "reference":  # these have neither kernels nor a gradient
        constants = (ALPHA, LIMIT)
        moe = (randn(t, 48), logits, *dense, a, *constants)
        moe_routes = (randn(t, 48), indices, weights, *dense, *constants)
        back = (randn(t * a, 32), *first, None, None, 1, "swiglu", *constants, 0.5, "row_major")
        cases["moe"] = (ops.moe.default, moe, {})
        cases["moe.routes"] = (ops.moe.routes, moe_routes, {})
        cases["expert_ids"] = (ops.expert_ids.default, (indices, e, "wrap", "error"), {})
        cases["grouped_outer"] = (ops.grouped_outer.default, (small, inner, offsets), {})
        (first, first_scales, *of_first), (second, second_scales, *of_second) = (
            kernels.operands(matrices)[:3] for matrices in (gate_up, down)
        )
        packed = first, *of_first, second, *of_second, 32, *constants, first_scales, second_scales
        adapted = (hidden, indices, weights, *packed, factors[:2], [0.5], factors[2:], [2.0])
        cases["moe.adapted"] = (ops.moe.adapted, adapted, {})
        cases["matmul_ogs_backward"] = (ops.matmul_ogs_backward.default, back, {})
        linears = (randn(t, 32), [randn(6, 32), randn(2, 32)], [randn(6), None], "reference")
        cases["linears"] = (ops.linears.default, linears, {})
        codes, scales = zip(*(random_weight(n, 32, seed=n) for n in (6, 2)), strict=True)
        of_8_bits = (randn(t, 32), [*codes], [*scales], [randn(6), None], "reference")
        cases["linears_mxfp8"] = (ops.linears_mxfp8.default, of_8_bits, {})
        grads = [randn(t, 6), randn(t, 2)]
        backward = ops.linears_mxfp8_backward.default
        cases["linears_mxfp8_backward"] = (backward, (grads, [*codes], [*scales]), {})
        attention = (randn(1, 4, t, 8), *randn(2, 1, 2, t, 8), randn(4), randn(t, t), 0.5)
        cases["attention_with_sinks"] = (ops.attention_with_sinks.default, attention, {})
    return {
        name: (op, *kernels.there(arguments, keywords))
        for name, (op, arguments, keywords) in cases.items()
    }


@pytest.mark.parametrize(
    ("grad", "t"), [(False, 0), (True, 5), exhaustive(False, 5), exhaustive(True, 0)]
)
def test_opcheck(grad: bool, t: int) -> None:
    for op, args, kwargs in examples(t, REFERENCE, grad).values():
        torch.library.opcheck(op, args, kwargs)


@pytest.mark.any_layout
@pytest.mark.parametrize("t", [0, 5])
def test_schema_and_fakes_are_like_the_kernels(kernels: Kernels, t: int) -> None:
    """What else torch.library.opcheck looks at, such as autograd, is the same code for all."""
    for op, args, kwargs in examples(t, kernels, False).values():
        torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_of_inputs_that_are_not_contiguous() -> None:
    for op, args, kwargs in examples(5, REFERENCE, False).values():
        strided = [
            x.mT.contiguous().mT if isinstance(x, Tensor) and x.ndim > 1 else x for x in args
        ]
        torch.library.opcheck(op, strided, kwargs)


def test_every_op_is_an_example() -> None:
    checked = {op for op, _, _ in examples(1, REFERENCE, False).values()}
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mxfp4::")]
    assert {str(op) for op in checked} == {
        name.replace("::", ".") + ("" if "." in name else ".default") for name in names
    }


@pytest.mark.parametrize("name", examples(1, REFERENCE, False))
def test_one_graph_for_any_number_of_tokens(name: str) -> None:
    op = examples(1, REFERENCE, False)[name][0]
    compiled = torch.compile(
        lambda *args, **kwargs: op(*args, **kwargs),
        backend="aot_eager",
        dynamic=True,
        fullgraph=True,
    )
    for t, stance in ((5, "default"), (2, "fail_on_recompile"), (33, "fail_on_recompile")):
        _, args, kwargs = examples(t, REFERENCE, False)[name]
        with torch.compiler.set_stance(stance):
            y = compiled(*args, **kwargs)
        torch.testing.assert_close(y, op(*args, **kwargs), rtol=0, atol=0)
