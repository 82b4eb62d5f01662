"""Bytes of a GPT-OSS checkpoint, and what a decoded token reads of it; floats are bfloat16's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.token_parts import ATTENTION, EXPERTS, HEAD, LINEARS, PARTS, REST
from mxfp4_fx.checkpoints import gpt_oss
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK

FLOAT_BYTES = 2
_PARTS = {  # what a tensor's name contains
    ".experts.": EXPERTS,
    ".router.": EXPERTS,
    "lm_head": HEAD,
    "_proj.": LINEARS,
    "sinks": ATTENTION,
}


class _Tensor(NamedTuple):
    """Bytes of a tensor: in the checkpoint, as bfloat16, and what a token reads of it."""

    name: str
    packed: int
    bfloat16: int
    token: int


def of_model(config: dict[str, Any]) -> dict[str, int]:
    """Sums over the model, from its sizes.

    Returns:
        checkpoint: of all tensors.
        experts, layer: blocks and scales of all layers and of one.
        bfloat16: of all tensors, were the experts bfloat16.
        per_token: of the tensors that decoding a token must read: its experts' in every layer, one
            row of the embedding, all others whole.
        per_token_experts: the experts' part of that.
    """
    tensors = list(_tensors(config))
    experts = sum(t.packed for t in tensors if t.name.endswith(("_blocks", "_scales")))
    return {
        "checkpoint": sum(t.packed for t in tensors),
        "experts": experts,
        "layer": experts // config[gpt_oss.LAYERS],
        "bfloat16": sum(t.bfloat16 for t in tensors),
        "per_token": sum(t.token for t in tensors),
        "per_token_experts": sum(t.token for t in tensors if ".experts." in t.name),
    }


def of_parts(config: dict[str, Any]) -> dict[str, int]:
    """Of the weights that a token reads, by the part of its time that they belong to."""
    found = dict.fromkeys(PARTS, 0)
    for tensor in _tensors(config):
        found[next((part for key, part in _PARTS.items() if key in tensor.name), REST)] += (
            tensor.token
        )
    return found


def of_cache(config: dict[str, Any], context: int) -> int:
    """Of the keys and values that a token reads behind so many others."""
    window, kinds = config["sliding_window"], config["layer_types"]
    tokens = sum(min(context, window) if "sliding" in kind else context for kind in kinds)
    return 2 * FLOAT_BYTES * tokens * config["num_key_value_heads"] * config["head_dim"]


def _tensors(config: dict[str, Any]) -> Iterator[_Tensor]:
    sizes = {key: config[key] for key in gpt_oss.KEYS}
    active, experts = config["num_experts_per_tok"], config["num_local_experts"]
    forms: dict[int, gpt_oss.Form] = dict.fromkeys(range(sizes[gpt_oss.LAYERS]), "packed")
    for name, axes in gpt_oss.tensors("model.", forms, biases=True, head=True).items():
        elements = 1
        for axis in axes:
            elements *= gpt_oss.size(axis, sizes)
        packed = as_floats = FLOAT_BYTES * elements
        if name.endswith(("_blocks", "_scales")):
            packed = elements
            values = BLOCK // BYTES_PER_BLOCK if name.endswith("_blocks") else 0
            as_floats = FLOAT_BYTES * elements * values
        token = packed
        if ".experts." in name:
            token = packed * active // experts
        elif "embed_tokens" in name:
            token = packed // config["vocab_size"]
        yield _Tensor(name, packed, as_floats, token)
