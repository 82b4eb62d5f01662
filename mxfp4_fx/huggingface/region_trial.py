"""Whether a decoder layer may be cut into the regions of ``regions.py``: tried on a tiny one."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch

from mxfp4_fx.huggingface.decoder_layers import Taken, Taking, argument_names, cache_name

# A decoder layer's first arguments; "" is its cache, which has another name from 5.24 on.
_ARGUMENTS = (
    *("hidden_states", "attention_mask", "position_ids", ""),
    *("use_cache", "position_embeddings"),
)


class NoRegionsError(Exception):
    """The layers of this transformers cannot be cut into regions."""


@dataclasses.dataclass(frozen=True)
class Regions:
    """What is tried.

    Attributes:
        own: the layer's own forward.
        head: (layer, hidden states, cos, sin) -> new keys and values.
        rest: (layer, hidden states, mask, cos, sin, the cache's keys and values) -> the output.
        whole: (layer, hidden states, mask, cos, sin) -> the output, without a cache.
    """

    own: Callable[..., Any]
    head: Callable[..., Any]
    rest: Callable[..., Any]
    whole: Callable[..., Any]


def hands_arguments(regions: Regions, modeling: types.ModuleType) -> bool:
    """Return whether attention hands its cache's ``update`` the arguments that it does not name.

    It does so from transformers 5.24 on, as ``kwargs={...}``.

    Raises:
        NoRegionsError: the layers of this transformers cannot be cut into regions.
    """
    names = argument_names()[: len(_ARGUMENTS)]
    if names != tuple(name or cache_name() for name in _ARGUMENTS):
        raise NoRegionsError(f"its layers take other arguments: {', '.join(names)}")
    try:
        with torch.device("cpu"), torch.no_grad():
            is_same = all(_are_the_layer(regions, modeling, index) for index in (0, 1))
            taking, given = Taking(), _arguments()
            try:
                own_arguments = {**_inputs(), **given, cache_name(): taking}
                regions.own(small_layer(modeling, 0), **own_arguments)
            except Taken:
                pass
            is_known = not taking.more and taking.named in ({}, {"kwargs": given})
    except Exception as error:
        raise NoRegionsError(repr(error)) from error
    if not is_same:
        raise NoRegionsError("a layer computes other bits in regions")
    if not is_known:
        raise NoRegionsError(f"its layers hand their cache {[*taking.more, *taking.named]}")
    return bool(taking.named)


def _are_the_layer(regions: Regions, modeling: types.ModuleType, index: int) -> bool:
    """Return whether head, update and rest give a layer's bits, and the whole does, too."""
    layer, given = small_layer(modeling, index), {**_inputs(), **_arguments()}
    hidden, mask = given["hidden_states"], given["attention_mask"]
    cos, sin = given["position_embeddings"]
    for cache in (None, modeling.DynamicCache(config=layer.self_attn.config)):
        want = regions.own(layer, **given, **{cache_name(): cache})
        if cache is None:
            got = regions.whole(layer, hidden, mask, cos, sin)
        else:
            keys, values = regions.head(layer, hidden, cos, sin)
            fresh = modeling.DynamicCache(config=layer.self_attn.config).update(keys, values, index)
            got = regions.rest(layer, hidden, mask, cos, sin, *fresh)
        if not torch.equal(got, want):
            return False
    return True


def _inputs() -> dict[str, Any]:
    """Return the arguments of a small layer that its attention names."""
    hidden = torch.arange(24, dtype=torch.float32).cos().reshape(1, 3, 8)
    return {
        "hidden_states": hidden,
        "attention_mask": torch.arange(9, dtype=torch.float32).reshape(1, 1, 3, 3),
        "position_embeddings": (hidden[..., :2], hidden[..., 2:4]),
    }


def _arguments() -> dict[str, Any]:
    """Return all others but the cache, and one that no layer knows."""
    return {"position_ids": torch.arange(3)[None], "use_cache": True, "another": object()}


def small_layer(modeling: types.ModuleType, index: int) -> Any:
    """Make a decoder layer on the CPU. No random numbers are drawn."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "num_attention_heads": 4}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    config = modeling.GptOssConfig(
        **sizes, **experts, num_hidden_layers=2, vocab_size=8, sliding_window=2
    )
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        layer = modeling.GptOssDecoderLayer(config, index).to(torch.float32).eval()
    layer = layer.to_empty(device="cpu")
    for at, parameter in enumerate(layer.parameters()):
        values = torch.arange(parameter.numel(), dtype=torch.float32) + at
        parameter.copy_(values.sin().reshape(parameter.shape))
    return layer
