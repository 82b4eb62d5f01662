"""What is not rewritten is reported: every layer, once, with its reason, and nothing else is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Graphs, Layers, compile_with, hidden, mlp
from near_miss import NearMisses, missed, mxfp4_ops, with_experts, with_gate
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

import mxfp4_fx
from mxfp4_fx.core.errors import MissedRewriteError, MissedRewriteWarning

X = hidden()

pytestmark = pytest.mark.usefixtures("no_gradients")


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class ScoresOfFloat64(nn.Module):
    def __init__(self, module: GptOssMLP) -> None:
        super().__init__()
        self.mlp = module

    def forward(self, x: Tensor) -> Any:
        _, scores, indices = self.mlp.router(x[0])
        return self.mlp.experts(x[0], indices, scores.double())


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=False)


class Mapped(nn.Module):
    def __init__(self, module: GptOssMLP) -> None:
        super().__init__()
        self.mlp = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda x: self.mlp(x)[0])(x)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2)).softmax(dim=-1) @ x


class Both(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Any:
        return self.a(x)[0], self.b(x)[0]


class CallsLogicalOp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        router, experts = self.inner.router, self.inner.experts
        x = x[0]
        logits = F.linear(x, router.weight, router.bias)
        weights = (
            *(experts.gate_up_proj, experts.gate_up_proj_bias),
            *(experts.down_proj, experts.down_proj_bias),
        )
        return (torch.ops.mxfp4.moe(x, logits, *weights, 3, 1.702, 7.0),)


HANDED_ON: dict[str, Any] = {
    "collective": torch.ops._c10d_functional.wait_tensor,
    "unknown": torch.compiler.allow_in_graph(lambda weight: weight.clone()),
    "contiguous": lambda weight: weight.contiguous(),
    "chunk": lambda weight: weight.chunk(1)[0],
    "detach": lambda weight: weight.detach(),
    "slice": lambda weight: weight[:6],
}


class TestReports(NearMisses):
    def test_weights_that_are_handed_on(self) -> None:
        """By what expert parallelism and sharding put before a matmul, for example."""
        for hand in HANDED_ON.values():
            torch.compiler.reset()
            module = with_experts(
                {"self.gate_up_proj[expert_ids]": "self.hand(self.gate_up_proj)[expert_ids]"},
                "batched_mm",
            )
            module.experts.hand = hand
            (miss,) = mxfp4_fx.explain(module, X).misses
            assert miss.layer == "experts"
            assert miss.reason.startswith(
                "gate_up is not a parameter or buffer of the model: it is"
            )

    def test_the_logical_op_itself(self) -> None:
        """It stays as it is, before and behind experts that are rewritten."""
        module, own = mlp(), CallsLogicalOp()
        for run in (Both(module, own), Both(own, module)):
            torch.compiler.reset()
            told = mxfp4_fx.explain(run, X)
            assert [r.layer[2:] for r in told.rewrites] == ["experts"]
            (miss,) = told.misses
            assert "it calls torch.ops.mxfp4.moe itself" in miss.reason

    def test_a_function_transform(self) -> None:
        assert "mlp.experts: " in missed(Mapped(mlp(form="batched_mm")), torch.stack([X, -X]))

    def test_the_second_of_two_calls(self) -> None:
        """One module, called as it should be and with odd scores: the second call is reported."""
        module = mlp()
        told = mxfp4_fx.explain(Both(module, ScoresOfFloat64(module)), X)
        assert (len(told.rewrites), len(told.misses)) == (1, 1)

    def test_a_layer_of_computed_weights_beside_a_good_one(self) -> None:
        computed = mlp(seed=1)
        parametrize.register_parametrization(computed.experts, "gate_up_proj", Scaled())
        parametrize.register_parametrization(computed.experts, "down_proj", Scaled())
        told = mxfp4_fx.explain(Both(mlp(), computed), X)
        assert (len(told.rewrites), len(told.misses)) == (1, 1)

    def test_what_is_no_experts_inside_a_checkpoint_is_not_reported(self) -> None:
        told = mxfp4_fx.explain(nn.Sequential(Checkpointed(Attention()), mlp()), X)
        assert (len(told.rewrites), len(told.misses)) == (1, 0)


UP_TWICE = {"(up + 1)": "torch.add(up, 1, alpha=2)"}


class TestOptions:
    def test_a_skipped_layer_stays_without_a_warning(self) -> None:
        whole, graphs = Layers(), Graphs()
        run = compile_with(whole, graphs, options={"skip": ["layers.0.*"], "strict": True})
        with warnings.catch_warnings():
            warnings.simplefilter("error", MissedRewriteWarning)
            run(X)
        assert mxfp4_ops(graphs).count("mxfp4.matmul_ogs.default") == 2
        torch.compiler.reset()
        (miss,) = mxfp4_fx.explain(whole, X, options={"skip": ["layers.0.*"]}).misses
        assert miss.layer == "layers.0.experts"
        assert miss.skipped

    def test_with_every_layer_skipped_nothing_changes(self) -> None:
        whole, graphs = Layers(), Graphs()
        run = compile_with(whole, graphs, options={"skip": "*", "strict": True})
        assert torch.equal(run(X), whole(X))
        assert not mxfp4_ops(graphs)

    def test_a_layer_that_could_not_be_rewritten_can_be_skipped(self) -> None:
        module = with_gate(UP_TWICE)
        run = compile_with(module, options={"skip": "experts", "strict": True})
        assert torch.equal(run(X)[0], module(X)[0])

    def test_strict_names_layer_and_reason(self) -> None:
        whole = Layers()
        whole.layers[1] = with_gate(UP_TWICE)
        with pytest.raises(BackendCompilerFailed) as caught:
            compile_with(whole, options={"strict": True})(X)
        error = caught.value.inner_exception
        assert isinstance(error, MissedRewriteError)
        assert "1 MoE layer(s)" in str(error)
        assert "layers.1.experts: not the grouped_mm form" in str(error)
        assert "but found 2" in str(error)

    def test_a_warning_names_layer_and_reason_once(self) -> None:
        run = compile_with(with_gate(UP_TWICE), dynamic=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(hidden(5))
            run(hidden(6))  # compiles again
        (message,) = [str(w.message) for w in caught if w.category is MissedRewriteWarning]
        assert "experts: not the grouped_mm form" in message
        assert "but found 2" in message
