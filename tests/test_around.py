"""What stands around rewritten experts keeps its meaning: results, effects, graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from combinations import exhaustive
from models import Graphs, compile_with, hidden, mlp
from near_miss import assert_same_bits, mxfp4_ops, state, with_router
from oracle import assert_as_accurate
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import mxfp4_fx

X = hidden()

pytestmark = pytest.mark.usefixtures("no_gradients")


class Beside(nn.Module):
    """An MLP, and ``other`` of (this module, its input) in the same graph."""

    def __init__(self, other: Callable[[Any, Tensor], Any], **sizes: Any) -> None:
        super().__init__()
        self.mlp, self.other = mlp(**sizes), other
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        y = self.mlp(x)[0]
        return y, self.other(self, x)


def exact_copy(module: Any) -> Any:
    """The same MLP, or experts, in float64; transformers' grouped_mm does not have that."""
    exact = copy.deepcopy(module).double()
    for part in exact.modules():
        if isinstance(part, GptOssExperts):
            part.config._experts_implementation = "batched_mm"
    return exact


def check_beside(other: Callable[[Any, Tensor], Any], x: Tensor = X) -> None:
    """In two calls, the experts are rewritten, and everything else is as in eager, bit for bit."""
    compiled, graphs = Beside(other), Graphs()
    eager, exact = copy.deepcopy(compiled), exact_copy(compiled.mlp)
    run = compile_with(compiled, graphs)
    actual_x, expected_x = x.clone(), x.clone()
    for _ in range(2):
        ideal = exact(actual_x.double())[0]
        (y, rest), (expected_y, expected_rest) = run(actual_x), eager(expected_x)
        assert_as_accurate(y, expected_y, ideal)
        assert_same_bits(rest, expected_rest)
        assert_same_bits([state(compiled), actual_x], [state(eager), expected_x])
    assert mxfp4_ops(graphs).count("mxfp4.matmul_ogs.default") == 2


def add_to_buffer(self: Any, x: Tensor) -> Tensor:
    return self.count.add_(1) * 2


def set_in_buffer(self: Any, x: Tensor) -> Tensor:
    self.count[torch.tensor([1])] = self.count.sum() + 1
    return self.count * 2


def add_to_input(self: Any, x: Tensor) -> Tensor:
    return x.mul_(0.5) + 1


def add_to_view_of_input(self: Any, x: Tensor) -> Tensor:
    return x[0].mul_(0.5) + 1


def add_to_own(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    z = y.add_(1)
    return y, z * y


def add_to_base_of_a_view(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    rows = y[0]
    y.add_(1)
    return rows


def reshaped_in_place(self: Any, x: Tensor) -> Tensor:
    """The view is there because of the shape that y has before it changes."""
    y = x * 2
    summed = y.view(7, 64).sum(0)
    y.squeeze_(0)
    return summed


def transposed_in_place(self: Any, x: Tensor) -> Tensor:
    y = x[0, :, :7] * 2
    z = y.reshape(7, 7) * torch.arange(7)
    y.t_()
    return z


def values_with_a_leading_one(self: Any, x: Tensor) -> Tensor:
    y = x[0] * 2
    y[torch.tensor([1, 2])] = torch.ones(1, 2, 64)
    return y


def value_at_a_scalar_index(self: Any, x: Tensor) -> Tensor:
    y = x[0] * 2
    y[torch.tensor(2)] = torch.ones(1, 64)
    return y


def view_by_keyword(self: Any, x: Tensor) -> Tensor:
    return torch.flatten(input=x[0, 0] * 2) + 1


def returned_view(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    return y, y.view(1, 7, 64)


def bias_halved_afterwards(self: Any, x: Tensor) -> None:
    self.mlp.experts.down_proj_bias.div_(2)


def function_transform(self: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row.cumsum(0) * 2)(x[0])


def checkpointed(self: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda x: torch.nn.functional.linear(x, x[0]).exp(), x, use_reentrant=False)


def weights_returned(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return self.mlp.experts.gate_up_proj, self.mlp.experts.down_proj * 2


def condition(self: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


@pytest.mark.parametrize(
    "other",
    [
        add_to_buffer,
        set_in_buffer,
        add_to_own,
        add_to_base_of_a_view,
        reshaped_in_place,
        transposed_in_place,
        values_with_a_leading_one,
        value_at_a_scalar_index,
        view_by_keyword,
        returned_view,
        function_transform,
        checkpointed,
        weights_returned,
        condition,
    ],
)
def test_beside_experts(other: Callable[[Any, Tensor], Any]) -> None:
    check_beside(other)


def test_a_router_that_keeps_statistics() -> None:
    """Whoever reads the scores or the indices meanwhile still can."""
    statistics = "self.load = router_scores.mean(dim=0), router_indices.amax(dim=0)"
    module, graphs = with_router({"return router": f"{statistics}; return router"}), Graphs()
    eager, exact = copy.deepcopy(module), exact_copy(module)
    actual = compile_with(module, graphs)(X)[0]
    assert_as_accurate(actual, eager(X)[0], exact(X.double())[0])
    assert_same_bits(module.router.load, eager.router.load)
    assert mxfp4_ops(graphs).count("mxfp4.matmul_ogs.default") == 2


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def check_stack(stack: Stack, rewritten: int) -> None:
    graphs = Graphs()
    assert_as_accurate(compile_with(stack, graphs)(X), stack(X), exact_copy(stack)(X.double()))
    assert mxfp4_ops(graphs).count("mxfp4.matmul_ogs.default") == 2 * rewritten


def test_one_module_called_twice() -> None:
    module = mlp()
    check_stack(Stack(module, module), rewritten=2)


def test_two_modules_with_the_same_weights() -> None:
    first, second = mlp(), mlp(seed=1)
    second.experts.gate_up_proj = first.experts.gate_up_proj
    second.experts.down_proj = first.experts.down_proj
    check_stack(Stack(first, second), rewritten=2)


def test_weights_that_are_buffers() -> None:
    module = mlp()
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module.experts, name).detach()
        delattr(module.experts, name)
        module.experts.register_buffer(name, weight)
    check_stack(Stack(module), rewritten=1)


def test_a_bias_written_before_the_experts_read_it() -> None:
    """Biases are inputs of the rewritten region, read where they were read before."""

    class Halving(Stack):
        def forward(self, x: Tensor) -> Tensor:
            self.layers[0].experts.gate_up_proj_bias.div_(2)
            return super().forward(x)

    compiled, graphs = Halving(mlp()), Graphs()
    eager, exact = copy.deepcopy(compiled), exact_copy(compiled)
    run = compile_with(compiled, graphs)
    for _ in range(2):
        assert_as_accurate(run(X), eager(X), exact(X.double()))
    assert mxfp4_ops(graphs).count("mxfp4.matmul_ogs.default") == 2


def test_autocast_around_experts_of_float32_does_not_reach_into_them() -> None:
    """Nothing in their graph is of a lower precision, so nothing in the kernels may be."""
    experts, graphs = mlp().experts, Graphs()
    routes = torch.arange(21).view(7, 3) % 6, torch.rand(7, 3)
    with torch.autocast("cpu", torch.bfloat16):
        actual = compile_with(experts, graphs)(X[0], *routes)
        expected = experts(X[0], *routes)
    exact = exact_copy(experts)(X[0].double(), routes[0], routes[1].double())
    assert_as_accurate(actual, expected, exact)
    assert mxfp4_ops(graphs)


def test_experts_of_bfloat16_under_autocast() -> None:
    stack, x = Stack(mlp(torch.bfloat16)), X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compile_with(stack)(x), stack(x)
    assert_as_accurate(actual, expected, exact_copy(stack)(x.double()))


class Detached(nn.Module):
    """Trainable experts in a part of the graph that records no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.scale = mlp(), nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        with torch.no_grad():
            y = self.mlp(x)[0]
        return (x * y).square().mean()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_experts_without_a_gradient_amid_others_with_one(inner: str) -> None:
    module = Detached()
    eager, exact = copy.deepcopy(module), exact_copy(module)
    with torch.enable_grad():
        assert len(mxfp4_fx.explain(module, X).rewrites) == 1
        torch.compiler.reset()
        compile_with(module, inner)(X).backward()
        eager(X).backward()
        exact(X.double()).backward()
    assert_as_accurate(module.scale.grad, eager.scale.grad, exact.scale.grad)
    assert all(parameter.grad is None for parameter in module.mlp.parameters())


@pytest.mark.parametrize(
    ("form", "dynamic"),
    [
        ("grouped_mm", None),
        ("batched_mm", True),
        exhaustive("grouped_mm", True),
        exhaustive("batched_mm", None),
    ],
)
def test_no_length_is_compiled_that_eager_would_not_compile(form: str, dynamic: Any) -> None:
    """A pass that asks whether two sizes are equal adds a guard. 64 and 96 are sizes of weights."""

    def graphs(**how: Any) -> int:
        torch.compiler.reset()
        counters.clear()
        compiled = torch.compile(mlp(form=form), dynamic=dynamic, **how)
        for length in (7, 5, 64, 96, 192, 6, 3, 2, 1, 4):
            compiled(hidden(length))
        return counters["stats"]["unique_graphs"]

    assert graphs(backend="mxfp4", options={"inner": "eager"}) == graphs(backend="eager")


@pytest.mark.parametrize("other", [add_to_input, add_to_view_of_input])
def test_writes_to_the_input_after_the_experts_have_read_it(other: Any) -> None:
    check_beside(other)


def test_a_weight_whose_minus_is_lazy() -> None:
    """What stands in its memory are the values' opposites."""
    module, plain = mlp(), mlp()
    weight = module.experts.gate_up_proj
    module.experts.gate_up_proj = nn.Parameter(torch._neg_view(-weight.data))
    assert torch.equal(compile_with(module)(X)[0], compile_with(plain)(X)[0])
