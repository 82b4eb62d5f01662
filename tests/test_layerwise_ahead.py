"""Layers that are prepared before they are computed: the bits of layers that are not."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import model, tokens
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, StaticCache
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

import mxfp4_fx
from mxfp4_fx import calls, layerwise_ahead
from mxfp4_fx.core import hardware, torch_private
from mxfp4_fx.layerwise_ahead import Plan, Ready, Token
from mxfp4_fx.ops import target

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.skipif(
        not target.has_native_linears("auto"), reason="no native kernels can be built here"
    ),
]

LAYERS, PROMPT = 4, 5
AHEAD = LAYERS - 1  # of a token; the mask of the second layer is not known before its call
NEW = 14  # prompt and tokens cross the sliding window of 16


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Instead of the one in conftest.py: what is compiled serves all tests."""


@pytest.fixture(scope="module")
def compiled() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "linear_rows", lambda dtype: 4)
        patch.setattr(target, "linears_pay", lambda weights: True)
        small = model(torch.bfloat16, head_dim=32, num_hidden_layers=LAYERS)
        whole = mxfp4_fx.compile(small, options={"strict": True})
        with torch.no_grad():
            decode(whole, 2)
        yield whole


@pytest.fixture
def whole(compiled: Any) -> Iterator[Any]:
    """The compiled model, which a test may change."""
    before = copy.deepcopy(compiled.state_dict())
    plan = first_layer(compiled).shared._plan
    plan.in_vain = 0
    yield compiled
    compiled.load_state_dict(before)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often layers were prepared, and how many were computed so."""
    found = {"prepare": 0, "computed": 0}
    prepare, compute = Token.prepare, Ready.compute_rest

    def counted(self: Token, *args: Any) -> None:
        found["prepare"] += 1
        prepare(self, *args)

    def computed(self: Ready, *args: Any) -> Tensor:
        found["computed"] += 1
        return compute(self, *args)

    monkeypatch.setattr(Token, "prepare", counted)
    monkeypatch.setattr(Ready, "compute_rest", computed)
    return found


def first_layer(whole: Any) -> Any:
    return torch_private.called_through(whole.model.layers[0])


def decode(
    whole: Any, new: int = NEW, cache: Any = None, between: Callable[[int], None] = lambda at: None
) -> Tensor:
    """The logits of a prompt's last token, and of tokens decoded behind it."""
    ids, found = tokens(1, PROMPT), []
    cache = DynamicCache(config=whole.config) if cache is None else cache
    for at in range(new + 1):
        between(at)
        found.append(whole(ids, past_key_values=cache).logits[:, -1])
        ids = tokens(1, 1, seed=at)
    return torch.cat(found)


def unprepared(whole: Any, monkeypatch: pytest.MonkeyPatch, *args: Any) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "is_promising", lambda self: False)
        return decode(whole, *args)


@pytest.mark.parametrize(
    "cache",
    [
        lambda config: DynamicCache(config=config),
        lambda config: DynamicCache(),
        pytest.param(
            lambda config: StaticCache(config, max_cache_len=24), marks=pytest.mark.exhaustive
        ),
    ],
    ids=["sliding", "dynamic", "static"],
)
def test_same_bits(
    cache: Any, whole: Any, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = unprepared(whole, monkeypatch, NEW, cache(whole.config))
    assert counts == {"prepare": 0, "computed": 0}
    decode(whole, 2, cache(whole.config))  # a kind of cache may have graphs of its own
    counts.update(prepare=0, computed=0)
    assert torch.equal(decode(whole, NEW, cache(whole.config)), expected)
    assert counts == {"prepare": NEW, "computed": NEW * AHEAD}


def replace(whole: Any) -> None:
    norm = whole.model.layers[2].input_layernorm
    norm.weight = nn.Parameter(norm.weight * 2)


def write(whole: Any) -> None:
    whole.model.layers[3].mlp.experts.down_proj.mul_(2)


def swap(whole: Any) -> None:
    first, second = (whole.model.layers[at].self_attn for at in (1, 3))
    first.q_proj, second.q_proj = second.q_proj, first.q_proj


def set_data(whole: Any) -> None:
    sinks = whole.model.layers[2].self_attn.sinks
    sinks.data = sinks.data + 1


@pytest.mark.parametrize("change", [replace, write, swap, set_data])
def test_a_change_between_tokens(
    change: Callable[[Any], None], whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy.deepcopy(whole.state_dict())

    def between(at: int) -> None:
        if at == 3:
            change(whole)

    expected = unprepared(whole, monkeypatch, 5, None, between)
    unchanged = unprepared(whole, monkeypatch, 5)
    whole.load_state_dict(before)
    assert torch.equal(decode(whole, 5, None, between), expected)
    assert not torch.equal(unchanged, expected)
    if change is swap:
        swap(whole)


def test_a_layer_that_gets_another_tensor(
    whole: Any, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other values: what was prepared is not computed."""

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        output = nn.Module.__call__(layer, *args, **kwargs)
        return output * 2 if layer is whole.model.layers[2] else output

    monkeypatch.setattr(GptOssDecoderLayer, "__call__", call)
    expected = unprepared(whole, monkeypatch, 3)
    assert torch.equal(decode(whole, 3), expected)
    assert counts == {"prepare": 3, "computed": 3 * 2}


class Turned(DynamicCache):
    """Keys and values in another order in memory."""

    updates = 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.updates += 1
        k, v = super().update(*args, **kwargs)
        return k.mT.contiguous().mT, v.mT.contiguous().mT


def test_a_cache_that_returns_something_else(
    whole: Any, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is updated once, and what is prepared for each token in vain is not prepared for long."""
    expected = unprepared(whole, monkeypatch, 5, Turned(config=whole.config))
    cache = Turned(config=whole.config)
    assert torch.equal(decode(whole, 5, cache), expected)
    assert cache.updates == LAYERS * 6
    assert counts == {"prepare": layerwise_ahead._MOST_IN_VAIN, "computed": 0}


def test_it_is_tried_again_some_time(whole: Any, counts: dict[str, int]) -> None:
    first_layer(whole).shared._plan.in_vain = layerwise_ahead._MOST_IN_VAIN
    decode(whole, layerwise_ahead._RARELY)
    assert 0 < counts["prepare"] <= layerwise_ahead._RARELY
    assert first_layer(whole).shared._plan.in_vain == 0


def test_two_threads(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, found = unprepared(whole, monkeypatch), {}

    def run(at: int) -> None:
        with torch.no_grad():
            found[at] = decode(whole)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[at], expected) for at in range(2))


def test_a_profile_shows_the_ops(whole: Any, counts: dict[str, int]) -> None:
    cache = DynamicCache(config=whole.config)
    whole(tokens(1, PROMPT), past_key_values=cache)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        whole(tokens(1, 1), past_key_values=cache)
    names = [event.name for event in found.events()]
    assert names.count("mxfp4::attention_with_sinks") == LAYERS
    assert any("model.layers.3.mlp.experts" in name for name in names)
    assert counts["computed"] == AHEAD


def test_verified_calls_are_not_prepared(
    whole: Any, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their first results are computed in another way, at once."""
    shared = first_layer(whole).shared
    monkeypatch.setattr(shared, "options", dataclasses.replace(shared.options, verify=True))
    decode(whole, 2)
    assert counts["prepare"] == 0


def test_observed_calls_are_not_prepared(whole: Any, counts: dict[str, int]) -> None:
    """So each graph is observed once."""
    cache = DynamicCache(config=whole.config)
    whole(tokens(1, PROMPT), past_key_values=cache)
    with calls.observed() as found:
        whole(tokens(1, 1), past_key_values=cache)
    assert sum(len(graph.rewrites) for graph in found.graphs) == LAYERS
    assert counts["prepare"] == 0
