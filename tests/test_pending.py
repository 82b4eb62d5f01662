"""Programs' calls that run later, and programs that are called without AOTAutograd's wrapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mxfp4_fx import backend  # noqa: F401 - registers the ops
from mxfp4_fx.ops import target
from mxfp4_fx.ops.pending import CannotWait, Compiled, prepared
from mxfp4_fx.ops.program import Pending, Program
from mxfp4_fx.passes.native_program import program_of

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.skipif(
        not target.has_native_linears("auto"), reason="no native kernels can be built here"
    ),
]

X, W = torch.arange(64.0).view(2, 32), torch.eye(8, 32)


def f(x: Tensor, weight: Tensor) -> list[Tensor]:
    y = torch.ops.mxfp4.linears(x, [weight], [None], "cpu")[0]
    return [y * 2, y + 1]


def program() -> Program:
    graph: fx.GraphModule = make_fx(f, tracing_mode="fake")(X, W)
    return program_of(graph, (X, W))


def compiled(
    wrapper: Callable[..., Any] = lambda run, *inputs: run([*inputs]),
) -> tuple[Compiled, list[Any]]:
    """A compiled graph whose wrapper calls the program, and the calls of the wrapper."""
    found, through = Compiled(), []
    run = found.watch(program())

    def call(*inputs: Any) -> Any:
        through.append(inputs)
        return wrapper(run, *inputs)

    found.call = call
    return found, through


def assert_right(results: Any, x: Tensor = X) -> None:
    assert all(map(torch.equal, results, f(x, W)))


def test_results_have_their_values_when_it_has_run() -> None:
    x = X.clone()
    call = Pending(program(), [x, W])
    x += 1  # read when it runs
    call.use(torch.empty(call.bytes, dtype=torch.uint8))
    call.run()
    assert_right(call.results, X + 1)


def test_another_tensor_in_an_arguments_place() -> None:
    stands_in, other = torch.full_like(X, torch.nan), X + 2
    call = Pending(program(), [stands_in, W])
    call.use(torch.empty(call.bytes, dtype=torch.uint8))
    assert call.reads(other) == []
    call.replace(call.reads(stands_in), other)
    call.run()
    assert_right(call.results, other)


def test_a_wrapper_that_does_nothing_is_left_out() -> None:
    found, through = compiled()
    for _ in range(3):
        assert_right(found(X, W))
    assert len(through) == 1


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda run, x, w: run([x.clone(), w]),
        lambda run, x, w: [result.view(-1).view(2, 8) for result in run([x, w])],
        lambda run, x, w: run([x, w])[::-1],
        lambda run, x, w: [*run([x, w]), x],
        lambda run, x, w: run([x, w])[0],
    ],
    ids=["another input", "other results", "another order", "one more result", "no list"],
)
def test_a_wrapper_that_does_something_stays(wrapper: Any) -> None:
    found, through = compiled(wrapper)
    for _ in range(3):
        found(X, W)
    assert len(through) == 3
    with prepared(), pytest.raises(CannotWait):
        found(X, W)
    assert len(through) == 3


def test_prepared_calls_wait() -> None:
    found, through = compiled()
    found(X, W)
    with prepared() as calls:
        results = found(X + 1, W)
    (call,) = calls
    call.use(torch.empty(call.bytes, dtype=torch.uint8))
    call.run()
    assert_right(results, X + 1)
    assert_right(found(X, W))  # no longer prepared
    assert (len(calls), len(through)) == (1, 1)


def test_a_call_that_would_compute_at_once_is_refused() -> None:
    found, through = compiled()
    other = Compiled()
    other.call = found.call
    for one in (found, other):  # not seen yet, and no program
        with prepared(), pytest.raises(CannotWait):
            one(X, W)
    assert through == []
