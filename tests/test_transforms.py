"""Packed experts, uncompiled, under what transforms, recomputes or watches functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import compile_with, hidden, mlp, pack
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from mxfp4_fx.core.errors import GradientError

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap's

EXPERTS = pack(mlp()).experts
X, INDICES, WEIGHTS = hidden()[0], torch.arange(21).view(7, 3) % 6, torch.rand(7, 3)


def loss(x: Tensor, weights: Tensor = WEIGHTS) -> Tensor:
    result: Tensor = EXPERTS(x, INDICES, weights).square().sum()
    return result


def gradients(x: Tensor = X, weights: Tensor = WEIGHTS) -> tuple[Tensor, ...]:
    leaves = [value.clone().requires_grad_() for value in (x, weights)]
    return torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("argnum", [0, 1])
def test_grad(argnum: int) -> None:
    assert torch.equal(torch.func.grad(loss, argnum)(X, WEIGHTS), gradients()[argnum])


def test_grad_of_logits() -> None:
    def scores(logits: Tensor) -> Tensor:
        result: Tensor = torch.ops.mxfp4.routing(logits, 2)[0].square().sum()
        return result

    logits = torch.randn(5, 6).requires_grad_()
    (expected,) = torch.autograd.grad(scores(logits), logits)
    assert torch.equal(torch.func.grad(scores)(logits.detach()), expected)


def test_reverse_mode_jacobian_and_vjp() -> None:
    leaf = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(EXPERTS(leaf, INDICES, WEIGHTS).sum(), leaf)

    def summed(x: Tensor) -> Tensor:
        return EXPERTS(x, INDICES, WEIGHTS).sum()

    assert torch.equal(torch.func.jacrev(summed)(X), expected)
    _, pull = torch.func.vjp(summed, X)
    assert torch.equal(pull(torch.ones(()))[0], expected)


def test_gradients_per_token() -> None:
    def one(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return EXPERTS(x[None], indices[None], weights[None]).square().sum()

    found = torch.func.vmap(torch.func.grad(one))(X, INDICES, WEIGHTS)
    for at in range(7):
        leaf = X[at].clone().requires_grad_()
        (expected,) = torch.autograd.grad(one(leaf, INDICES[at], WEIGHTS[at]), leaf)
        assert torch.equal(found[at], expected)


@pytest.mark.parametrize(
    "transform",
    [lambda: torch.func.jacfwd(loss)(X), lambda: torch.func.jvp(loss, (X,), (X,))],
    ids=["jacfwd", "jvp"],
)
def test_forward_mode_is_an_error(transform: Any) -> None:
    """It would give zeros."""
    with pytest.raises(GradientError, match=r"no forward-mode derivative.*use torch.func.vjp"):
        transform()


@pytest.mark.parametrize("grad", [False, True])
def test_dual_tensors_are_an_error(grad: bool) -> None:
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        dual = forward_ad.make_dual(X.clone().requires_grad_(grad), X)
        with pytest.raises(GradientError, match="no forward-mode derivative"):
            loss(dual)
        assert torch.equal(loss(X), loss(X.clone()))  # no tangent, no error


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    leaves = [value.clone().requires_grad_() for value in (X, WEIGHTS)]
    checkpoint(loss, *leaves, use_reentrant=use_reentrant).backward()
    for leaf, expected in zip(leaves, gradients(), strict=True):
        assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("make", [mlp, lambda: pack(mlp())])
def test_a_compiled_layer_inside_a_checkpoint(make: Any) -> None:
    """What is saved while compiling is not what is counted in the run."""
    module = make().requires_grad_(False)
    module.router.requires_grad_()
    compiled = compile_with(module)
    results = []
    for run in (compiled, lambda x: checkpoint(compiled, x, use_reentrant=False)):
        torch.compiler.reset()
        module.zero_grad()
        run(hidden().requires_grad_())[0].square().sum().backward()
        results.append([p.grad for p in module.router.parameters()])
    assert all(map(torch.equal, *results))


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = pack(mlp())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)[0]


def test_dynamo_stays_out_of_the_ops() -> None:
    """Under this stance the first call is eager, and Dynamo looks at every function that runs."""
    with torch.no_grad():
        module = First()
        with torch.compiler.set_stance("eager_then_compile"):
            run = torch.compile(module, backend="eager")
            for length in (7, 8, 9):
                assert torch.equal(run(hidden(length)), module(hidden(length)))
