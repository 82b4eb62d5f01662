"""``mxfp4_fx.warmup``: later calls of ``generate`` compile nothing, and the model is as it was."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from models import Graphs, model, pack, tokens
from torch import Tensor, nn
from transformers import CompileConfig

import mxfp4_fx
from mxfp4_fx.core.errors import OptionError

ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1}
LENGTHS = 4, 20  # within the sliding window of 16, and past it


def by_layers(graphs: Graphs) -> Any:
    return mxfp4_fx.compile(model(**ONE_LAYER), options={"inner": graphs, "strict": True})


def as_a_whole(graphs: Graphs) -> Any:
    whole = model(**ONE_LAYER)
    whole.compile(backend="mxfp4", dynamic=True, options={"inner": graphs, "strict": True})
    return whole


def generate(whole: Any, prompt: Tensor, new: int, **kwargs: Any) -> Tensor:
    mask = torch.ones_like(prompt)
    if len(prompt) > 1:
        mask[-1, :2] = 0
    settings = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, "do_sample": False}
    return whole.generate(prompt, attention_mask=mask, **settings | kwargs)


@pytest.mark.parametrize(
    ("make", "cache", "batches"),
    [
        (by_layers, "dynamic", (1,)),
        pytest.param(by_layers, "static", (2,), marks=pytest.mark.exhaustive),
        pytest.param(as_a_whole, "dynamic", (1,), marks=pytest.mark.exhaustive),
    ],
)
def test_later_calls_compile_nothing(make: Any, cache: str, batches: tuple[int, ...]) -> None:
    """In other threads, too, as a server has them."""
    graphs = Graphs()
    settings: dict[str, Any] = {"cache_implementation": cache}
    whole = make(graphs)
    mxfp4_fx.warmup(whole, lengths=LENGTHS, batch_sizes=batches, **settings)
    compiled = len(graphs.seen)
    assert compiled

    def serve() -> None:
        for length in LENGTHS:
            for batch in batches:
                generate(whole, tokens(batch, length) + 1, 9, **settings)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert len(graphs.seen) == compiled


def test_the_state_is_as_it_was() -> None:
    whole: Any = mxfp4_fx.compile(pack(model(**ONE_LAYER)), options={"inner": "eager"})
    whole.generation_config.do_sample = True
    whole.config.attention_dropout = 0.5
    for layer in whole.model.layers:
        layer.self_attn.attention_dropout = 0.5
    whole.train()
    before = torch.get_rng_state(), copy.deepcopy(whole.generation_config), {*vars(whole)}
    values = {name: value.clone() for name, value in whole.state_dict().items()}
    mxfp4_fx.warmup(whole, lengths=[3], new_tokens=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (whole.generation_config, {*vars(whole)}) == before[1:]
    assert all(module.training for module in whole.modules())
    assert all(torch.equal(value, values[name]) for name, value in whole.state_dict().items())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"lengths": []}, r"lengths must be positive whole numbers, not \[\]"),
        ({"lengths": 8}, "lengths must be positive whole numbers, not 8"),
        ({"lengths": "8"}, "lengths must be positive whole numbers, not '8'"),
        ({"lengths": [8, 0]}, r"lengths must be .* not \[8, 0\]"),
        ({"lengths": [8], "batch_sizes": [1.5]}, r"batch_sizes must be .* not \[1\.5\]"),
        ({"lengths": [8], "batch_sizes": [True]}, r"batch_sizes must be .* not \[True\]"),
        ({"lengths": [8], "new_tokens": 0}, "new_tokens must be a positive whole number, not 0"),
        ({"lengths": [4, 30]}, "a prompt of 30 tokens and 3 new ones are more than the 32 pos"),
    ],
)
def test_bad_sizes(sizes: dict[str, Any], message: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    whole = model(**ONE_LAYER, max_position_embeddings=32, rope_parameters=rope)
    whole.compile(backend="mxfp4")
    with pytest.raises(OptionError, match=message):
        mxfp4_fx.warmup(whole, **sizes)


def generate_of(whole: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the arguments of a model's calls of ``generate``, which then does nothing."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(whole, "generate", lambda ids, **kw: calls.append({"ids": ids, **kw}))
    return calls


def test_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes first, and in a batch of prompts of several tokens a shorter one, too."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    whole = model(**ONE_LAYER, max_position_embeddings=32, rope_parameters=rope)
    whole.compile(backend="mxfp4")
    calls = generate_of(whole, monkeypatch)
    mxfp4_fx.warmup(whole, lengths=[30, 1, 30], batch_sizes=[5, 1], new_tokens=2, use_cache=False)
    shapes = [tuple(call["ids"].shape) for call in calls]
    assert shapes == [(1, 1), (1, 30), (5, 1), (5, 30), (5, 30)]
    padded = [(~call["attention_mask"].bool()).nonzero().tolist() for call in calls]
    assert padded == [[], [], [], [], [[0, 0]]]
    for call in calls:
        assert call["attention_mask"].shape == call["ids"].shape
        assert call["ids"].max() < whole.config.vocab_size
        assert (call["max_new_tokens"], call["min_new_tokens"]) == (2, 2)
        assert call["use_cache"] is False


def test_settings_come_before_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model(**ONE_LAYER)
    whole.compile(backend="mxfp4")
    calls = generate_of(whole, monkeypatch)
    mxfp4_fx.warmup(whole, lengths=[2], min_new_tokens=1)
    assert [(call["max_new_tokens"], call["min_new_tokens"]) for call in calls] == [(3, 1)]


def layers_compiled(whole: Any) -> None:
    for layer in whole.model.layers:
        layer.compile(backend="mxfp4")


def forward_compiled(whole: Any) -> None:
    whole.forward = torch.compile(whole.forward, backend="mxfp4")


def generation_config(whole: Any) -> None:
    whole.generation_config.compile_config = CompileConfig()


@pytest.mark.parametrize("how", [layers_compiled, forward_compiled, generation_config])
def test_other_ways_to_compile_a_model(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model(**ONE_LAYER)
    how(whole)
    calls = generate_of(whole, monkeypatch)
    mxfp4_fx.warmup(whole, lengths=[2])
    assert len(calls) == 1


def test_a_model_that_generate_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, config = model(**ONE_LAYER), CompileConfig()
    calls = generate_of(whole, monkeypatch)
    mxfp4_fx.warmup(whole, lengths=[2], compile_config=config)
    assert [call["compile_config"] for call in calls] == [config]


def test_models_that_it_cannot_warm_up() -> None:
    whole = model(**ONE_LAYER)
    cases: list[tuple[Any, str]] = [
        (whole, r"this GptOssForCausalLM is not compiled: call mxfp4_fx\.compile"),
        (torch.compile(whole, backend="mxfp4"), "runs uncompiled. Compile the model in place"),
        (whole.model, "a GptOssModel has no generate"),
        (nn.Linear(2, 2), "a Linear has no generate"),
        (print, "a builtin_function_or_method has no generate"),
    ]
    for given, message in cases:
        with pytest.raises(OptionError, match=message):
            mxfp4_fx.warmup(given, lengths=[4])
