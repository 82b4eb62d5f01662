"""Models compiled to the Triton kernels: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from combinations import exhaustive
from implementations import DEVICE
from models import DTYPES, Graphs, compile_with, hidden, mlp
from oracle import assert_as_accurate

import mxfp4_fx
from mxfp4_fx.ops import target

pytest.importorskip("triton")

TRITON = {"kernels": "triton"}


def check_mlp(inner: str, dtype: torch.dtype, length: int) -> None:
    module, x = mlp(dtype).to(DEVICE), hidden(length, dtype=dtype).to(DEVICE)
    compiled = compile_with(module, inner, options=TRITON)(x)
    exact = mlp(torch.float64, "batched_mm")(x.cpu().double())
    for actual, reference, truth in zip(compiled, module(x), exact, strict=True):
        assert_as_accurate(actual.cpu(), reference.cpu(), truth)


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        *((torch.float32, 9), (torch.bfloat16, 1), (torch.float16, 9)),
        *(exhaustive(*case) for case in zip(DTYPES, (1, 9, 1), strict=True)),
    ],
)
def test_an_mlp(dtype: torch.dtype, length: int) -> None:
    check_mlp("eager", dtype, length)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("no_gradients")
def test_an_mlp_through_inductor() -> None:
    check_mlp("inductor", torch.float32, 9)


@pytest.mark.usefixtures("no_gradients")
def test_kernels_and_layout_are_in_the_graph() -> None:
    graphs = Graphs()
    compile_with(mlp().to(DEVICE), graphs, options=TRITON)(hidden().to(DEVICE))
    (gm,) = graphs.seen
    layout = target.choose(torch.device(DEVICE), "triton").layout
    ours = [n.kwargs for n in gm.graph.nodes if "kernels" in n.kwargs]
    found = {(kwargs["kernels"], kwargs.get("layout")) for kwargs in ours}
    assert found == {("triton", None), ("triton", layout)}


@pytest.mark.usefixtures("no_gradients")
def test_explain_says_layout_and_reason() -> None:
    told = mxfp4_fx.explain(mlp().to(DEVICE), hidden().to(DEVICE), options=TRITON)
    (rewrite,) = told.rewrites
    chosen = target.choose(torch.device(DEVICE), "triton")
    assert (rewrite.kernels, rewrite.layout) == ("triton", chosen.layout)
    assert rewrite.reason == chosen.reason


def test_gradients_of_activations() -> None:
    """LoRA on the rest of a model: experts are frozen, and pass gradients on."""
    module = mlp().requires_grad_(False).to(DEVICE)
    x = hidden().to(DEVICE).requires_grad_()
    compile_with(module, options=TRITON)(x)[0].sum().backward()
    eager, wide = hidden().requires_grad_(), hidden(dtype=torch.float64).requires_grad_()
    mlp().requires_grad_(False)(eager)[0].sum().backward()
    mlp(torch.float64, "batched_mm").requires_grad_(False)(wide)[0].sum().backward()
    assert x.grad is not None
    assert eager.grad is not None
    assert wide.grad is not None
    assert_as_accurate(x.grad.cpu(), eager.grad, wide.grad)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("no_gradients")
def test_weights_that_change_are_swizzled_again() -> None:
    module, x = mlp().to(DEVICE), hidden().to(DEVICE)
    compiled = compile_with(module, options=TRITON)
    before = compiled(x)[0]
    module.load_state_dict(mlp(seed=1).state_dict())
    after = compiled(x)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, compile_with(mlp(seed=1).to(DEVICE), options=TRITON)(x)[0])
