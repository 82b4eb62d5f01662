"""torch's profiler: each op of a compiled model shows the weight that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from combinations import exhaustive
from models import hidden, mlp, model, pack, tokens
from torch import nn
from torch.profiler import ProfilerActivity, profile

import mxfp4_fx
from mxfp4_fx.core import profiling

pytestmark = pytest.mark.usefixtures("no_gradients")

OPTIONS: dict[str, Any] = {"strict": True, "attention": False, "linears": False}


OPS = ("matmul_ogs", "matmul_ogs_backward", "linears", "linears_mxfp8", "linears_mxfp8_backward")
SHOWN = {f"mxfp4::{op}" for op in (*OPS, "attention_with_sinks")}


def profiled(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """The names in the order of time, each with the op that it lies in."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    events = sorted(found.events(), key=lambda event: event.time_range.start)
    return [
        (event.name, event.cpu_parent.name)
        for event in events
        if event.cpu_parent is not None
        and event.cpu_parent.name in SHOWN
        and (" of " in event.name or event.name == "lm_head")
    ]


def expected(*layers: str) -> list[tuple[str, str]]:
    return [
        (f"{weight} of {layer}", "mxfp4::matmul_ogs")
        for layer in layers
        for weight in ("gate_up_proj", "down_proj")
    ]


def by_pieces(whole: nn.Module, inner: Any) -> nn.Module:
    return mxfp4_fx.compile(whole, options={"inner": inner, **OPTIONS})


def as_a_whole(whole: nn.Module, inner: Any, **more: Any) -> nn.Module:
    whole.compile(backend="mxfp4", options={"inner": inner, **OPTIONS, **more})
    return whole


def freeing(whole: nn.Module, inner: Any) -> nn.Module:
    return as_a_whole(whole, inner, free_weights=True)


@pytest.mark.parametrize(
    ("compiled", "inner"),
    [
        (by_pieces, "eager"),
        (as_a_whole, "eager"),
        exhaustive(freeing, "eager"),
        exhaustive(as_a_whole, "inductor"),
    ],
)
def test_layers_that_share_code_have_names_of_their_own(compiled: Any, inner: str) -> None:
    whole = compiled(pack(model()), inner)
    whole(tokens(), use_cache=False)  # compiles
    names = expected("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert profiled(lambda: whole(tokens(), use_cache=False)) == names


def test_experts_that_are_called_by_themselves() -> None:
    module = mlp()
    module.compile(backend="mxfp4", options={"inner": "eager", **OPTIONS})
    module(hidden())
    assert profiled(lambda: module(hidden())) == expected("experts")


@pytest.mark.parametrize("inner", ["eager", exhaustive("inductor")])
def test_attention_and_linears_have_the_names_of_their_layers(inner: str) -> None:
    whole = mxfp4_fx.compile(pack(model()), options={"inner": inner, "linears": "mxfp8"})
    ids = tokens(1)[:, :2]
    whole(ids, use_cache=False)  # compiles
    op = "mxfp4::linears_mxfp8"
    found = profiled(lambda: whole(ids, use_cache=False))
    for at in range(2):
        attention = f"model.layers.{at}.self_attn"
        assert (f"attention of {attention}", "mxfp4::attention_with_sinks") in found
        assert (f"q_proj, k_proj, v_proj of {attention}", op) in found
        assert (f"o_proj of {attention}", op) in found
    assert ("lm_head", op) in found


def test_linears_as_the_model_holds_them_have_names() -> None:
    linear = nn.Linear(8, 4)
    with profiling.naming({id(linear.weight): "a.q_proj"}):
        found = profiled(lambda: torch.ops.mxfp4.linears(torch.ones(1, 8), [linear.weight], [None]))
    assert found == [("q_proj of a", "mxfp4::linears")]


def test_gradients_have_the_names_of_their_weights() -> None:
    """Autograd computes them after the call, of which nothing else is left."""
    whole = as_a_whole(pack(model()), "eager", linears="mxfp8", strict=False)
    whole.requires_grad_(False)
    with torch.enable_grad():
        given = whole.get_input_embeddings()(tokens(1)).detach().requires_grad_()
        for _ in range(2):
            backward = profiled(lambda: whole(inputs_embeds=given).logits.sum().backward())
    experts = [name for name, op in backward if op == "mxfp4::matmul_ogs_backward"]
    layers = [f"model.layers.{at}.mlp.experts" for at in (1, 0)]
    assert experts == [f"{w} of {layer}" for layer in layers for w in ("down_proj", "gate_up_proj")]
    linears = [name for name, op in backward if op == "mxfp4::linears_mxfp8_backward"]
    assert linears[0] == "lm_head"
    assert linears[-2:] == [
        "o_proj of model.layers.0.self_attn",
        "q_proj, k_proj, v_proj of model.layers.0.self_attn",
    ]


def test_nothing_is_named_when_no_profiler_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"inner": "eager", "linears": "mxfp8"}
    whole = mxfp4_fx.compile(pack(model(num_hidden_layers=1)), options=options)
    whole(tokens(1), use_cache=False)
    names = ("name", "shown", "shown_linears")
    for name in ("naming", *names):
        monkeypatch.delattr(profiling, name)
    whole(tokens(1), use_cache=False)
    monkeypatch.undo()
    for name in names:
        monkeypatch.delattr(profiling, name)
    with pytest.raises(AttributeError):
        profiled(lambda: whole(tokens(1), use_cache=False))
