"""Routing: what its four outputs mean, for logits and for routes that are chosen already."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from combinations import covering
from implementations import Kernels
from models import DTYPES
from oracle import Bounded, Matrices, assert_within, random_logits, random_routes
from torch import Tensor
from torch._subclasses import FakeTensorMode


def assert_sorted(
    routes: tuple[Tensor, ...], indices: Tensor, num_experts: int, first_expert: int = 0
) -> None:
    """The three index outputs are those of a plain loop over experts."""
    expected = oracle.sort_routes(indices, num_experts, first_expert)
    for actual, values in zip(routes[1:], expected, strict=True):
        assert actual.dtype == torch.int32
        assert actual.tolist() == values


# ---- from logits


@pytest.mark.parametrize(
    ("e", "a", "dtype", "t"),
    covering([(1, 1), (3, 1), (5, 2), (7, 4), (3, 3), (32, 4)], DTYPES, (0, 1, 70)),
)
def test_routing_chooses_weighs_and_sorts(
    kernels: Kernels, dtype: torch.dtype, e: int, a: int, t: int
) -> None:
    logits = random_logits(t, e, dtype)
    indices, weights = oracle.route(logits, a)
    routes = kernels.routing(logits, a)
    assert_sorted(routes, indices, e)
    assert routes[0].dtype == torch.float32
    assert_within(routes[0], weights.view(t * a)[routes[2].long()])


def test_routing_of_logits_that_are_not_contiguous(kernels: Kernels) -> None:
    logits = random_logits(6, 9).T
    for actual, expected in zip(
        kernels.routing(logits, 2), kernels.routing(logits.contiguous(), 2), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("a", [1, 2, 4, 8])
def test_of_equal_logits_the_same_are_chosen_as_ever(kernels: Kernels, a: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (65, 8), generator=generator).float()
    logits[0] = 1.0
    chosen, indices = kernels.topk(logits, a)
    routes = kernels.routing(logits, a)
    assert_sorted(routes, indices, 8)
    assert_within(routes[0], oracle.softmax(chosen).view(65 * a)[routes[2].long()])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_stay_in_their_token(kernels: Kernels, value: float) -> None:
    logits = random_logits(9, 4)
    indices, weights = oracle.route(logits, 3)
    logits[5] = value
    indices[5] = kernels.topk(logits[5], 3)[1]
    gammas, *index_outputs = kernels.routing(logits, 3)
    assert_sorted((gammas, *index_outputs), indices, 4)
    slots = index_outputs[1].long()
    poisoned = slots // 3 == 5
    assert gammas[poisoned].isnan().all()
    assert_within(gammas[~poisoned], weights.view(27)[slots[~poisoned]])


def test_a_logit_of_minus_infinity_weighs_nothing(kernels: Kernels) -> None:
    logits = torch.tensor([[0.25, -math.inf, 2.0]])
    gammas = kernels.routing(logits, 3)[0]
    weights = oracle.softmax(logits[:, [0, 2]])
    assert gammas[1] == 0
    assert_within(gammas[[0, 2]], weights.view(2))


# ---- from routes


@pytest.mark.parametrize("t", [0, 1, 70])
@pytest.mark.parametrize(("e", "a"), [(1, 1), (3, 1), (5, 2), (3, 3)])
def test_given_routes_are_sorted(kernels: Kernels, e: int, a: int, t: int) -> None:
    indices, weights = random_routes(t, e, a)
    routes = kernels.routing_from_routes(indices, weights, e)
    assert_sorted(routes, indices, e)
    assert torch.equal(routes[0], weights.flatten()[routes[2].long()])


def test_rows_of_an_expert_stay_in_the_order_of_their_slots(kernels: Kernels) -> None:
    indices = torch.tensor([[1, 0], [1, 0]]).repeat(50, 1)
    _, gather_index, scatter_index, _ = kernels.routing_from_routes(indices, torch.ones(100, 2), 2)
    assert scatter_index.tolist() == [*range(1, 200, 2), *range(0, 200, 2)]
    assert gather_index.tolist() == [*range(100), *range(100)]


@pytest.mark.parametrize(
    ("dtype", "index_dtype"),
    list(zip(DTYPES, (torch.int16, torch.int32, torch.int64), strict=True)),
)
def test_given_routes_of_any_dtype(
    kernels: Kernels, dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    indices, weights = random_routes(9, 5, 2)
    weights = weights.to(dtype)
    routes = kernels.routing_from_routes(indices.to(index_dtype), weights, 5)
    assert_sorted(routes, indices, 5)
    assert routes[0].dtype == torch.float32
    assert torch.equal(routes[0], weights.flatten()[routes[2].long()].float())


# ---- experts that are held elsewhere


@pytest.mark.parametrize(("first", "count"), [(0, 2), (2, 3), (5, 1), (6, 4)])
def test_routes_of_others_go_last_and_weigh_nothing(
    kernels: Kernels, first: int, count: int
) -> None:
    indices, weights = random_routes(33, 6, 2)
    indices[0], indices[1, 0] = 6, -1  # what expert parallelism marks routes of others with
    weights[0, 0], weights[1, 0] = math.nan, math.inf
    routes = kernels.routing_from_routes(indices, weights, count, first)
    assert_sorted(routes, indices, count, first)
    end = routes[3][-1]
    mine = (indices >= first) & (indices < first + count)
    assert end == mine.sum()
    assert torch.equal(routes[0][end:], torch.zeros(66 - end))
    expected = weights.flatten()[routes[2].long()][:end]
    assert torch.equal(routes[0][:end].nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("t", [0, 1, 70])
def test_only_rows_of_experts_held_here_keep_what_they_weigh(kernels: Kernels, t: int) -> None:
    """All experts are chosen from and take part in the softmax."""
    for dtype, (first, count) in zip(
        (*DTYPES, torch.float32, torch.float32), ((0, 2), (2, 3), (5, 1), (4, 4), (-2, 6)),
        strict=True,
    ):  # fmt: skip
        logits = random_logits(t, 6, dtype)
        gammas, _, slots, _ = kernels.routing(logits, 2)
        weights = torch.empty(2 * t).index_put((slots.long(),), gammas)
        routes = kernels.routing(logits, 2, first, count)
        assert_sorted(routes, oracle.route(logits, 2)[0], count, first)
        end = routes[3][-1]
        assert torch.equal(routes[0][:end], weights[routes[2].long()][:end])
        assert not routes[0][end:].any()


def test_ranges_of_experts_add_up(kernels: Kernels) -> None:
    """Two holders of experts compute parts whose sum is the whole."""
    indices, weights = random_routes(17, 5, 2)
    hidden = torch.randn((17, 64), generator=torch.Generator().manual_seed(0))
    matrices = Matrices.random(5, 48, 64)
    total = torch.zeros((17, 48), dtype=torch.float64)
    bound = torch.zeros((17, 48), dtype=torch.float64)
    for first, stop in ((0, 2), (2, 5)):
        part = Matrices(*(operand[first:stop] for operand in matrices.operands))
        gammas, gather, scatter, offsets = kernels.routing_from_routes(
            indices, weights, stop - first, first
        )
        y = kernels.matmul_ogs(hidden, part, offsets, gather, scatter, gammas, experts_per_token=2)
        expected = expected_rows(hidden, indices - first, weights, part)
        assert_within(y, expected)
        total += y
        bound += expected.error
    whole = expected_rows(hidden, indices, weights, matrices)
    assert_within(total, Bounded(whole.value, bound))


def expected_rows(hidden: Tensor, indices: Tensor, weights: Tensor, part: Matrices) -> Bounded:
    """[T, N]: the experts of one matrix each, weighted and summed; others count nothing."""
    t, a = indices.shape
    rows = Bounded.exact(hidden.repeat_interleave(a, dim=0))
    y = oracle.grouped_linear(rows, indices.flatten(), *part.exact)
    y = oracle.times(y, Bounded.exact(weights.reshape(-1, 1)))
    return oracle.combine(y.view(t, a, y.value.shape[1])).rounded(hidden.dtype)


# ---- fakes


def on_logits(
    t: int, dtype: torch.dtype, kernels: Kernels
) -> tuple[Callable[..., Any], list[Tensor]]:
    return lambda logits: kernels.routing(logits, 2), [random_logits(t, 5, dtype)]


def on_routes(
    t: int, dtype: torch.dtype, kernels: Kernels
) -> tuple[Callable[..., Any], list[Tensor]]:
    indices, weights = random_routes(t, 5, 2)

    def call(indices: Tensor, weights: Tensor) -> Any:
        return kernels.routing_from_routes(indices, weights, 3, 1)

    return call, [indices, weights.to(dtype)]


@pytest.mark.parametrize(
    ("case", "dtype", "t", "transposed"),
    covering([on_logits, on_routes], DTYPES, (0, 1, 33), (False, True)),
)
def test_fakes_are_like_the_real_outputs(
    kernels: Kernels, case: Callable[..., Any], dtype: torch.dtype, t: int, transposed: bool
) -> None:
    call, inputs = case(t, dtype, kernels)
    if transposed:
        inputs = [x.T.contiguous().T for x in inputs]
    with FakeTensorMode() as mode:
        fakes = call(*(mode.from_tensor(x) for x in inputs))
    for fake, real in zip(fakes, call(*inputs), strict=True):
        assert fake.shape == real.shape
        assert fake.stride() == real.stride()
        assert fake.dtype == real.dtype
        assert fake.device == real.device
