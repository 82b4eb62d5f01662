"""``torch.utils.flop_counter`` counts this package's ops as it counts the same model dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import compile_with, hidden, mlp, model, pack, tokens
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from mxfp4_fx.core import hardware
from mxfp4_fx.core.formats import quantize
from mxfp4_fx.ops.adapters import LowRank

T, A, E, H, WIDTH = 7, 3, 6, 64, 96  # of ``models.mlp`` and ``models.hidden``
MLP = 2 * T * A * (H * 2 * WIDTH + WIDTH * H)
ROUTER = 2 * T * H * E


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class Counting:
    """An inner compiler whose graphs count what they do when they run."""

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.ops = {str(node.target) for node in gm.graph.nodes}

        def run(*args: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = gm.forward(*args)
            self.flops = counter.get_total_flops()
            return result

        return run


@torch.no_grad()
def test_a_compiled_model_counts_what_the_dense_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """``batched_mm`` multiplies the rows that there are, and torch counts all of its matmuls."""
    monkeypatch.setattr(hardware, "LINEAR_BYTES", dict.fromkeys(hardware.LINEAR_BYTES, 0))
    monkeypatch.setattr(hardware, "linear_rows", lambda dtype: 64)
    whole, inner = model(form="batched_mm", num_hidden_layers=1), Counting()
    compile_with(whole, inner, options={"regions": False})(tokens())
    assert {f"mxfp4.{name}.default" for name in ("matmul_ogs", "linears")} <= inner.ops
    assert "mxfp4.attention_with_sinks.default" in inner.ops
    assert inner.flops == counted(lambda: whole(tokens())) > 0


def test_packed_experts_and_their_gradients() -> None:
    """A backward computes the experts' forward again, and the router's weight has a gradient."""
    packed, x = pack(mlp()), hidden(T)
    assert counted(lambda: packed(x)) == MLP + ROUTER
    x.requires_grad_()
    assert counted(lambda: packed(x)[0].sum().backward()) == 3 * (MLP + ROUTER)


def test_adapters_beside_packed_experts() -> None:
    experts, x, rank = pack(mlp()).experts, hidden(T)[0], 4
    sizes = {"gate_up_proj": (H, 2 * WIDTH), "down_proj": (WIDTH, H)}
    adapters = {
        name: [LowRank(torch.randn(E, rank, k), torch.randn(E, n, rank), 1.0)]
        for name, (k, n) in sizes.items()
    }
    low_rank = 2 * T * A * rank * sum(k + n for k, n in sizes.values())
    routes = torch.randint(0, E, (T, A)), torch.rand(T, A)
    with torch.no_grad():
        assert counted(lambda: experts(x, *routes, adapters)) == MLP + low_rank
    for (one,) in adapters.values():
        one.a.requires_grad_()
        one.b.requires_grad_()
    x.requires_grad_()
    every = counted(lambda: experts(x, *routes, adapters).sum().backward())
    assert every == 3 * (MLP + low_rank)


@pytest.mark.parametrize(("first", "here"), [(0, 4), (2, 2), (5, 1)])
def test_rows_of_experts_elsewhere_do_not_count(first: int, here: int) -> None:
    """Of experts 0 to 5, two tokens choose 0, 1, 2 and 1, 3, 5; some experts are held here."""
    indices = torch.tensor([[0, 1, 2], [1, 3, 5]])
    logits = torch.full((2, E), -1.0).scatter(1, indices, 1.0)
    held = min(3, E - first)
    x = torch.randn(2, H)
    parts = [
        torch.randn(held, *shape) for shape in ((H, 2 * WIDTH), (2 * WIDTH,), (WIDTH, H), (H,))
    ]
    swiglu, mine = (1.702, 7.0), {"first_expert": first}
    one_row = MLP // (T * A)
    ops = torch.ops.mxfp4
    assert counted(lambda: ops.moe(x, logits, *parts, 3, *swiglu, **mine)) == here * one_row
    weights = torch.ones(2, 3)
    routed = counted(lambda: ops.moe.routes(x, indices, weights, *parts, *swiglu, **mine))
    assert routed == here * one_row
    unbiased = parts[0], None, parts[2], None
    routed = counted(lambda: ops.moe.routes(x, indices, weights, *unbiased, *swiglu, **mine))
    assert routed == here * one_row
    *_, offsets = ops.routing.routes(indices, weights, held, first)
    blocks, scales = quantize(parts[2].transpose(1, 2))
    rows = torch.randn(6, WIDTH)
    assert counted(lambda: ops.matmul_ogs(rows, blocks, scales, None, H, offsets)) == (
        here * 2 * H * WIDTH
    )


def test_without_values_all_rows_count() -> None:
    packed = pack(mlp()).to("meta")
    with torch.no_grad():
        assert counted(lambda: packed(hidden(T).to("meta"))) == MLP + ROUTER
