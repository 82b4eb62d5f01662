"""The ways to serve a model that ``mxfp4_fx.compile`` compiled: tokens and numbers of graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_packed
from models import Graphs, model, tokens
from transformers import AutoTokenizer, pipeline

import mxfp4_fx

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
