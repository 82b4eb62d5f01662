"""The ways to serve a model that ``mxfp4_fx.compile`` compiled: tokens and numbers of graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_packed
from models import Graphs, model, tokens
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig, pipeline

import mxfp4_fx
from mxfp4_fx.errors import WholeModelWarning
from mxfp4_fx.huggingface.decoder_layers import cache_name

ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1}
# A prompt and a decoding, each with one sequence, with the first larger number of them and with
# any; each in two pieces.
MOST_GRAPHS = 2 * 3 * 2

pytestmark = pytest.mark.exhaustive


def compiled(whole: Any, graphs: Any) -> Any:
    return mxfp4_fx.compile(whole, options={"inner": graphs, "strict": True, "attention": False})


def generated(whole: Any, prompt: torch.Tensor, **settings: Any) -> list[list[int]]:
    lengths = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    found: list[list[int]] = whole.generate(
        prompt, attention_mask=mask, **lengths | settings
    ).tolist()
    return found


def beams(whole: Any) -> Any:
    return generated(whole, tokens(2) + 1, num_beams=2)


def prompt_lookup(whole: Any) -> Any:
    return generated(whole, tokens(1, 3).repeat(1, 3) + 1, prompt_lookup_num_tokens=3)


def assisted(whole: Any) -> Any:
    return generated(whole, tokens(1) + 1, assistant_model=model(seed=1, **ONE_LAYER))


@pytest.mark.parametrize("way", [beams, prompt_lookup, assisted])
def test_tokens_are_the_uncompiled_ones(way: Callable[[Any], Any]) -> None:
    graphs = Graphs()
    assert way(compiled(model(**ONE_LAYER), graphs)) == way(model(**ONE_LAYER))
    assert graphs.seen


def batched(whole: Any) -> list[list[int]]:
    """Tokens of continuous batching: new requests join those that are being decoded."""
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = whole.generate_batch(
        inputs=[prompt.tolist() for prompt in PROMPTS],
        generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=32, num_blocks=8, max_batch_tokens=24
        ),
        progress_bar=False,
    )
    assert len(found) == len(PROMPTS)
    return [found[name].generated_tokens for name in sorted(found, key=found_at)]


def found_at(name: str) -> int:
    return int(name.rpartition("_")[2])


PROMPTS = [tokens(1, length)[0] % 100 + 1 for length in (5, 20, 3, 9)]


@pytest.mark.filterwarnings("error::mxfp4_fx.errors.WholeModelWarning")
@pytest.mark.parametrize("pieces", [True, False])
def test_continuous_batching(pieces: bool) -> None:
    """Before transformers 5.24, pieces cannot serve it, and the whole model is compiled."""
    whole, graphs = model(**ONE_LAYER), Graphs()
    falls_back = pieces and cache_name() != "cache"
    if pieces:
        compiled(whole, graphs)
    else:
        whole.compile(backend="mxfp4", options={"inner": graphs, "strict": True})
    told = pytest.warns(WholeModelWarning, match=r"layers\.0 .*the cache of continuous batching")
    with told if falls_back else contextlib.nullcontext():
        got = batched(whole)
    plain, made = model(**ONE_LAYER), len(graphs.seen)
    alone = [generated(plain, prompt[None])[0][len(prompt) :] for prompt in PROMPTS]
    assert got == batched(plain) == alone
    assert made
    assert batched(whole) == alone
    if not falls_back:
        assert len(graphs.seen) == made


def test_a_pipeline_of_one_prompt_and_of_a_batch(tmp_path: Path) -> None:
    checkpoint, graphs = write_packed(tmp_path / "packed"), Graphs()

    def texts(whole: Any) -> list[str]:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
        tokenizer.pad_token_id = 0
        serve = pipeline("text-generation", model=whole, tokenizer=tokenizer)
        settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
        found = [*serve(["one"], **settings), *serve(["a", "three"], batch_size=2, **settings)]
        return [one[0]["generated_text"] for one in found]

    def loaded() -> Any:
        return mxfp4_fx.from_pretrained(checkpoint, dtype=torch.float32).eval()

    assert texts(compiled(loaded(), graphs)) == texts(loaded())
    assert graphs.seen


def test_many_sizes_compile_few_graphs() -> None:
    graphs = Graphs()
    whole = compiled(model(**ONE_LAYER), graphs)
    for batch, length in ((3, 5), (1, 9), (5, 20), (2, 4), (4, 17), (1, 2), (7, 3), (3, 30)):
        generated(whole, tokens(batch, length) % 100 + 1, max_new_tokens=3, min_new_tokens=3)
    assert len(graphs.seen) <= MOST_GRAPHS
