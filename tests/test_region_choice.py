"""Which transformers and which layers get regions; where there are none, the user hears why."""

from __future__ import annotations

import logging
from typing import Any

import models
import pytest
import torch
from near_miss import edited
from test_regions import CHANGES, IDS, captured, layers
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

import mxfp4_fx
from mxfp4_fx.core.torch_private_capture import can_capture_regions
from mxfp4_fx.huggingface import region_choice, region_trial, regions
from mxfp4_fx.huggingface.capture import prepare_capture
from mxfp4_fx.huggingface.decoder_layers import CACHE_NAMES, cache_name

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nothing in what it called:UserWarning"),
    pytest.mark.skipif(not can_capture_regions(), reason="needs torch 2.13"),
]

OTHER = next(name for name in CACHE_NAMES if name != cache_name())
ALONE = "captured by itself, which takes longer to compile"
GRADIENTS = f"each of 2 decoder layers is {ALONE}: gradients are recorded"


@pytest.fixture(autouse=True)
def prepared() -> None:
    prepare_capture()


def notes(model: Any, **options: Any) -> tuple[str, ...]:
    return mxfp4_fx.explain(model, IDS, use_cache=False, options=options).notes


@pytest.mark.usefixtures("no_gradients")
def test_explain_says_why_a_layer_shares_no_graph() -> None:
    model = layers(2).requires_grad_(False)
    for layer, change in zip(model.model.layers, ("hook", "class"), strict=True):
        CHANGES[change](layer)
    hooks, other = notes(model)
    assert hooks.startswith(f"1 decoder layer is {ALONE}: they have hooks")
    assert other.startswith(f"1 decoder layer is {ALONE}: self_attn.q_proj is a Doubled, not ")


def test_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = layers(2)
    options = {"inner": "eager", "skip": ["*"]}
    with caplog.at_level(logging.INFO, "mxfp4_fx.backend"), torch.enable_grad():
        torch.compile(model, backend="mxfp4", options=options)(IDS, use_cache=False)
    assert GRADIENTS in caplog.messages


@pytest.mark.exhaustive
def test_no_word_where_there_is_nothing_to_say() -> None:
    with torch.enable_grad():
        assert notes(layers(1)) == notes(layers(2), regions=False) == ()
    with torch.no_grad():
        assert notes(layers(2)) == ()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("no_gradients")
def test_a_transformers_without_regions_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_choice, "_why_none", "of a reason")
    assert notes(layers(2)) == (f"each of 2 decoder layers is {ALONE}: of a reason",)


# ---- what is learnt of transformers


def trial() -> bool:
    tried = (regions._own, regions._head, regions._rest, regions._whole)
    return region_trial.hands_arguments(region_trial.Regions(*tried), modeling_gpt_oss)


def edit(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    forward = edited(GptOssAttention.forward, {old: new})
    monkeypatch.setattr(GptOssAttention, "forward", forward)


def test_a_cache_that_is_handed_all_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from transformers 5.24 on."""
    if cache_name() == "past_key_values":
        assert not trial()
        edit(monkeypatch, "self.layer_idx", "self.layer_idx, kwargs=kwargs")
    assert trial()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.layer_idx", "self.layer_idx, position_embeddings"),
        ("self.q_proj(hidden_states)", "self.q_proj(hidden_states + cache_length(locals()))"),
    ],
    ids=["hands another argument", "reads its cache"],
)
def test_layers_that_do_something_else(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    def length(held: dict[str, Any]) -> Any:
        return held[cache_name()].get_seq_length() if held[cache_name()] is not None else 0

    monkeypatch.setattr(modeling_gpt_oss, "cache_length", length, raising=False)
    edit(monkeypatch, old, new)
    with pytest.raises(region_trial.NoRegionsError):
        trial()


class UnderTheOtherName(nn.Module):
    """Layers that are given their cache by the name of other versions of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers, self.rotary = model.model.layers, model.model.rotary_emb

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        rope = self.rotary(x, torch.arange(x.shape[1])[None])
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_embeddings=rope, **{OTHER: cache})
        return x


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.usefixtures("no_gradients")
def test_a_cache_by_its_other_name() -> None:
    """Which transformers takes from 5.24 on."""
    model = UnderTheOtherName(layers(2))
    compiled, found = captured(model)
    x, mine, its = torch.ones(1, 5, models.config().hidden_size), DynamicCache(), DynamicCache()
    assert torch.equal(compiled(x, mine), model(x, its))
    assert len(mine.layers) == len(its.layers)
    assert found.graphs == [[]]
