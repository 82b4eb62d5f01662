"""GPT-OSS's experts to the letter, and yet no rewrite: because of memory, types, sizes, gradients.

Results and effects are those of eager, bit for bit; see ``near_miss.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Graphs, compile_with, config, hidden, mlp
from near_miss import (
    NearMisses,
    assert_same_bits,
    edited,
    missed,
    mxfp4_ops,
    reasons,
    swap_methods,
    with_experts,
    with_gate,
    with_router,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

import mxfp4_fx
from mxfp4_fx.core.errors import MissedRewriteWarning, NoExpertsWarning

X = hidden()

pytestmark = pytest.mark.usefixtures("no_gradients")


class Around(nn.Module):
    """An MLP with a function of its experts before it and one after it."""

    def __init__(
        self, module: GptOssMLP, before: Any = lambda _: None, after: Any = lambda _: None
    ) -> None:
        super().__init__()
        self.mlp, self.before, self.after = module, before, after

    def forward(self, x: Tensor) -> Tensor:
        self.before(self.mlp.experts)
        y = self.mlp(x)[0]
        self.after(self.mlp.experts)
        return y


def with_router_that_calls(chosen: Any = lambda _: None, scores: Any = lambda _: None) -> GptOssMLP:
    """An MLP whose router hands its chosen logits and its scores to these functions."""
    module = with_router(
        {
            "router_scores = ": "self.chosen(router_top_value); router_scores = ",
            "return router": "self.scores(router_scores); return router",
        }
    )
    module.router.chosen, module.router.scores = chosen, scores
    return module


def with_experts_that_call(touch: Any, form: str = "grouped_mm") -> GptOssMLP:
    """An MLP whose experts hand (themselves, hidden states) to ``touch`` half way."""
    gate = "proj_out = self._apply_gate(proj_out)"
    module = with_experts({gate: f"{gate}; self.touch(self, hidden_states)"}, form)
    module.experts.touch = touch
    return module


def double(x: Tensor) -> None:
    x *= 2


@torch.compiler.allow_in_graph
def halve(x: Tensor) -> Tensor:
    """Dynamo puts the function into the graph as it is: what it does inside cannot be read."""
    x.div_(2)
    return x.sum()


def halve_and_leave(x: Tensor) -> None:
    """What the last call says of the view is not true of the one before."""
    view = x.view(-1)
    view.div_(2)
    view.set_(torch.zeros(3))


# Ways to write to a tensor; Dynamo hands out each as another kind of node.
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "method with a functional form": lambda x: x.mul_(0.5),
    "method without one": lambda x: x.div_(2),
    "augmented assignment": double,
    "dunder method": lambda x: x.__imul__(2),
    "item": lambda x: x.__setitem__(0, 0.0),
    "view": lambda x: x.view(-1).div_(2),
    "slice": lambda x: x[0].zero_(),
    "view that gets other memory": halve_and_leave,
    "detach": lambda x: x.detach().div_(2),
    "data": lambda x: x.data.div_(2),
    "out": lambda x: torch.neg(x, out=x),
    "one of two outs": lambda x: torch.sort(x, out=(x, torch.empty_like(x, dtype=torch.long))),
    "underscore function": lambda x: torch.sigmoid_(x),
    "inplace by name": lambda x: F.hardtanh(x, -0.01, 0.01, inplace=True),
    "inplace by position": lambda x: F.hardtanh(x, -0.01, 0.01, True),
    "module in place": nn.Hardtanh(-0.01, 0.01, inplace=True),
    "list of tensors": lambda x: torch._foreach_mul_([x], 0.5),
    "aten overload": lambda x: torch.ops.aten.mul_.Tensor(x, x),
    "aten packet": lambda x: torch.ops.aten.mul_(x, x),
    "initializer": lambda x: nn.init.constant_(x, 0.25),
    "function that is not traced": halve,
}


# One for each way in which the passes learn of a write.
FEW = {
    *("method with a functional form", "view", "view that gets other memory", "item"),
    *("inplace by name", "function that is not traced"),
}


def each_way(few: Collection[str]) -> pytest.MarkDecorator:
    """With every way to write; those that are not among the ``few`` are exhaustive."""
    cases = [
        pytest.param(write, id=way, marks=[] if way in few else pytest.mark.exhaustive)
        for way, write in WRITES.items()
    ]
    return pytest.mark.parametrize("write", cases)


class TestEveryWayToWrite:
    """What MXFP4 is made from, and what is read anew at the region's end, must stay as it was."""

    @each_way(WRITES)
    def test_to_a_weight(self, write: Any) -> None:
        missed(Around(mlp(), before=lambda experts: write(experts.down_proj)), X)

    @each_way(FEW)
    def test_to_the_hidden_states(self, write: Any) -> None:
        missed(with_experts_that_call(lambda experts, x: write(x)), X)

    @each_way(FEW)
    def test_to_the_scores(self, write: Any) -> None:
        missed(with_router_that_calls(scores=write), X)

    @each_way(FEW)
    def test_to_the_chosen_logits(self, write: Any) -> None:
        """Read by the softmax; the routing that takes its place reads the logits they are from."""
        missed(with_router_that_calls(chosen=write), X)


class TestWrites(NearMisses):
    def test_to_a_weight_before(self) -> None:
        module = Around(mlp(), before=lambda experts: experts.gate_up_proj.view(-1).mul_(0.5))
        self.assert_missed(
            module,
            """\
mlp.experts: gate_up is written to in the graph, by mul_
""",
        )

    def test_to_a_weight_after(self) -> None:
        module = Around(mlp(), after=lambda experts: experts.gate_up_proj.mul_(0.5))
        self.assert_missed(
            module,
            """\
mlp.experts: gate_up is written to in the graph, by mul_
""",
        )

    def test_to_a_bias_in_between(self) -> None:
        self.assert_missed(
            with_experts_that_call(lambda experts, _: experts.gate_up_proj_bias.mul_(0.5)),
            """\
experts: gate_up_bias is written to in the graph, by mul_
""",
        )

    def test_to_the_hidden_states_in_between(self) -> None:
        module = with_experts_that_call(lambda _, hidden: hidden.mul_(0.5), "batched_mm")
        self.assert_missed(
            module,
            """\
experts: hidden is written to in the graph, by mul_
""",
        )

    def test_to_the_chosen_logits(self) -> None:
        self.assert_missed(
            with_router_that_calls(chosen=lambda x: x.div_(2)),
            """\
experts: topk is written to in the graph, by div_
""",
        )

    def test_to_the_scores(self) -> None:
        self.assert_missed(
            with_router_that_calls(scores=lambda x: x.div_(2)),
            """\
experts: scores is written to in the graph, by div_
""",
        )


class TestShapes(NearMisses):
    def test_scores_that_are_transposed_in_place(self) -> None:
        self.assert_missed(
            with_router_that_calls(scores=lambda x: x.t_().t_()),
            """\
experts: scores is reshaped or detached in place, by t__1
""",
        )


def other_view(weight: Tensor) -> Tensor:
    return weight.detach().view(-1)


def through_numpy(weight: Tensor) -> Tensor:
    return torch.from_numpy(weight.detach().numpy())


@pytest.mark.parametrize("share", [other_view, through_numpy])
def test_a_write_through_another_parameter_of_the_same_memory(share: Any) -> None:
    def make() -> nn.Module:
        module = Around(mlp(), before=lambda _: module.alias.mul_(0.5))
        module.alias = nn.Parameter(share(module.mlp.experts.down_proj))
        return module

    eager, compiled, graphs = make(), make(), Graphs()
    run = compile_with(compiled, graphs)
    with pytest.warns(MissedRewriteWarning, match="down is written to in the graph"):
        results = run(X), run(X)
    assert_same_bits(results, (eager(X), eager(X)))
    assert not mxfp4_ops(graphs)


class TestUses(NearMisses):
    def test_the_projection_is_kept(self) -> None:
        self.assert_missed(
            with_gate({"glu =": "self.kept = gate_up; glu ="}),
            """\
experts: the intermediate add_ is used elsewhere, by output
""",
        )

    def test_the_activation_is_kept(self) -> None:
        self.assert_missed(
            with_gate({"return": "self.kept = gated_output; return"}),
            """\
experts: the intermediate gated_output is used elsewhere, by output
""",
        )

    def test_the_order_is_kept(self) -> None:
        module = with_experts({"# Restore": "self.kept = perm  # Restore"})
        self.assert_missed(
            module,
            """\
experts: the intermediate perm is used elsewhere, by output
""",
        )


class TestSizes(NearMisses):
    def test_hidden_size(self) -> None:
        self.assert_missed(
            odd_mlp(hidden_size=48),
            """\
experts: the hidden size 48 is not a multiple of 32, MXFP4's block
""",
            hidden(size=48),
        )

    def test_intermediate_size(self) -> None:
        self.assert_missed(
            odd_mlp(intermediate_size=80),
            """\
experts: the intermediate size 80 is not a multiple of 32, MXFP4's block
""",
        )


def odd_mlp(**sizes: int) -> GptOssMLP:
    """An MLP of sizes that MXFP4 cannot hold."""
    module = GptOssMLP(config(**sizes))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


class TestNumbers(NearMisses):
    def test_a_limit_that_is_computed_from_data(self) -> None:
        module = with_gate(
            {"gate.clamp(min=None, max=self.limit)": "gate.clamp(max=self.top.item())"}
        )
        module.experts.register_buffer("top", torch.tensor(7.0))
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            self.assert_missed(
                module,
                """\
experts: not the grouped_mm form: expected clamp(getitem(..), min=None, max=limit), with
limit but found a number computed from data (.item()): make it a Python number
""",
            )


class TestTypes(NearMisses):
    def test_float64(self) -> None:
        module = mlp(torch.float64, form="batched_mm")  # transformers' grouped_mm has no float64
        self.assert_missed(
            module,
            """\
experts: activations are torch.float64; supported are float32, bfloat16, float16
""",
            X.double(),
        )

    def test_scores_of_float64(self) -> None:
        inputs = X[0], torch.arange(21).view(7, 3) % 6, torch.rand(7, 3, dtype=torch.float64)
        self.assert_missed(
            mlp().experts,
            """\
(top level): scores is torch.float64; supported are float32, bfloat16, float16
""",
            *inputs,
        )

    def test_outputs_that_are_made_integers(self) -> None:
        weighted = "proj_out * sample_weights_g.unsqueeze(-1)"
        self.assert_missed(
            with_experts({weighted: weighted.replace("proj_out", "proj_out.int()")}),
            """\
experts: computed in torch.int32; supported are float32, bfloat16, float16
""",
        )

    def test_a_gate_that_is_rounded_and_an_up_that_is_not(self) -> None:
        gate = "gate, up = gate_up[..., ::2]"
        self.assert_missed(
            with_gate({gate: gate.replace("gate_up[", "gate_up.bfloat16()[")}),
            """\
experts: not the grouped_mm form: cast(add_, dtype=torch.bfloat16) stands where add(alpha=1,
out, other=selected_biases) should be used again
""",
        )

    def test_an_input_that_is_rounded_and_widened_again(self) -> None:
        gather = "hidden_states[perm // num_top_k]"
        self.assert_missed(
            with_experts({gather: f"{gather}.bfloat16().float()"}),
            """\
experts: not the grouped_mm form: expected getitem(hidden, index=floordiv(..)), found
cast(getitem_4, dtype=torch.bfloat16)
""",
        )


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class TestWeights(NearMisses):
    def test_a_weight_that_is_computed(self) -> None:
        module = mlp()
        parametrize.register_parametrization(module.experts, "gate_up_proj", Scaled())
        self.assert_missed(
            module,
            """\
experts: gate_up is not a parameter or buffer of the model: it is what mul makes
""",
        )

    def test_weights_that_are_computed(self) -> None:
        module = mlp()
        parametrize.register_parametrization(module.experts, "gate_up_proj", Scaled())
        parametrize.register_parametrization(module.experts, "down_proj", Scaled())
        self.assert_missed(
            module,
            """\
experts: gate_up is not a parameter or buffer of the model: it is what mul makes
""",
        )

    def test_a_weight_that_is_an_argument(self) -> None:
        module = with_experts({"selected_weights = self.down_proj": "selected_weights = self.w()"})
        weight = module.experts.down_proj.detach().clone()

        def call(x: Tensor, weight: Tensor) -> Tensor:
            module.experts.w = lambda: weight
            return module(x)[0]

        told = mxfp4_fx.explain(call, X, weight)
        assert not told.rewrites
        self.assertExpectedInline(
            told.misses[0].reason, """down is not a parameter or buffer of the model"""
        )

    def test_a_weight_that_is_a_tensor_subclass(self) -> None:
        module = mlp()
        down = module.experts.down_proj.detach()
        module.experts.down_proj = nn.Parameter(TwoTensor(down, down.clone()))
        assert "down is a TwoTensor" in missed(module, X)

    def test_weights_that_are_constants(self) -> None:
        with torch._dynamo.config.patch(prepare_freezing=True):  # as TORCHINDUCTOR_FREEZING=1 does
            self.assert_missed(
                mlp(),
                """\
experts: gate_up is a constant of the graph (TORCHINDUCTOR_FREEZING=1 makes it one): leave
that out, and set options={'inductor': {'freezing': True}} instead
""",
            )

    def test_on_a_device_without_kernels(self) -> None:
        told = mxfp4_fx.explain(mlp().to("meta"), X.to("meta"))
        self.assertExpectedInline(
            reasons(told),
            """\
experts: there are no 'auto' kernels for device 'meta' in this version; kernels='reference'
runs anywhere, slowly
""",
        )


def test_a_grouped_mm_of_another_library() -> None:
    """Its name says grouped_mm, and it computes something else."""
    with torch.library._scoped_library("acme", "DEF") as library:
        library.define("grouped_mm(Tensor input, Tensor weight, Tensor offs) -> Tensor")
        fallback = torch.ops.transformers.grouped_mm_fallback
        library.impl(
            "grouped_mm", lambda *args: fallback(*args).tanh(), "CompositeExplicitAutograd"
        )
        linear = edited(moe._grouped_linear, {}, _grouped_mm=torch.ops.acme.grouped_mm.default)
        forward = edited(moe.grouped_mm_experts_forward, {}, _grouped_linear=linear)
        module, graphs = mlp(), Graphs()
        swap_methods(module.experts, forward=forward)
        run = compile_with(module, graphs)
        with pytest.warns((NoExpertsWarning, MissedRewriteWarning)):
            assert torch.equal(run(X)[0], module(X)[0])
        assert not mxfp4_ops(graphs)


def gradients(module: nn.Module, run: Callable[..., Any], x: Tensor) -> dict[str, Tensor]:
    """Of every parameter that has one, and of the input."""
    x = x.clone().requires_grad_()
    run(x).square().mean().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {**grads, "x": x.grad}


class TestGradients(NearMisses):
    def check(self, module: nn.Module) -> None:
        """Gradients are eager's, and everybody who has one in eager has one."""
        eager = copy.deepcopy(module)
        with torch.enable_grad():
            expected = gradients(eager, eager, X)
            actual = gradients(module, compile_with(module), X)
        assert actual.keys() == expected.keys()
        assert_same_bits(actual, expected)

    def test_of_weights(self) -> None:
        module = Around(mlp())
        with pytest.warns(MissedRewriteWarning, match="gate_up requires a gradient"):
            self.check(module)

    def test_of_biases(self) -> None:
        module = Around(mlp())
        module.mlp.experts.gate_up_proj.requires_grad_(False)
        module.mlp.experts.down_proj.requires_grad_(False)
        with pytest.warns(MissedRewriteWarning, match="gate_up_bias requires a gradient"):
            self.check(module)

    def test_the_reason(self) -> None:
        with torch.enable_grad():
            told = mxfp4_fx.explain(mlp(), X)
        self.assertExpectedInline(
            reasons(told),
            """\
experts: gate_up requires a gradient, which MXFP4 experts do not have: run under
torch.no_grad(), or freeze the experts with requires_grad_(False)
""",
        )

    def test_switched_on_after_compiling(self) -> None:
        module, graphs = Around(mlp()), Graphs()
        run = compile_with(module, graphs)
        run(X)
        assert mxfp4_ops(graphs)
        graphs.seen.clear()
        with torch.enable_grad(), pytest.warns(MissedRewriteWarning, match="requires a gradient"):
            run(X)
        assert not mxfp4_ops(graphs)

    def test_switched_on_inside_the_graph(self) -> None:
        self.check_switched_on(EnablesGradients(break_before=False))

    def test_switched_on_before_a_graph_break(self) -> None:
        self.check_switched_on(EnablesGradients(break_before=True))

    def check_switched_on(self, module: EnablesGradients) -> None:
        eager = copy.deepcopy(module)
        eager(X).backward()
        with pytest.warns(MissedRewriteWarning, match="requires a gradient"):
            compile_with(module)(X).backward()
        for (name, actual), expected in zip(
            module.named_parameters(), eager.parameters(), strict=True
        ):
            if expected.grad is not None:
                assert actual.grad is not None, name
                assert torch.equal(actual.grad, expected.grad), name


class EnablesGradients(nn.Module):
    """Computes a loss with gradients, whatever the caller's mode; biases are frozen."""

    def __init__(self, break_before: bool) -> None:
        super().__init__()
        self.mlp, self.break_before = mlp(), break_before
        self.mlp.experts.gate_up_proj_bias.requires_grad_(False)
        self.mlp.experts.down_proj_bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x * 2
            if self.break_before:
                torch._dynamo.graph_break()
            return self.mlp(x)[0].square().mean()
