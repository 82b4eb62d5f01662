"""What is taken of torch's private parts for nested compile regions does what it is trusted to."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mxfp4_fx.core import torch_private_capture as capture


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.count = 2

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) * self.count
        return out


SEEN: dict[str, Any] = {}
at_capture = capture.at_capture()


def look(context: Any) -> None:
    found = SEEN.setdefault("objects", [])
    found.append(capture.object_at_capture(context, "part"))
    SEEN["sizes"] = capture.sizes(capture.tensor_at_capture(context, "x"))
    SEEN["none"] = capture.tensor_at_capture(context, "nothing")
    SEEN["kinds"] = [capture.is_tensor_or_none(context, name) for name in ("x", "nothing", "part")]
    SEEN["pairs"] = [capture.are_tensors(context, "pair", count) for count in (1, 2)]
    SEEN["state"] = capture.graph_under_capture(), capture.are_floats_symbolic()


def guard(context: Any) -> None:
    (_, first), *others = SEEN["objects"]
    for _, source in others[-1:]:
        guards = capture.guards_on(first)
        assert guards
        capture.guard_alike(guards, first, source)


def _call(part: Part, x: Tensor) -> Tensor:
    return part(x)


called = capture.region(_call, 8)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(), Part()])

    def forward(self, x: Tensor) -> Tensor:
        nothing = None  # noqa: F841
        for part in self.parts:
            pair = (x, x)  # noqa: F841
            at_capture(look)
            x = called(part, x)
            at_capture(guard)
        return x


@pytest.fixture
def compiled() -> tuple[Whole, Callable[..., Any], list[list[int]]]:
    torch._dynamo.reset()
    SEEN.clear()
    graphs: list[list[int]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        op = capture.invoke_subgraph()
        names = [str(n.args[1]) for n in gm.graph.nodes if n.target is op]
        graphs.append([*collections.Counter(names).values()])
        return gm.forward

    whole = Whole().requires_grad_(False)
    return whole, torch.compile(whole, backend=backend, fullgraph=True), graphs


def test_what_a_capture_shows(compiled: Any) -> None:
    whole, call, graphs = compiled
    call(torch.ones(2, 4))
    assert [part for part, _ in SEEN["objects"]] == list(whole.parts)
    paths = [capture.path(source) for _, source in SEEN["objects"]]
    assert all(f"'{at}'" in path and "parts" in path for at, path in enumerate(paths))
    assert SEEN["sizes"][:2] == ((2, 4), (4, 1))
    assert SEEN["none"] is None
    assert SEEN["kinds"] == [True, True, False]
    assert SEEN["pairs"] == [False, True]
    assert SEEN["state"][1] is False
    assert graphs == [[2]]


def test_a_change_of_a_part_that_shares_a_graph_compiles_anew(compiled: Any) -> None:
    whole, call, graphs = compiled
    x = torch.ones(2, 4)
    for at, part in enumerate(whole.parts):
        call(x)
        part.count = 3 + at  # Dynamo itself does not guard the second part's
        assert torch.equal(call(x), whole(x))
    assert len(graphs) == 3


def test_symbolic_floats_are_known_beforehand(compiled: Any) -> None:
    whole, _, _ = compiled
    del whole.parts[1]
    torch.compile(whole, backend="eager", dynamic=True)(torch.ones(2, 4))
    assert SEEN["state"][1] is True


def test_numbers_seen_are_new_after_a_reset() -> None:
    before = capture.scalars_seen()
    assert capture.scalars_seen() is before
    torch._dynamo.reset()
    assert capture.scalars_seen() is not before


def test_modules_and_tensors() -> None:
    linear = nn.Linear(2, 2)
    assert "_forward_hooks" in capture.MODULE_PARTS
    assert "in_features" not in capture.MODULE_PARTS
    assert not [*capture.hooks_of(linear)]
    linear.register_forward_hook(print)
    assert [*capture.hooks_of(linear)] == [print]
    assert not capture.is_compiled_module(linear)
    linear.compile(backend="eager")
    assert capture.is_compiled_module(linear)
    assert not capture.has_hooks(linear.weight)
    linear.weight.register_hook(print)
    assert capture.has_hooks(linear.weight)
    assert not capture.is_in_ddp()


def test_a_settled_size_is_made_of_the_symbols_in_use() -> None:
    found: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.extend(v for v in inputs if isinstance(v, torch.SymInt))
        return gm.forward

    def add(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    x, y = torch.ones(3), torch.ones(3)
    torch.compile(add, backend=backend, dynamic=True)(x, y)
    made = [capture.settled(size) for size in found]
    assert len({str(size.node._expr) for size in made}) == 1
    assert all(int(size) == 3 for size in made)
    assert capture.settled(7) == 7
