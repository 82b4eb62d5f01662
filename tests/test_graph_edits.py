"""No single change to a captured graph makes a wrong rewrite.

Every call of an MLP's graph is changed in every way of :func:`edits` (each number, each operand,
each operation) and of :func:`writes` (something in memory is overwritten). What torch itself cannot
run is no program and is left out. Of the rest each must be refused, or, where the change is one of
the model's constants or outside the experts, be rewritten to the same result.
"""

from __future__ import annotations

import itertools
import logging
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fuzz.judge import in_float64
from models import hidden, mlp
from oracle import assert_as_accurate
from torch import Tensor, fx, nn
from torch.nn.functional import hardtanh, softmax

from mxfp4_fx.backend import bind
from mxfp4_fx.core.options import Options
from mxfp4_fx.passes.canonicalize import canonicalize
from mxfp4_fx.passes.context import REWRITE, Context
from mxfp4_fx.passes.copies import copy_graph
from mxfp4_fx.passes.fuse_moe import fuse_moe
from mxfp4_fx.passes.pipeline import run_pipeline

# Changes a copied graph, whose nodes it is given by name; returns the nodes it made or changed.
Change = Callable[[dict[str, fx.Node]], set[fx.Node]]
Path = tuple[Any, ...]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    meta_errors = logging.getLogger("torch._subclasses.fake_tensor")  # of what is no program
    level = meta_errors.level
    meta_errors.setLevel(logging.CRITICAL)
    with torch.no_grad():
        yield
    meta_errors.setLevel(level)


def capture(form: str, dynamic: bool, parallel: bool) -> tuple[fx.GraphModule, list[Any]]:
    """An MLP's graph and inputs; the input is large enough to reach SwiGLU's limits."""
    captured: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured.append((gm, inputs))
        return gm.forward

    module = mlp(form=form)
    module.experts._is_expert_parallel = parallel
    torch.compile(module, backend=keep, dynamic=dynamic)(hidden() * 8)
    ((gm, inputs),) = captured
    return gm, inputs


def edits(gm: fx.GraphModule) -> Iterator[tuple[str, Change]]:
    """Every change of one number, operand or operation, with a text that says which."""
    earlier: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node.op.startswith("call_"):
            arguments = list(arguments_of(node))
            for path, value in arguments:
                for text, change in _replacements(node, path, value, earlier):
                    yield f"{node}{list(path)}: {value} -> {text}", change
            nodes = [(path, v) for path, v in arguments if isinstance(v, fx.Node)]
            for (p, a), (q, b) in itertools.combinations(nodes, 2):
                if a is not b:
                    yield f"{node}: {a} <-> {b}", _swap(node, (p, a), (q, b))
            for target in _OTHER_TARGETS.get(node.target, ()):
                yield f"{node}: calls {target}", _call(node, target)
        if node.op != "output":
            earlier.append(node)


def _replacements(
    node: fx.Node, path: Path, value: Any, earlier: list[fx.Node]
) -> Iterator[tuple[str, Change]]:
    if not isinstance(value, fx.Node):
        for other in _other_literals(value):
            yield str(other), _put(node, path, other)
        return
    for other in earlier:
        if other is not value and _alike(value, other):
            yield str(other), _put(node, path, other)
    if isinstance(value.meta.get("example_value"), Tensor):
        for function, arguments in ((torch.neg, ()), (torch.flip, ([0],)), (torch.roll, (1, -1))):
            text = f"{function.__name__}({value})"
            yield text, _put_call(node, path, function, (value, *arguments))


_OTHER_TARGETS: dict[Any, tuple[Any, ...]] = {
    operator.add: (operator.sub, operator.mul),
    operator.mul: (operator.add, operator.truediv),
    operator.floordiv: (operator.mod,),
    operator.ge: (operator.gt, operator.le),
    torch.sigmoid: (torch.tanh,),
    torch.empty_like: (torch.zeros_like,),
    softmax: (torch.nn.functional.log_softmax,),
    "add_": ("sub_", "mul_"),
    "sum": ("mean", "amax", "prod"),
}


def _other_literals(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, *([-value, 2 * value] if value else []), None]
    if isinstance(value, float):
        return [2 * value, value / 2, -value, 1.0, None]
    if isinstance(value, torch.dtype):
        others = (torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.int64, None)
        return [dtype for dtype in others if dtype != value]
    return [0, 1, 2, 0.5] if value is None else []


def _alike(a: fx.Node, b: fx.Node) -> bool:
    a_value, b_value = (node.meta.get("example_value") for node in (a, b))
    if not isinstance(a_value, Tensor) or not isinstance(b_value, Tensor):
        return type(a_value) is type(b_value)
    return a_value.shape == b_value.shape and a_value.dtype == b_value.dtype


def writes(gm: fx.GraphModule) -> Iterator[tuple[str, Change]]:
    """Every tensor overwritten, as soon as it is there, in the experts' midst, and at the end."""
    nodes = [node for node in gm.graph.nodes if node.op != "output"]
    midst = next(node for node in nodes if node.target is torch.sigmoid)
    last_input = [node for node in nodes if node.op == "placeholder"][-1]
    for node in nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.ndim:  # without dimensions: Dynamo's float inputs
            start = last_input if node.op == "placeholder" else node
            for place in dict.fromkeys([start, max(start, midst), nodes[-1]]):
                for name, (target, *arguments) in _WRITES.items():
                    yield f"{node}: {name} after {place}", _write(node, place, target, arguments)


_WRITES: dict[str, tuple[Any, ...]] = {
    "mul_": ("mul_", 0),  # canonicalize makes it functional, where it may
    "sub_": ("sub_", 1),
    "setitem": (operator.setitem, 0, 0),
    "hardtanh": (hardtanh, -1000.0, 0.0, True),
}


def _put(node: fx.Node, path: Path, value: Any) -> Change:
    def change(nodes: dict[str, fx.Node]) -> set[fx.Node]:
        other = nodes[value.name] if isinstance(value, fx.Node) else value
        _set_argument(nodes[node.name], path, other)
        return {nodes[node.name]}

    return change


def _put_call(node: fx.Node, path: Path, function: Any, arguments: tuple[Any, ...]) -> Change:
    def change(nodes: dict[str, fx.Node]) -> set[fx.Node]:
        user, value = nodes[node.name], nodes[arguments[0].name]
        with user.graph.inserting_before(user):
            made = user.graph.call_function(function, (value, *arguments[1:]))
        _set_argument(user, path, made)
        return {made, user}

    return change


def _swap(node: fx.Node, a: tuple[Path, fx.Node], b: tuple[Path, fx.Node]) -> Change:
    def change(nodes: dict[str, fx.Node]) -> set[fx.Node]:
        return _put(node, a[0], b[1])(nodes) | _put(node, b[0], a[1])(nodes)

    return change


def _call(node: fx.Node, target: Any) -> Change:
    def change(nodes: dict[str, fx.Node]) -> set[fx.Node]:
        nodes[node.name].target = target
        return {nodes[node.name]}

    return change


def _write(node: fx.Node, place: fx.Node, target: Any, arguments: list[Any]) -> Change:
    def change(nodes: dict[str, fx.Node]) -> set[fx.Node]:
        graph = nodes[node.name].graph
        create = graph.call_method if isinstance(target, str) else graph.call_function
        with graph.inserting_after(nodes[place.name]):
            return {create(target, (nodes[node.name], *arguments))}

    return change


_SLICE = ("start", "stop", "step")


def arguments_of(node: fx.Node) -> Iterator[tuple[Path, Any]]:
    """Every argument with the path to it; tuples, lists and slices are opened."""

    def walk(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
        if isinstance(value, tuple | list):
            for at, part in enumerate(value):
                yield from walk((*path, at), part)
        elif isinstance(value, slice):
            for name in _SLICE:
                yield (*path, name), getattr(value, name)
        else:
            yield path, value

    for at, value in enumerate(node.args):
        yield from walk((at,), value)
    for name, value in node.kwargs.items():
        yield from walk((name,), value)


def _set_argument(node: fx.Node, path: Path, new: Any) -> None:
    def put(value: Any, path: Path) -> Any:
        if not path:
            return new
        if isinstance(value, slice):
            parts = {name: getattr(value, name) for name in _SLICE}
            return slice(*{**parts, path[0]: new}.values())
        return type(value)(put(v, path[1:]) if at == path[0] else v for at, v in enumerate(value))

    if isinstance(path[0], int):
        node.args = put(tuple(node.args), path)
    else:
        node.kwargs = {**node.kwargs, path[0]: put(node.kwargs[path[0]], path[1:])}


def propagate(graph: fx.Graph, stale: set[fx.Node]) -> None:
    """Fake values of ``stale`` nodes and all that depends on them, as Dynamo makes them."""
    values = (node.meta.get("example_value") for node in graph.nodes)
    mode = next(value for value in values if isinstance(value, Tensor)).fake_mode
    for node in graph.nodes:
        if node.op.startswith("call_") and (
            node in stale or not stale.isdisjoint(node.all_input_nodes)
        ):
            stale.add(node)
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: n.meta["example_value"]
            )
            function = getattr(args[0], node.target) if node.op == "call_method" else node.target
            args = args[1:] if node.op == "call_method" else args
            with mode:
                node.meta["example_value"] = function(*args, **kwargs)


def is_rewritten(gm: fx.GraphModule, inputs: list[Any]) -> bool:
    gm, ctx = copy_graph(gm), Context(Options(), inputs)
    canonicalize(gm, ctx)
    fuse_moe(gm, ctx)
    return any(REWRITE in node.meta for node in gm.graph.nodes)


def check_same_result(gm: fx.GraphModule, inputs: list[Any]) -> None:
    """The whole pipeline's result does what ``gm`` does: the results, and the inputs afterwards."""
    actual_inputs, inputs = fresh(inputs, torch.float32), fresh(inputs, torch.float32)
    exact = in_float64(gm)(*fresh(inputs, torch.float64))
    lowered, ctx = run_pipeline(gm, actual_inputs, Options(inner="eager"))
    actual = bind(gm, lowered, ctx, Options(inner="eager"))(*actual_inputs)
    for a, e, x in zip(actual, gm(*inputs), exact, strict=True):
        if e.is_floating_point():
            assert_as_accurate(a, e, x.double())
        else:
            assert torch.equal(a, e)
    for a, e in zip(actual_inputs, inputs, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, e), "an input is written to differently"


def fresh(inputs: list[Any], dtype: torch.dtype) -> list[Any]:
    """Copies of a graph's inputs: parameters stay parameters, symbolic sizes become numbers."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return int(value)
        tensor = value.detach().clone()
        tensor = tensor.to(dtype) if tensor.dtype == torch.float32 else tensor
        is_parameter = isinstance(value, nn.Parameter)
        return nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor

    return [one(value) for value in inputs]


def runs(gm: fx.GraphModule, inputs: list[Any]) -> bool:
    try:
        gm(*fresh(inputs, torch.float32))
    except Exception:
        return False
    return True


# What grouped_mm's routes are refused with, if they are taken as they are.
REFUSED_ID = re.compile(r"expert -?\d+ is out of range: there are \d+ experts")


def check_all(
    changes: Callable[[fx.GraphModule], Iterator[tuple[str, Change]]],
    gm: fx.GraphModule,
    inputs: list[Any],
    every: int,
) -> tuple[int, list[str]]:
    """Apply every n-th change, and every swap, each to a copy of its own.

    Returns:
        How many were refused, and which were rewritten.
    """
    assert is_rewritten(gm, inputs)
    refused, rewritten, wrong = 0, [], []
    for at, (text, change) in enumerate(changes(gm)):
        if at % every and " <-> " not in text:
            continue
        edited = copy_graph(gm)
        try:
            propagate(edited.graph, change({node.name: node for node in edited.graph.nodes}))
            edited.graph.lint()
        except Exception:
            continue  # torch cannot run it
        if not is_rewritten(edited, inputs):
            refused += 1
            continue
        edited.recompile()
        try:
            check_same_result(edited, inputs)
            rewritten.append(text)
        except Exception as error:
            if not runs(edited, inputs):
                continue  # which fake tensors did not show
            if REFUSED_ID.match(str(error)):
                refused += 1  # when it runs: uncompiled, such rows go to some expert
                continue
            wrong.append(f"{text}: {error}".splitlines()[0])
    assert not wrong, f"{len(wrong)} wrong rewrites:\n" + "\n".join(wrong)
    return refused, rewritten


def thinned(graphs: list[tuple[Any, ...]], others: list[tuple[Any, ...]]) -> list[Any]:
    """A few changes of ``graphs``; exhaustively all of them, and a part of the others' changes."""
    cases = [(23, graphs), (1, graphs), (4, others)]
    return [
        pytest.param(*graph, every, marks=[pytest.mark.exhaustive] * (every != 23))
        for every, chosen in cases
        for graph in chosen
    ]


@pytest.mark.parametrize(
    ("form", "dynamic", "parallel", "every"),
    thinned(
        [("grouped_mm", True, False), ("batched_mm", False, False)],
        [
            *(("grouped_mm", False, parallel) for parallel in (False, True)),
            *(("batched_mm", *ways) for ways in ((True, False), (False, True))),
        ],
    ),
)
def test_of_numbers_operands_and_operations(
    form: str, dynamic: bool, parallel: bool, every: int
) -> None:
    refused, rewritten = check_all(edits, *capture(form, dynamic, parallel), every)
    assert refused > 150 // every
    # what stands before and behind the experts, and SwiGLU's alpha
    assert len(rewritten) > 20 // every
    if not dynamic and every == 1:
        assert any("1.702 -> 3.404" in text for text in rewritten)


@pytest.mark.parametrize(
    ("form", "parallel", "every"),
    thinned(
        [("grouped_mm", True), ("batched_mm", False)],
        [("grouped_mm", False), ("batched_mm", True)],
    ),
)
def test_of_what_is_in_memory(form: str, parallel: bool, every: int) -> None:
    refused, rewritten = check_all(writes, *capture(form, False, parallel), every)
    assert refused > 150 // every
    assert len(rewritten) > 20 // every  # after the experts, and of what they do not read


def test_rows_of_another_dtype_than_their_weights() -> None:
    def of_casts(gm: fx.GraphModule) -> Iterator[tuple[str, Change]]:
        # Fake tensors let a grouped matmul of two dtypes pass, torch itself does not.
        wanted = "[1]: torch.float32 -> torch.bfloat16"
        yield from ((text, change) for text, change in edits(gm) if text.endswith(wanted))

    refused, rewritten = check_all(of_casts, *capture("grouped_mm", False, False), 1)
    assert refused == 2
    assert rewritten == ["hidden_states_1[1]: torch.float32 -> torch.bfloat16"]  # of the input
