"""``model.generate``: greedy tokens are the uncompiled model's, and few graphs are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Graphs, model, pack, tokens
from torch import fx
from transformers import CompileConfig, GptOssForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

import mxfp4_fx
from mxfp4_fx.passes.regions import region_of

LENGTH = 24  # prompt and new tokens together cross the sliding window of 16
Make = Callable[..., GptOssForCausalLM]
Compile = Callable[[GptOssForCausalLM, Graphs], dict[str, Any]]


# One layer takes half the time to capture. Its attention slides; two layers have either kind.
ONE_LAYER = {"num_hidden_layers": 1}


def packed(**changes: Any) -> GptOssForCausalLM:
    return pack(model(**changes))


def in_place(whole: GptOssForCausalLM, graphs: Graphs) -> dict[str, Any]:
    whole.compile(backend="mxfp4", options={"inner": graphs})
    return {}


def forward(whole: GptOssForCausalLM, graphs: Graphs) -> dict[str, Any]:
    whole.forward = torch.compile(whole.forward, backend="mxfp4", options={"inner": graphs})
    return {}


def compile_config(whole: GptOssForCausalLM, graphs: Any) -> dict[str, Any]:
    config = CompileConfig(backend="mxfp4", mode=None, options={"inner": graphs})
    config._compile_all_devices = True  # transformers leaves CPUs uncompiled otherwise
    return {"compile_config": config, "cache_implementation": "static"}


def generate(whole: GptOssForCausalLM, prompt: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    new = LENGTH - prompt.shape[1]
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return whole.generate(prompt, attention_mask=(prompt > 0).long(), **settings | kwargs)


def mxfp4_calls(graphs: Graphs) -> list[int]:
    """For each graph, its number of grouped matmuls: two a layer. Layers may share a region's."""

    def count(gm: fx.GraphModule) -> int:
        own = sum(str(node.target) == "mxfp4.matmul_ogs.default" for node in gm.graph.nodes)
        regions = (region_of(node) for node in gm.graph.nodes)
        return own + sum(count(region.body) for region in regions if region is not None)

    return [count(gm) for gm in graphs.seen]


@pytest.mark.parametrize(
    ("make", "compile_it", "cache", "layers", "most_graphs"),
    [
        pytest.param(model, in_place, "static", 2, 3, id="model.compile, static cache"),
        pytest.param(model, compile_config, "static", 1, 3, id="compile_config, static cache"),
        pytest.param(
            *(packed, forward, "static", 1, 3),
            id="compiled forward, static cache",
            marks=pytest.mark.exhaustive,
        ),
        *(
            pytest.param(make, compile_it, cache, 2, count, id=name, marks=pytest.mark.exhaustive)
            for make, compile_it, cache, count, name in (
                # prefill, one token with a fixed, then with any length; again past the window
                (model, in_place, "dynamic", 6, "model.compile, dynamic cache"),
                (model, in_place, "sliding_window", 3, "model.compile, sliding cache"),
            )
        ),
    ],
)
def test_greedy_tokens_are_the_uncompiled_ones(
    make: Make, compile_it: Compile, cache: str, layers: int, most_graphs: int
) -> None:
    expected = generate(make(num_hidden_layers=layers), tokens(1) + 1, cache_implementation=cache)
    whole, graphs = make(num_hidden_layers=layers), Graphs()
    kwargs = {"cache_implementation": cache} | compile_it(whole, graphs)
    assert torch.equal(generate(whole, tokens(1) + 1, **kwargs), expected)
    assert set(mxfp4_calls(graphs)) == {2 * layers}
    assert len(graphs.seen) <= most_graphs
    assert mxfp4_fx.refresh(whole) == 2 * layers  # prefill and decode share them


CACHES = pytest.mark.parametrize(
    "cache", ["static", pytest.param("dynamic", marks=pytest.mark.exhaustive)]
)


@CACHES
def test_later_calls_compile_little(cache: str) -> None:
    """More tokens and sampling nothing more, a second prompt of another length two graphs."""
    whole, plain, graphs = packed(**ONE_LAYER), packed(**ONE_LAYER), Graphs()
    kwargs = {"cache_implementation": cache, "max_cache_len": 2 * LENGTH}
    in_place(whole, graphs)
    generate(whole, tokens(1) + 1, **kwargs)
    first = len(graphs.seen)
    more = {"max_new_tokens": 2 * LENGTH - 7, "min_new_tokens": 2 * LENGTH - 7}
    assert generate(whole, tokens(1) + 1, **kwargs, **more).shape[1] == 2 * LENGTH
    sampled = []
    for each in (whole, plain):
        torch.manual_seed(3)
        sampled.append(generate(each, tokens(1) + 1, **kwargs, do_sample=True))
    assert torch.equal(*sampled)
    assert len(graphs.seen) == first > 0
    second = generate(whole, tokens(1, 9) + 1, **kwargs)
    assert torch.equal(second, generate(plain, tokens(1, 9) + 1, **kwargs))
    assert len(graphs.seen) - first <= 2


def test_both_kinds_of_caches_slide() -> None:
    """So that what is above is also about sliding ones."""
    for cache, kind in (
        ("dynamic", DynamicSlidingWindowLayer),
        ("static", StaticSlidingWindowLayer),
    ):
        out = generate(
            packed(), tokens(1) + 1, cache_implementation=cache, return_dict_in_generate=True
        )
        assert isinstance(out.past_key_values.layers[0], kind)


@pytest.mark.exhaustive
def test_freed_weights_serve_prefill_and_decoding() -> None:
    whole, graphs = packed(**ONE_LAYER), Graphs()
    whole.compile(backend="mxfp4", options={"inner": graphs, "free_weights": True})
    prompt, kwargs = tokens(1) + 1, {"cache_implementation": "static"}
    expected = generate(packed(**ONE_LAYER), prompt, **kwargs)
    for _ in range(2):
        assert torch.equal(generate(whole, prompt, **kwargs), expected)
    assert 2 <= len(graphs.seen) <= 4


@pytest.mark.exhaustive
def test_a_padded_batch() -> None:
    prompt = tokens(2) % 127 + 1
    prompt[0, :3] = 0
    whole, graphs = packed(**ONE_LAYER), Graphs()
    in_place(whole, graphs)
    expected = generate(packed(**ONE_LAYER), prompt, cache_implementation="static")
    assert torch.equal(generate(whole, prompt, cache_implementation="static"), expected)
    assert graphs.seen


@pytest.mark.exhaustive  # test_backend.py has an MLP through Inductor
def test_inductor() -> None:
    """Of the decoded tokens; transformers leaves the prompt uncompiled."""
    whole = model(**ONE_LAYER)
    kwargs = compile_config(whole, "inductor")
    expected = generate(whole, tokens(1) + 1, cache_implementation="static")
    assert torch.equal(generate(whole, tokens(1) + 1, **kwargs), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
