"""Experts inside nested compile regions and activation checkpoints are rewritten like all others.

A region changes no number: results are compared bit for bit with those of the same model without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
from models import Graphs, Layers, compile_with, hidden, mlp, pack
from near_miss import with_gate
from test_graphs import readable
from test_verification import break_kernel
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import mxfp4_fx
from mxfp4_fx.core.errors import MissedRewriteError, VerificationError
from mxfp4_fx.core.options import Options
from mxfp4_fx.passes.pipeline import run_pipeline
from mxfp4_fx.weights.freed import is_freed

X = hidden()


def step(module: nn.Module, x: Tensor) -> Tensor:
    return x + module(x)[0]


region_step = torch.compiler.nested_compile_region(step)


class Stack(nn.Module):
    """MLPs one after the other, each called by ``call``."""

    def __init__(self, *modules: nn.Module, call: Callable[..., Tensor] = region_step) -> None:
        super().__init__()
        self.layers, self.call = nn.ModuleList(modules), call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(layer, x)
        return x


def stack(count: int = 3, call: Callable[..., Tensor] = region_step) -> Stack:
    return Stack(*(mlp(seed=at).requires_grad_(False) for at in range(count)), call=call)


def plain(whole: Stack) -> Stack:
    """The same modules without regions."""
    return Stack(*whole.layers, call=step)


def bodies(graphs: Graphs) -> list[fx.GraphModule]:
    return [
        child
        for gm in graphs.seen
        for child in gm.modules()
        if isinstance(child, fx.GraphModule) and child is not gm
    ]


def rewritten(gm: fx.GraphModule) -> int:
    return sum("kernels" in n.kwargs and "scatter_index" in n.kwargs for n in gm.graph.nodes)


@pytest.mark.usefixtures("no_gradients")
class TestOneBody(expecttest.TestCase):
    def test_three_layers_share_it(self) -> None:
        graphs = Graphs()
        compile_with(stack(), graphs, options={"strict": True})(X)
        (body,) = bodies(graphs)
        assert rewritten(body) == 1

    def test_each_call_gives_it_its_own_weights(self) -> None:
        graphs = Graphs()
        compile_with(stack(2), graphs)(X)
        self.assertExpectedInline(
            readable(graphs.seen[0]),
            """\
input l_x_: float32[1, 7, 64]
input layers.0.router.weight: float32[6, 64]
input layers.0.router.bias: float32[6]
input layers.0.experts.gate_up_proj_blocks: uint8[6, 6, 1, 1088]
input layers.0.experts.gate_up_proj_scales: uint8[6, 6]
input layers.0.experts.gate_up_proj_bias: float32[6, 192]
input layers.0.experts.down_proj_blocks: uint8[6, 2, 2, 1088]
input layers.0.experts.down_proj_scales: uint8[6, 2]
input layers.0.experts.down_proj_bias: float32[6, 64]
input layers.1.router.weight: float32[6, 64]
input layers.1.router.bias: float32[6]
input layers.1.experts.gate_up_proj_bias: float32[6, 192]
input layers.1.experts.gate_up_proj_blocks: uint8[6, 6, 1, 1088]
input layers.1.experts.gate_up_proj_scales: uint8[6, 6]
input layers.1.experts.down_proj_bias: float32[6, 64]
input layers.1.experts.down_proj_blocks: uint8[6, 2, 2, 1088]
input layers.1.experts.down_proj_scales: uint8[6, 2]
mxfp4_body_0 = graph mxfp4_body_0
invoke_subgraph = invoke_subgraph(mxfp4_body_0, 'mxfp4_body_0', l_x_,
    layers.0.router.weight, layers.0.router.bias, layers.0.experts.gate_up_proj_bias,
    layers.0.experts.gate_up_proj_blocks, layers.0.experts.gate_up_proj_scales,
    layers.0.experts.down_proj_bias, layers.0.experts.down_proj_blocks,
    layers.0.experts.down_proj_scales)
x: float32[1, 7, 64] = getitem(invoke_subgraph, 0)
mxfp4_body_1 = graph mxfp4_body_0
invoke_subgraph_1 = invoke_subgraph(mxfp4_body_1, 'mxfp4_body_0', x, layers.1.router.weight,
    layers.1.router.bias, layers.1.experts.gate_up_proj_bias,
    layers.1.experts.gate_up_proj_blocks, layers.1.experts.gate_up_proj_scales,
    layers.1.experts.down_proj_bias, layers.1.experts.down_proj_blocks,
    layers.1.experts.down_proj_scales)
x_1: float32[1, 7, 64] = getitem(invoke_subgraph_1, 0)
return [x_1]
""",
        )

    def test_every_layer_is_named(self) -> None:
        told = mxfp4_fx.explain(stack(), X)
        assert [r.layer for r in told.rewrites] == [f"layers.{at}.experts" for at in range(3)]

    def test_any_number_of_tokens(self) -> None:
        graphs, whole = Graphs(), stack()
        run = compile_with(whole, graphs, options={"strict": True})
        expected = compile_with(plain(whole))
        for length in (5, 6, 9):
            x = hidden(length)
            torch._dynamo.mark_dynamic(x, 1)
            assert torch.equal(run(x), expected(x))
        assert len(graphs.seen) == 1

    def test_weights_that_change_are_noticed(self) -> None:
        whole = stack()
        run = compile_with(whole)
        run(X)
        whole.layers[2].experts.down_proj.mul_(2)
        assert torch.equal(run(X), compile_with(plain(whole))(X))

    def test_weights_are_freed(self) -> None:
        whole = stack()
        want = compile_with(plain(whole))(X)
        run = compile_with(whole, options={"free_weights": True})
        assert torch.equal(run(X), want)
        assert all(is_freed(layer.experts.gate_up_proj) for layer in whole.layers)
        assert torch.equal(run(X), want)

    def test_a_layer_that_is_called_twice_is_bound_once(self) -> None:
        graphs, layer = Graphs(), mlp()
        compile_with(Stack(layer, mlp(seed=1), layer), graphs)(X)
        names = [n.name for n in graphs.seen[0].graph.find_nodes(op="placeholder")]
        assert sum(name.endswith("_blocks") for name in names) == 4

    def test_a_weight_that_a_region_and_the_graph_around_it_read_is_bound_once(self) -> None:
        graphs, first, second = Graphs(), mlp(), mlp(seed=1)

        def run(x: Tensor) -> Tensor:
            return first(region_step(second, region_step(first, x)))[0]

        compile_with(run, graphs, options={"strict": True})(X)
        names = [n.name for n in graphs.seen[0].graph.find_nodes(op="placeholder")]
        assert sum(name.endswith("_blocks") for name in names) == 4


def with_other_constants() -> Stack:
    whole = stack()
    whole.layers[1].experts.limit = 1.5
    return whole


def with_a_near_miss() -> Stack:
    return Stack(mlp(), with_gate({"torch.sigmoid": "torch.tanh"}), mlp(seed=2))


STACKS = {
    "dense": (stack, {"strict": True}),
    "packed": (lambda: pack(stack()), {"strict": True}),
    "skipped": (stack, {"skip": "layers.1"}),
    "other constants": (with_other_constants, {"strict": True}),
    "near miss": (with_a_near_miss, {}),
    "inductor": (stack, {"inner": "inductor"}),
}


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.filterwarnings("ignore::mxfp4_fx.core.errors.MissedRewriteWarning")
@pytest.mark.parametrize(
    "name",
    ["dense", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in STACKS if n != "dense")],
)
def test_the_result_is_that_without_regions(name: str) -> None:
    make, options = STACKS[name]
    # A graph with regions is never a native program, whose results are rounded otherwise.
    options = {**options, "programs": False}
    whole = make()
    actual = compile_with(whole, options.get("inner", "eager"), options=options)(X)
    torch.compiler.reset()
    expected = compile_with(plain(whole), options.get("inner", "eager"), options=options)(X)
    assert torch.equal(actual, expected)


@pytest.mark.usefixtures("no_gradients")
class TestBodiesOfTheirOwn:
    def test_a_skipped_layer(self) -> None:
        graphs, whole = Graphs(), stack()
        compile_with(whole, graphs, options={"skip": "layers.1", "strict": True})(X)
        assert sorted(map(rewritten, bodies(graphs))) == [0, 1]

    def test_a_skipped_layer_is_named(self) -> None:
        told = mxfp4_fx.explain(stack(), X, options={"skip": "layers.1"})
        assert [r.layer for r in told.rewrites] == ["layers.0.experts", "layers.2.experts"]
        assert [(m.layer, m.skipped) for m in told.misses] == [("layers.1.experts", True)]

    def test_a_skipped_layer_whose_module_is_not_known(self) -> None:
        """The backend is called with no call around it: the names in the graph decide."""
        told = report(stack(), skip="layers.1")
        assert [r.layer for r in told.rewrites] == ["layers.0.experts", "layers.2.experts"]
        assert [m.layer for m in told.misses] == ["layers.1.experts"]

    def test_a_near_miss(self) -> None:
        told = mxfp4_fx.explain(with_a_near_miss(), X)
        assert [r.layer for r in told.rewrites] == ["layers.0.experts", "layers.2.experts"]
        (miss,) = told.misses
        assert miss.layer == "layers.1.experts"
        assert "found tanh(..)" in miss.reason

    def test_strict_raises_for_a_near_miss(self) -> None:
        near = with_gate({"torch.sigmoid": "torch.tanh"})
        with pytest.raises(Exception, match=r"layers\.1\.experts") as caught:
            compile_with(Stack(mlp(), near, near), options={"strict": True})(X)
        assert isinstance(caught.value.inner_exception, MissedRewriteError)

    def test_layers_of_other_constants(self) -> None:
        graphs = Graphs()
        compile_with(with_other_constants(), graphs, options={"strict": True})(X)
        nodes = [n for gm in (graphs.seen[0], *bodies(graphs)) for n in gm.graph.nodes]
        assert sorted(n.kwargs["limit"] for n in nodes if "limit" in n.kwargs) == [1.5, 7.0]


def around(change: Callable[[Stack], Any], before: bool) -> nn.Module:
    """Return a stack with a call of ``change`` in its forward."""

    class Changing(Stack):
        def forward(self, x: Tensor) -> Tensor:
            if before:
                change(self)
            x = super().forward(x)
            if not before:
                change(self)
            return x

    made = stack()
    return Changing(*made.layers)


@pytest.mark.usefixtures("no_gradients")
class TestTheGraphAround:
    @pytest.mark.parametrize("before", [False, True])
    def test_a_weight_that_it_writes_to(self, before: bool) -> None:
        whole = around(lambda self: self.layers[1].experts.down_proj.mul_(2), before)
        told = mxfp4_fx.explain(whole, X)
        assert [r.layer for r in told.rewrites] == ["layers.0.experts", "layers.2.experts"]
        (miss,) = told.misses
        assert miss.layer == "layers.1.experts"
        assert miss.reason == "down may be written to outside of its region, by mul_"

    def test_a_bias_that_it_writes_to(self) -> None:
        """Only where gradients are recorded would the original keep a copy."""
        whole = around(lambda self: self.layers[1].experts.down_proj_bias.mul_(2), False)
        assert len(mxfp4_fx.explain(whole, X).rewrites) == 3
        with torch.enable_grad():
            told = mxfp4_fx.explain(whole, X.clone().requires_grad_())
        assert [m.layer for m in told.misses] == ["layers.1.experts"]

    def test_hidden_states_that_it_reshapes(self) -> None:
        """Dynamo records a value once, as it is at the end of the graph."""
        call = torch.compiler.nested_compile_region(lambda module, *args: module(*args))
        a, b = (layer.experts for layer in stack().layers[:2])
        indices, scores = torch.arange(21).view(7, 3) % 6, torch.ones(7, 3)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x + 1
            y = call(b, call(a, x, indices, scores), indices, scores)
            x.t_().t_()
            return y, x

        told = mxfp4_fx.explain(run, X[0])
        assert len(told.rewrites) == 1
        (miss,) = told.misses
        assert "hidden is reshaped or detached in place, by t_" in miss.reason

    def test_another_region_that_writes_to_a_weight(self) -> None:
        @torch.compiler.nested_compile_region
        def double(weight: Tensor, x: Tensor) -> Tensor:
            weight.mul_(2)
            return x + 1

        layers = stack().layers

        def run(x: Tensor) -> Tensor:
            x = region_step(layers[1], region_step(layers[0], x))
            return double(layers[1].experts.down_proj, x)

        told = mxfp4_fx.explain(run, X)
        assert [r.layer for r in told.rewrites] == ["0.experts"]
        assert "may be written to outside of its region" in told.misses[0].reason

    def test_weights_that_it_computes(self) -> None:
        @torch.compiler.nested_compile_region
        def call(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
            held = {"experts.down_proj": weight}
            return torch.func.functional_call(module, held, (x,))[0]

        module = mlp()

        def run(x: Tensor) -> Tensor:
            for factor in (1.0, 2.0):
                x = call(module, module.experts.down_proj * factor, x)
            return x

        told = mxfp4_fx.explain(run, X)
        assert not told.rewrites
        assert "down is not a parameter or buffer of the model" in told.misses[0].reason


def report(module: nn.Module, **options: Any) -> Any:
    """Return the report on the graph of a module, with no :class:`Call` around it."""
    found = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(run_pipeline(gm, inputs, Options(**options))[1].report)
        return gm.forward

    torch.compile(module, backend=backend)(X)
    return found[0]


@pytest.mark.usefixtures("no_gradients")
def test_a_call_with_other_types_than_captured_is_left_alone() -> None:
    """Dynamo reuses a body for equal types only; the passes do not rely on it."""
    found: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        second = [n for n in gm.graph.nodes if n.name.startswith("invoke_subgraph")][1]
        operand = next(n for n in second.args[2:] if n.op != "placeholder")
        value = operand.meta["example_value"]
        operand.meta["example_value"] = value.to(torch.bfloat16)
        found.append(run_pipeline(gm, inputs, Options())[1].report)
        return gm.forward

    torch.compile(stack(), backend=backend)(X)
    (told,) = found
    assert [r.layer for r in told.rewrites] == ["layers.0.experts", "layers.2.experts"]
    assert "other types or sizes" in told.misses[0].reason


@pytest.mark.usefixtures("no_gradients")
def test_a_region_in_a_region() -> None:
    @torch.compiler.nested_compile_region
    def outer(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
        return region_step(b, region_step(a, x)) * 2

    a, b, c, d = (mlp(seed=at) for at in range(4))

    def run(x: Tensor) -> Tensor:
        return outer(c, d, outer(a, b, x))

    graphs = Graphs()
    actual = compile_with(run, graphs, options={"strict": True})(X)
    assert [rewritten(body) for body in bodies(graphs)].count(1) == 1
    torch.compiler.reset()
    x = compile_with(Stack(a, b, call=step))(X) * 2
    assert torch.equal(actual, compile_with(Stack(c, d, call=step))(x) * 2)


def test_verification_sees_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        compile_with(stack(), options={"verify": True})(X)
        torch.compiler.reset()
        break_kernel(monkeypatch, lambda y: y * 1.25)
        with pytest.raises(VerificationError, match=r"layers\.0\.experts differs"):
            compile_with(stack(), options={"verify": True})(X)


def gradients(run: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    x = X.clone().requires_grad_()
    result = run(x)
    result.square().sum().backward()
    return result.detach(), x.grad


def checkpointed(use_reentrant: bool) -> Callable[..., Tensor]:
    def call(module: nn.Module, x: Tensor) -> Tensor:
        return x + checkpoint(lambda x: module(x)[0], x, use_reentrant=use_reentrant)

    return call


CALLS = {
    "region": region_step,
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("held", [Stack.eval, pack], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)]
)
def test_gradients_are_those_without(
    call: Callable[..., Tensor], held: Callable[..., Any], inner: str
) -> None:
    whole = held(stack(2, call=call))
    actual = gradients(compile_with(whole, inner, options={"strict": True}))
    torch.compiler.reset()
    expected = gradients(compile_with(plain(whole), inner))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_experts_that_require_gradients_are_missed_in_a_checkpoint() -> None:
    whole = stack(2, call=checkpointed(False))
    whole.layers[1].requires_grad_(True)
    told = mxfp4_fx.explain(whole, X)
    assert [r.layer for r in told.rewrites] == ["layers.0.experts"]
    assert "requires a gradient" in told.misses[0].reason


def test_the_branches_of_a_condition_are_not_searched() -> None:
    layers = Layers()

    def run(x: Tensor) -> Tensor:
        a, b = layers.layers
        return torch.cond(x.sum() > 0, lambda x: a(x)[0], lambda x: b(x)[0], (x,))

    with torch.no_grad():
        told = mxfp4_fx.explain(run, X)
    assert not told.rewrites
    assert {"is not searched" in miss.reason for miss in told.misses} == {True}
