"""Canonicalize keeps the meaning: in-place calls that anybody can see stay in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mxfp4_fx.core.options import Options
from mxfp4_fx.passes.canonicalize import canonicalize
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.copies import copy_graph
from mxfp4_fx.passes.pipeline import run_pass


def canonical(f: Callable[..., Any], *args: Any) -> list[str]:
    """The calls of ``f``'s graph after the pass, whose results and effects must be the same."""
    calls: list[str] = []

    def backend(gm: Any, inputs: list[Any]) -> Any:
        copy = copy_graph(gm)
        run_pass(canonicalize, copy, Context(Options(), inputs))
        calls.extend(str(n.target) for n in copy.graph.nodes if n.op == "call_method")
        calls.extend(n.target.__name__ for n in copy.graph.nodes if n.op == "call_function")
        return copy.forward

    torch.compiler.reset()
    expected_args = [arg.clone() for arg in args]
    expected = f(*expected_args)
    actual = torch.compile(f, backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close((actual, args), (expected, tuple(expected_args)), rtol=0, atol=0)
    return calls


X = torch.arange(6.0).view(2, 3)


def test_on_a_fresh_value_becomes_functional() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        y.add_(x)
        return y * y

    assert canonical(f, X.clone()) == ["add", "mul", "mul"]


def test_on_a_view_of_a_fresh_value_becomes_functional() -> None:
    def f(x: Tensor) -> Tensor:
        y = (x * 2).view(6)
        y.add_(1.0)
        return y * 3

    assert "add" in canonical(f, X.clone())


def input_itself(x: Tensor) -> Tensor:
    x.add_(1.0)
    return x * 2


def view_of_input(x: Tensor) -> Tensor:
    x.view(6).add_(1.0)
    return x * 2


def base_used_later(x: Tensor) -> Tensor:
    y = x * 2
    y.view(6).add_(1.0)
    return y * 3


def earlier_view_used_later(x: Tensor) -> Tensor:
    y = x * 2
    z = y[0]
    y.add_(1.0)
    return z * y


def returned_alias(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    z = y.t()
    y.add_(1.0)
    return y, z


@pytest.mark.parametrize(
    "f", [input_itself, view_of_input, base_used_later, earlier_view_used_later, returned_alias]
)
def test_what_somebody_else_sees_stays_in_place(f: Callable[..., Any]) -> None:
    assert "add_" in canonical(f, X.clone())


def through_another_overload(x: Tensor) -> Tensor:
    y = x[None] * 2
    summed = y.view(2, 3).sum(0)
    torch.ops.aten.squeeze_.dim(y, 0)
    return summed


def given_other_memory_later(x: Tensor) -> Tensor:
    y = x * 2
    before = y.view(6)
    y.add_(1)
    y.set_(torch.zeros(2, 3))
    return before * 1


def given_other_memory_later_where_a_view_is_written(x: Tensor) -> Tensor:
    y = x * 2
    view = y.view(6)
    view.add_(1)
    before = y * 1
    y.set_(torch.zeros(2, 3))
    return before + view.sum()


def transposed_later(x: Tensor) -> tuple[Tensor, Tensor]:
    y, z = x * 2, x + 1
    y.add_(z)
    z.t_()
    return y, z


@pytest.mark.parametrize(
    "f",
    [
        through_another_overload,
        given_other_memory_later,
        given_other_memory_later_where_a_view_is_written,
        transposed_later,
    ],
)
def test_what_is_changed_besides_its_values(f: Callable[..., Any]) -> None:
    """Dynamo notes the shape and the memory that a value has when the graph ends."""
    canonical(f, X.clone())


def test_a_write_that_autograd_does_not_see_stays() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        with torch.no_grad():
            y.add_(1.0)
        return y * 3

    assert "add_" in canonical(f, X.clone().requires_grad_())


def test_a_view_without_gradients_stays() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        with torch.no_grad():
            y = y.view(2, 3)
        return y * 3

    assert "view" in canonical(f, X.clone().requires_grad_())


def test_a_sum_with_a_wider_dtype_is_rounded_behind() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        z = x * 2
        same = z.add_(y)  # keeps bfloat16; z.add(y) does not
        return z * same

    x, y = torch.rand(2, 64, 64)
    assert canonical(f, x.bfloat16(), y) == ["add", "to", "mul", "mul"]


def test_a_sum_with_a_wider_dtype_has_the_same_gradients() -> None:
    x, y = torch.rand(2, 64, 64)
    leaves = x.bfloat16().requires_grad_(), y.requires_grad_()
    calls: list[str] = []

    def backend(gm: Any, inputs: list[Any]) -> Any:
        copy = copy_graph(gm)
        run_pass(canonicalize, copy, Context(Options(), inputs))
        calls.extend(str(n.target) for n in copy.graph.nodes if n.op == "call_method")
        return copy.forward

    def f(x: Tensor, y: Tensor) -> Tensor:
        z = x * 2
        z.add_(y)
        return (z * z).sum()

    expected = torch.autograd.grad(f(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(f, backend=backend)(*leaves), leaves)
    assert calls[:2] == ["add", "to"]
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def broadcast_row(x: Tensor) -> Tensor:
    y = x.half()
    y.add_(x[0])  # a functional sum would sum the gradient of x[0] in float32
    return y * 1


def with_factor(x: Tensor) -> Tensor:
    y = x.half()
    y.add_(x, alpha=3)  # a functional sum would multiply the gradient of x by 3 in float32
    return y * 1


def float64(x: Tensor) -> Tensor:
    y = x * 1
    y.add_(x.double())
    return y * 1


@pytest.mark.parametrize("f", [broadcast_row, with_factor, float64])
def test_other_sums_of_two_dtypes_stay_in_place(f: Callable[..., Any]) -> None:
    assert "add_" in canonical(f, X.clone())


def test_an_earlier_reader_keeps_the_old_value() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        before = y + 1
        y.add_(x)
        return before * y

    assert "add" in canonical(f, X.clone())


def test_an_assignment_by_index_becomes_functional() -> None:
    def f(order: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(4)
        return inverse + 1

    calls = canonical(f, torch.tensor([2, 0, 3, 1]))
    assert "index_put" in calls
    assert "setitem" not in calls


def test_an_assignment_to_an_input_stays() -> None:
    def f(x: Tensor, at: Tensor) -> Tensor:
        x[at] = torch.zeros(1, 3)
        return x * 2

    assert "setitem" in canonical(f, X.clone(), torch.tensor([1]))


def test_an_assignment_by_mask_stays() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        y[x > 1] = torch.tensor(7.0)
        return y

    assert "setitem" in canonical(f, X.clone())


def test_views_and_casts_that_do_nothing_are_dropped() -> None:
    def f(x: Tensor) -> Tensor:
        return (x.to(torch.float32).reshape(2, 3).float() * 2).view(2, 3) + 1

    assert canonical(f, X.clone()) == ["mul", "add"]


def test_views_and_casts_that_do_something_stay() -> None:
    def f(x: Tensor) -> Tensor:
        return x.to(torch.float16).reshape(3, 2).float().view(torch.int32) + 1

    calls = canonical(f, X.clone())
    assert calls == ["to", "reshape", "float", "view", "add"]


def test_the_bits_read_anew_are_not_a_view_that_does_nothing() -> None:
    def f(x: Tensor) -> Tensor:
        return x.view(torch.int32) + 1

    assert "view" in canonical(f, X.clone())


def test_what_the_graph_returns_stays_the_same_object() -> None:
    def f(x: Tensor) -> Tensor:
        return x.reshape(2, 3)

    assert canonical(f, X.clone()) == ["reshape"]
