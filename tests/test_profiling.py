"""torch's profiler: each ``matmul_ogs`` of a compiled model shows the weight that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from combinations import exhaustive
from models import hidden, mlp, model, pack, tokens
from torch import nn
from torch.profiler import ProfilerActivity, profile

import mxfp4_fx
from mxfp4_fx.core import profiling

pytestmark = pytest.mark.usefixtures("no_gradients")

OPTIONS: dict[str, Any] = {"strict": True, "attention": False, "linears": False}


def profiled(call: Callable[[], Any]) -> list[tuple[str, str]]:
    """The names in the order of time, each with the op that it lies in."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    events = sorted(found.events(), key=lambda event: event.time_range.start)
    return [
        (event.name, event.cpu_parent.name)
        for event in events
        if "_proj of " in event.name and event.cpu_parent is not None
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


def test_nothing_is_named_when_no_profiler_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = mlp()
    module.compile(backend="mxfp4", options={"inner": "eager", **OPTIONS})
    module(hidden())
    for name in ("naming", "shown"):
        monkeypatch.delattr(profiling, name)
    module(hidden())
    with pytest.raises(AttributeError):
        profiled(lambda: module(hidden()))
