"""Gradients through frozen experts: against autograd through the plain formula in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from combinations import covering, exhaustive
from implementations import ACTIVATIONS, ALPHA, LIMIT, Kernels
from oracle import (
    Matrices,
    assert_as_accurate,
    random_logits,
    random_routes,
    sort_routes,
)
from torch import Tensor

from mxfp4_fx.ops import reference
from mxfp4_fx.ops.backward import activate_backward
from mxfp4_fx.ops.operands import Activation

T, E, A, H, I = 9, 4, 2, 32, 96  # noqa: E741
DTYPES = (torch.float32, torch.bfloat16)
REFERENCE = Kernels("reference")
ops = torch.ops.mxfp4

Function = Callable[..., Tensor]


def gradients(f: Function, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Of ``(f(*inputs) * random).sum()``, with the inputs converted to ``dtype``."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    y = f(*leaves)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    grad = grad.to(inputs[0].dtype).to(y.dtype)  # the same numbers in every dtype
    return list(torch.autograd.grad(y, leaves, grad))


def check_gradients(f: Function, plain: Function, inputs: list[Tensor]) -> None:
    """``f``'s gradients are about as good as those of ``plain`` in the first input's dtype."""
    results = (
        gradients(f, inputs),
        gradients(plain, inputs),
        gradients(plain, inputs, torch.float64),
    )
    for x, actual, low, exact in zip(inputs, *results, strict=True):
        assert actual.dtype == x.dtype
        assert_as_accurate(actual, low, exact)


def swiglu(y: Tensor, alpha: float = ALPHA, limit: float = LIMIT) -> Tensor:
    gate, up = y[..., 0::2].clamp(max=limit), y[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def activate(y: Tensor, name: str) -> Tensor:
    """One of ACTIVATIONS, by its formula."""
    if name in ("none", "relu2"):
        return y if name == "none" else torch.where(y > 0, y * y, 0)
    given = ACTIVATIONS[name]
    gate = y[..., 0::2].clamp(max=given["limit"])
    up = y[..., 1::2].clamp(-given["limit"], given["limit"])
    if given["activation"] == "geglu_tanh":
        z = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + torch.tanh(z)) * (up + given["up_offset"])
    return gate * torch.sigmoid(given["alpha"] * gate) * (up + given["up_offset"])


def linear(x: Tensor, expert: Tensor, matrices: Matrices) -> Tensor:
    """x [.., K] with the matrix of its expert [..], in x's dtype."""
    weight, bias = (part.to(x.dtype)[expert] for part in matrices.exact)
    return torch.einsum("...k,...nk->...n", x, weight) + bias


def plain_experts(
    hidden: Tensor, weights: Tensor, indices: Tensor, gate_up: Matrices, down: Matrices
) -> Tensor:
    rows = hidden[:, None].expand(-1, indices.shape[1], -1)
    y = linear(swiglu(linear(rows, indices, gate_up)), indices, down)
    return (y * weights[..., None].to(y.dtype)).sum(dim=1)


def op_experts(
    hidden: Tensor, routes: tuple[Tensor, ...], gate_up: Matrices, down: Matrices, a: int,
    kernels: Kernels,
) -> Tensor:  # fmt: skip
    gammas, gather_index, scatter_index, offsets = routes
    inner = kernels.matmul_ogs(
        hidden, gate_up, offsets, gather_index, activation="swiglu", alpha=ALPHA, limit=LIMIT
    )
    return kernels.matmul_ogs(
        inner, down, offsets, None, scatter_index, gammas, experts_per_token=a
    )


def clamped_mlp(dtype: torch.dtype) -> tuple[Matrices, Matrices]:
    """gate_up, down; biases put a third of gates and of ups beyond either limit, none near it."""
    gate_up = Matrices.random(E, 2 * I, H, dtype)
    quiet = gate_up.scales - 3
    bias = torch.tensor([0.0, 12.0, -12.0])
    gate_up.bias[:, 0::2] = bias.repeat(I // 3)
    gate_up.bias[:, 1::2] = bias.repeat_interleave(3).repeat(I // 9 + 1)[:I]
    return Matrices(gate_up.blocks, quiet, gate_up.bias), Matrices.random(E, H, I, dtype, seed=1)


def random_hidden(t: int, dtype: torch.dtype) -> Tensor:
    return torch.randn((t, H), generator=torch.Generator().manual_seed(2)).to(dtype)


def test_the_mlp_is_clamped_on_both_sides_and_never_near() -> None:
    """What the other tests' bound rests on: rounding must not decide whether a value is clamped."""
    gate_up, _ = clamped_mlp(torch.float32)
    y = linear(random_hidden(T, torch.float64)[:, None], torch.arange(E), gate_up)
    for part in (y[..., 0::2], y[..., 1::2]):
        assert (part > LIMIT).any()
        assert (part < -LIMIT).any()
        assert (part.abs() < LIMIT).any()
        assert ((part.abs() - LIMIT).abs() > 0.5).all()


@pytest.mark.any_layout
@pytest.mark.parametrize(("a", "t", "dtype"), covering((1, A, E), (0, 1, T), DTYPES))
def test_hidden_and_logits(kernels: Kernels, dtype: torch.dtype, a: int, t: int) -> None:
    mlp = clamped_mlp(dtype)
    logits = random_logits(t, E, dtype)
    indices = torch.topk(logits, a).indices

    def plain(hidden: Tensor, logits: Tensor) -> Tensor:
        return plain_experts(hidden, logits.gather(1, indices).softmax(dim=-1), indices, *mlp)

    def f(hidden: Tensor, logits: Tensor) -> Tensor:
        routes = kernels.routing(logits, a)
        return op_experts(hidden, routes, *mlp, a, kernels)

    check_gradients(f, plain, [random_hidden(t, dtype), logits])


@pytest.mark.any_layout
@pytest.mark.parametrize(
    ("dtype", "t"),
    [
        *((torch.float32, 1), (torch.bfloat16, 0), (torch.bfloat16, T)),
        *(exhaustive(*case) for case in zip(DTYPES, (0, 1), strict=True)),
        exhaustive(torch.float32, T),
    ],
)
def test_hidden_and_given_weights(kernels: Kernels, dtype: torch.dtype, t: int) -> None:
    mlp = clamped_mlp(dtype)
    indices, weights = random_routes(t, E, A)

    def f(hidden: Tensor, weights: Tensor) -> Tensor:
        routes = kernels.routing_from_routes(indices, weights, E)
        return op_experts(hidden, routes, *mlp, A, kernels)

    plain = functools.partial(plain_experts, indices=indices, gate_up=mlp[0], down=mlp[1])
    check_gradients(f, plain, [random_hidden(t, dtype), weights.to(dtype)])


@pytest.mark.any_layout
@pytest.mark.parametrize(
    ("dtype", "gather", "scatter", "gammas", "activation"),
    covering(DTYPES, *[(False, True)] * 3, ("none", "swiglu")),
)
def test_matmul_with_and_without_each_of_its_parts(
    kernels: Kernels, dtype: torch.dtype, gather: bool, scatter: bool, gammas: bool, activation: str
) -> None:
    matrices = clamped_mlp(dtype)[0]
    indices, weights = random_routes(T, E, A)
    gather_index, scatter_index, offsets = (torch.tensor(part) for part in sort_routes(indices, E))
    expert = indices.flatten()[scatter_index]

    def f(x: Tensor, *factors: Tensor) -> Tensor:
        return kernels.matmul_ogs(
            x, matrices, offsets.int(),
            gather_index.int() if gather else None,
            scatter_index.int() if scatter else None,
            *factors,
            experts_per_token=A, activation=activation, alpha=ALPHA, limit=LIMIT,
        )  # fmt: skip

    def plain(x: Tensor, *factors: Tensor) -> Tensor:
        y = linear(x[gather_index] if gather else x, expert, matrices)
        y = swiglu(y) if activation == "swiglu" else y
        for factor in factors:
            y = y * factor[:, None].to(y.dtype)
        return y[scatter_index.argsort()].view(T, A, -1).sum(dim=1) if scatter else y

    x = random_hidden(T if gather else T * A, dtype)
    check_gradients(f, plain, [x, weights.flatten()] if gammas else [x])


@pytest.mark.parametrize("activation", [*ACTIVATIONS])
def test_matmul_without_a_bias(activation: str) -> None:
    matrices = Matrices.random(E, 12, 32)
    indices, weights = random_routes(T, E, A)
    gather_index, scatter_index, offsets = (torch.tensor(part) for part in sort_routes(indices, E))
    routes = offsets.int(), gather_index.int(), None

    def f(x: Tensor, gammas: Tensor) -> Tensor:
        return REFERENCE.matmul_ogs(
            x,
            matrices,
            *routes,
            gammas,
            **ACTIVATIONS[activation],
            bias=False,
        )

    def plain(x: Tensor, gammas: Tensor) -> Tensor:
        y = linear(x[gather_index], indices.flatten()[scatter_index], matrices.without_bias)
        y = activate(y, activation)
        return y * gammas[:, None].to(y.dtype)

    x = torch.randn((T, 32), generator=torch.Generator().manual_seed(2))
    check_gradients(f, plain, [x, weights.flatten()])


def test_values_at_the_limit_itself_have_a_gradient(kernels: Kernels) -> None:
    """As ``torch.clamp``'s. x is zero, so that the biases are what is clamped."""
    matrices = Matrices.random(1, 12, 32)
    beside = torch.nextafter(torch.tensor(LIMIT), torch.tensor(8.0)).item()
    values = [LIMIT, 0.5, beside, 0.5, -LIMIT, 0.5, 0.5, LIMIT, 0.5, -LIMIT, 0.5, -beside]
    matrices.bias[0] = torch.tensor(values)

    def f(x: Tensor) -> Tensor:
        offsets = torch.tensor([0, 1], dtype=torch.int32)
        return kernels.matmul_ogs(
            x, matrices, offsets, activation="swiglu", alpha=ALPHA, limit=LIMIT
        )

    def plain(x: Tensor) -> Tensor:
        return swiglu(linear(x, torch.tensor([0]), matrices))

    check_gradients(f, plain, [torch.zeros(1, 32)])


@pytest.mark.parametrize("limit", [7.0, 0.0, -0.5, torch.nan])
def test_what_is_cut_off_has_no_gradient(limit: float) -> None:
    """Also where it is infinite or NaN, of which no product is zero."""
    values = torch.tensor([-8.0, 0.0, 0.5, 8.0, torch.inf, -torch.inf, torch.nan]).double()
    y = torch.cartesian_prod(values, values).flatten().requires_grad_()
    (expected,) = torch.autograd.grad(swiglu(y, ALPHA, limit).sum(), y)
    with torch.no_grad():
        actual = activate_backward(torch.ones(49).double(), y, Activation("swiglu", ALPHA, limit))
    assert torch.equal(actual == 0, expected == 0)
    assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("kind", ["swiglu", "geglu_tanh", "relu2"])
def test_gradients_of_numbers_that_are_large_or_none(kind: str) -> None:
    """Without a limit, as torch's own gradient has them."""
    values = torch.tensor([-8.0, -0.0, 0.5, 90.0, -90.0, torch.inf, -torch.inf, torch.nan]).double()
    y = torch.cartesian_prod(values, values[:5]).flatten().requires_grad_()
    activation = Activation(kind, 1.0, torch.inf, 0.0)
    out = reference.activate(y, activation)
    (expected,) = torch.autograd.grad(out.sum(), y)
    with torch.no_grad():
        actual = activate_backward(torch.ones_like(out), y, activation)
    for odd in (torch.isnan, torch.isposinf, torch.isneginf, torch.logical_not):
        assert torch.equal(odd(actual), odd(expected)), odd


@pytest.mark.parametrize("grad", [torch.inf, -torch.inf, torch.nan])
def test_a_unit_of_relu2_that_is_off_stops_any_gradient(grad: float) -> None:
    y = torch.tensor([-8.0, -0.0, 0.0, -torch.inf, 0.5, torch.nan])
    actual = activate_backward(torch.full_like(y, grad), y, Activation("relu2"))
    assert torch.equal(actual[:4], torch.zeros(4))
    assert not actual[4:].isfinite().any()


def test_routes_of_others_have_no_gradient() -> None:
    mlp = clamped_mlp(torch.float32)
    indices, weights = random_routes(T, E, A)
    first, count = 1, 2
    mine = (indices >= first) & (indices < first + count)
    part = [Matrices(*(o[first : first + count] for o in m.operands)) for m in mlp]

    def f(hidden: Tensor, weights: Tensor) -> Tensor:
        routes = ops.routing.routes(indices, weights, count, first)
        return op_experts(hidden, routes, *part, A, REFERENCE)

    def plain(hidden: Tensor, weights: Tensor) -> Tensor:
        return plain_experts(hidden, weights * mine, indices, *mlp)

    hidden = random_hidden(T, torch.float32)
    check_gradients(f, plain, [hidden, weights])
    grad_hidden, grad_weights = gradients(f, [hidden, weights])
    assert not grad_weights[~mine].any()
    assert not grad_hidden[~mine.any(dim=1)].any()


@pytest.mark.any_layout
def test_logits_of_all_chosen_have_the_gradient_of_what_is_held_here(kernels: Kernels) -> None:
    """Some experts of a token are held elsewhere, and logits are equal: who is chosen of these?"""
    mlp = clamped_mlp(torch.float32)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 2, (T, E), generator=generator).float()
    indices = kernels.topk(logits, A)[1]
    first, count = 1, 2
    mine = (indices >= first) & (indices < first + count)
    part = [Matrices(*(o[first : first + count] for o in m.operands)) for m in mlp]

    def f(hidden: Tensor, logits: Tensor) -> Tensor:
        routes = kernels.routing(logits, A, first, count)
        return op_experts(hidden, routes, *part, A, kernels)

    def plain(hidden: Tensor, logits: Tensor) -> Tensor:
        weights = logits.gather(1, indices).softmax(dim=-1)
        return plain_experts(hidden, weights * mine, indices, *mlp)

    check_gradients(f, plain, [random_hidden(T, torch.float32), logits])


def test_gammas_of_others_hand_no_gradient_on() -> None:
    indices, weights = random_routes(T, E, A)
    weights.requires_grad_()
    gammas = ops.routing.routes(indices, weights, 2, 1)[0]
    (grad,) = torch.autograd.grad(gammas.sum(), weights)
    assert torch.equal(grad, ((indices >= 1) & (indices < 3)).float())


def test_gammas_of_others_hand_no_gradient_on_to_logits() -> None:
    def f(logits: Tensor) -> Tensor:
        return ops.routing(logits, A, 1, 2)[0].sum()

    def plain(logits: Tensor) -> Tensor:
        chosen, indices = torch.topk(logits, A)
        return (chosen.softmax(dim=-1) * ((indices >= 1) & (indices < 3))).sum()

    check_gradients(f, plain, [random_logits(T, E)])


@pytest.mark.parametrize("frozen", ["hidden", "weights"])
def test_one_of_the_two_may_be_frozen(frozen: str) -> None:
    mlp = clamped_mlp(torch.float32)
    indices, weights = random_routes(T, E, A)
    inputs = {"hidden": random_hidden(T, torch.float32), "weights": weights}
    inputs = {name: x.requires_grad_(name != frozen) for name, x in inputs.items()}
    routes = ops.routing.routes(indices, inputs["weights"], E)
    op_experts(inputs["hidden"], routes, *mlp, A, REFERENCE).sum().backward()
    for name, x in inputs.items():
        assert (x.grad is None) == (name == frozen)


def test_index_outputs_have_no_gradient() -> None:
    logits = random_logits(T, E).requires_grad_()
    indices, weights = random_routes(T, E, A)
    for routes in (
        ops.routing(logits, A),
        ops.routing.routes(indices, weights.requires_grad_(), E),
    ):
        assert [output.requires_grad for output in routes] == [True, False, False, False]


def test_a_bias_that_wants_a_gradient_is_an_error() -> None:
    gate_up, _ = clamped_mlp(torch.float32)
    gate_up.bias.requires_grad_()
    offsets = torch.tensor([0, *[T] * E], dtype=torch.int32)
    hidden = random_hidden(T, torch.float32)
    with pytest.raises(
        RuntimeError, match=r"no gradient for an expert bias.*requires_grad_\(False"
    ):
        ops.matmul_ogs(hidden, *REFERENCE.operands(gate_up), offsets)
    with torch.no_grad():
        ops.matmul_ogs(hidden, *REFERENCE.operands(gate_up), offsets)
