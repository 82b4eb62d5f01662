"""Compiled functions that are called without Dynamo: the same code runs, where its guards hold."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from models import Graphs
from torch import Tensor, nn

from mxfp4_fx.core.torch_private_direct import Direct

pytestmark = pytest.mark.usefixtures("no_gradients")


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.full((3,), factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.factor


class Counted:
    """A function that is compiled, and the calls of it that pass through Dynamo."""

    def __init__(self) -> None:
        self.graphs, self.through = Graphs(), 0
        bias = torch.ones(3)

        def function(module: Any, x: Tensor) -> Tensor:
            return module(x) + bias

        compiled = torch.compile(function, backend=self.graphs, fullgraph=True)

        def counted(*args: Any) -> Any:
            self.through += 1
            return compiled(*args)

        self.call = Direct(function, counted)


@pytest.fixture
def counted() -> Counted:
    return Counted()


X = torch.arange(3.0)


def test_no_call_passes_through_dynamo_but_the_first(counted: Counted) -> None:
    module = Scaled(2.0)
    assert [counted.call(module, X + at).tolist() for at in (0, 0, 5)] == [
        [3.0, 5.0, 7.0],
        [3.0, 5.0, 7.0],
        [13.0, 15.0, 17.0],
    ]
    assert counted.through == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "factor", 3.0),
        lambda m: setattr(m, "forward", lambda x: x),
        lambda m: setattr(m, "weight", nn.Parameter(torch.ones(3, dtype=torch.float64))),
        lambda m: m.double(),
    ],
    ids=["an attribute", "the forward", "a parameter", "a dtype"],
)
def test_a_change_of_the_module_is_seen(change: Any, counted: Counted) -> None:
    module, other = Scaled(2.0), Scaled(2.0)
    counted.call(module, X)
    change(module)
    expected = module(X) + torch.ones(3)
    assert torch.equal(counted.call(module, X), expected)
    assert torch.equal(counted.call(module, X), expected)
    assert torch.equal(counted.call(other, X), other(X) + torch.ones(3))
    assert (counted.through, len(counted.graphs.seen)) == (2, 2)


def test_gradients_are_recorded_where_they_are_wanted(counted: Counted) -> None:
    module = Scaled(2.0)
    counted.call(module, X)
    with torch.enable_grad():
        counted.call(module, X).sum().backward()
    assert module.weight.grad is not None
    assert torch.equal(module.weight.grad, X)


def test_a_stance_holds(counted: Counted) -> None:
    module = Scaled(2.0)
    counted.call(module, X)
    with torch.compiler.set_stance("force_eager"):
        counted.call(module, X)
    assert counted.through == 2


def test_a_stance_that_names_another_backend_holds(counted: Counted) -> None:
    """Also the one of the first call, whose code no later call runs."""
    module, other = Scaled(2.0), Graphs()
    torch._dynamo.register_backend(other, name="other_of_test_direct")
    for warm in (False, True):
        if warm:
            counted.call(module, X)
        with torch.compiler.set_stance(force_backend=other):
            counted.call(module, X)
    counted.call(module, X)
    assert (len(other.seen), len(counted.graphs.seen), counted.through) == (1, 1, 3)


def test_an_error_of_the_compiled_code_is_raised(counted: Counted) -> None:
    module = Scaled(2.0)
    counted.call(module, X)
    graph = counted.graphs.seen[0]

    def fails(*_: Any) -> None:
        raise ValueError("in the graph")

    graph.register_forward_pre_hook(fails)
    code = counted.call._entries[0][1]
    with pytest.raises(ValueError, match="in the graph"):
        graph(X)
    assert torch._C._dynamo.eval_frame.set_eval_frame(None) is None
    assert code is counted.call._entries[0][1]


def test_torch_is_asked_again_after_a_reset(counted: Counted) -> None:
    module = Scaled(2.0)
    counted.call(module, X)
    torch._dynamo.reset()
    counted.call(module, X)
    assert (counted.through, len(counted.graphs.seen)) == (2, 2)


def test_code_whose_objects_are_gone_is_not_run() -> None:
    """Dynamo drops such code; a new object could lie at the address of the old one."""
    graphs = Graphs()

    def function(kind: Any, x: Tensor) -> Tensor:
        return x + kind.step

    direct = Direct(function, torch.compile(function, backend=graphs, fullgraph=True))

    def make(step: int) -> type:
        return type("Kind", (), {"step": step})

    assert direct(make(1), X).tolist() == [1.0, 2.0, 3.0]
    gc.collect()
    assert [guards.cache_entry for guards, _ in direct._entries] == [None]
    assert direct(make(2), X).tolist() == [2.0, 3.0, 4.0]


def test_tracing_is_torchs_own_error(counted: Counted) -> None:
    module = Scaled(2.0)
    counted.call(module, X)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda x: counted.call(module, x), (X,), check_trace=False)


def test_below_another_compiled_call_nothing_is_compiled_again(counted: Counted) -> None:
    """Dynamo watches all Python calls below a function that it could not capture whole."""
    module, outer = Scaled(2.0), Graphs()
    counted.call(module, X)

    def calls(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return counted.call(module, x)

    expected = calls(X)
    compiled = torch.compile(calls, backend=outer)
    assert torch.equal(compiled(X), expected)
    assert len(counted.graphs.seen) == 1
