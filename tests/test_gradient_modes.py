"""Experts a part of which runs under ``no_grad`` and the like: gradients have eager's bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Graphs, compile_with, hidden, mlp
from near_miss import assert_same_bits, edited, mxfp4_ops, swap_methods, with_experts
from oracle import assert_as_accurate
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter

import mxfp4_fx
from mxfp4_fx.core.errors import MissedRewriteWarning

X = hidden()


def in_mode(mode: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with mode():
            return function(*args)

    return run


def with_router_in(mode: Callable[[], Any]) -> nn.Module:
    module = mlp(form="batched_mm")
    swap_methods(module.router, forward=in_mode(mode, GptOssTopKRouter.forward))
    return module


def with_choice_in(mode: Callable[[], Any]) -> nn.Module:
    """From the router's logits on."""
    module = mlp(form="batched_mm")
    lines = {
        "    router_top": f"    with torch.{mode.__name__}():\n        router_top",
        "    router_scores = ": "        router_scores = ",
    }
    swap_methods(module.router, forward=edited(GptOssTopKRouter.forward, lines))
    return module


def with_gate_in(mode: Callable[[], Any]) -> nn.Module:
    module = mlp(form="batched_mm")
    gate = in_mode(mode, GptOssExperts._apply_gate)
    swap_methods(module.experts, _apply_gate=gate)
    return module


def frozen(module: nn.Module) -> nn.Module:
    module.experts.requires_grad_(False)
    return module


def gradients(module: nn.Module, run: Callable[..., Any], x: Tensor = X) -> dict[str, Tensor]:
    """Of the input and of every parameter that has one."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    run(x).square().sum().backward()
    found = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    return {name: grad for name, grad in found.items() if grad is not None}


class First(nn.Module):
    def __init__(self, module: nn.Module, around: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.mlp, self.around = module, around

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return self.mlp(x)[0] if self.around is None else self.around(self.mlp, x)


def check_as_eager(module: nn.Module) -> Graphs:
    """Gradients have eager's bits, and are missing where eager has none."""
    eager, graphs = copy.deepcopy(module), Graphs()
    actual = gradients(module, compile_with(module, graphs))
    expected = gradients(eager, eager)
    assert actual.keys() == expected.keys()
    assert_same_bits(actual, expected)
    return graphs


@pytest.mark.parametrize("part", [with_choice_in, with_gate_in])
def test_a_part_without_gradients_is_refused(part: Callable[..., nn.Module]) -> None:
    module = First(frozen(part(torch.no_grad)))
    with pytest.warns(MissedRewriteWarning, match="recorded for one part of it and not for anoth"):
        graphs = check_as_eager(module)
    assert not mxfp4_ops(graphs)


def test_a_router_without_gradients_before_its_logits_is_refused() -> None:
    with pytest.warns(MissedRewriteWarning, match="recorded for one part of it"):
        check_as_eager(First(frozen(with_router_in(torch.no_grad))))


def test_a_part_in_inference_mode_is_refused() -> None:
    """Eager raises then, and so it must do here."""
    module = First(frozen(with_choice_in(torch.inference_mode)))
    with (
        pytest.warns(MissedRewriteWarning, match="recorded for one part of it"),
        pytest.raises(RuntimeError, match="Inference tensors cannot be saved"),
    ):
        compile_with(module)(X.clone().requires_grad_())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_parts_in_other_modes_do_no_harm_where_nothing_has_a_gradient(mode: Any) -> None:
    module, graphs = with_gate_in(mode).requires_grad_(False), Graphs()
    compile_with(module, graphs)(X)
    assert mxfp4_ops(graphs)


def in_no_grad(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = module(x)[0]
    return x * y


def between_switches(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.amax()
    return module(x)[0] * scale


@pytest.mark.parametrize("around", [in_no_grad, between_switches])
def test_experts_in_one_mode_are_rewritten(around: Callable[..., Tensor]) -> None:
    graphs = Graphs()
    module = First(frozen(mlp(form="batched_mm")), around)
    actual = gradients(module, compile_with(module, graphs))
    assert mxfp4_ops(graphs)
    has_router_gradient = around is between_switches
    assert ("mlp.router.weight" in actual) == has_router_gradient


def test_scores_cut_off_by_a_view_without_gradients() -> None:
    """A view to the shape that a value has is nothing, but for the mode that it is made in."""

    def forward(self: Any, x: Tensor) -> Any:
        logits, scores, indices = GptOssTopKRouter.forward(self, x)
        with torch.no_grad():
            scores = scores.view(7, 3)
        return logits, scores, indices

    module = mlp(form="batched_mm")
    swap_methods(module.router, forward=forward)
    module = First(frozen(module))
    exact, graphs = copy.deepcopy(module).double(), Graphs()
    actual = gradients(module, compile_with(module, graphs))
    assert mxfp4_ops(graphs)  # the view stays in the graph, as the router does
    own, ideal = gradients(module, module), gradients(exact, exact, X.double())
    assert actual.keys() == own.keys() == {"x"}
    assert_as_accurate(actual["x"], own["x"], ideal["x"])


def test_hidden_states_written_after_the_experts_read_them() -> None:
    """Their values are needed again for gradients; eager keeps copies."""
    routes = torch.arange(21).view(7, 3) % 6, torch.rand(7, 3)

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        y = x[0] * 1
        return y.sub_(module.experts(y, *routes))

    with pytest.warns(MissedRewriteWarning, match="hidden is written to in the graph, by sub_"):
        check_as_eager(First(frozen(mlp(form="batched_mm")), forward))


def test_a_step_of_the_experts_detached_in_place_is_refused() -> None:
    module = with_experts({"proj_out = self._apply_gate(proj_out)": (
        "proj_out = self._apply_gate(proj_out).detach_()")}, "batched_mm")  # fmt: skip
    with pytest.warns(MissedRewriteWarning):
        check_as_eager(First(frozen(module)))


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_bias"])
def test_a_bias_written_after_the_experts_read_it(name: str) -> None:
    """Inductor's graph would compute gradients from what it is then, without a word."""

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)[0]
        getattr(module.experts, name).mul_(0.5)
        return y

    reason = f"{name.replace('_proj', '')} is written to in the graph, by mul_"
    with pytest.warns(MissedRewriteWarning, match=reason):
        check_as_eager(First(frozen(mlp(form="batched_mm")), forward))


def test_a_bias_made_in_inference_mode() -> None:
    module = First(frozen(mlp(form="batched_mm")))
    experts = module.mlp.experts
    with torch.inference_mode():
        bias = experts.down_proj_bias.clone()
    experts.down_proj_bias = nn.Parameter(bias, requires_grad=False)
    assert experts.down_proj_bias.is_inference()
    with pytest.warns(MissedRewriteWarning, match=r"down_bias was made under torch.inference_mode"):
        check_as_eager(module)
    with torch.no_grad():
        assert mxfp4_fx.explain(module, X).rewrites
