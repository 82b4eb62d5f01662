"""GPT-OSS: the keys that its config.json must have, and its tensors' names and shapes by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK

# How a layer's experts are stored: as MXFP4 blocks and scales, or as floats.
Form = Literal["packed", "dense"]

# A tensor's dimensions: each is a number, a key of config.json, or a product or quotient of these.
Axes = tuple[str, ...]

MODEL_TYPE, METHOD = "gpt_oss", "mxfp4"
ITS_CONFIG = "use the config.json that belongs to these weights"
PROJECTIONS = ("gate_up_proj", "down_proj")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

LAYERS = "num_hidden_layers"
_E, _H, _I, _V = "num_local_experts", "hidden_size", "intermediate_size", "vocab_size"
_HEADS, _KV_HEADS, _HEAD_DIM = "num_attention_heads", "num_key_value_heads", "head_dim"
KEYS = (LAYERS, _E, _H, _I, _V, _HEADS, _KV_HEADS, _HEAD_DIM)
_TOP_K = "num_experts_per_tok"
_OPTIONAL = (_TOP_K,)
MULTIPLES_OF_BLOCK = (_H, _I)  # if experts are packed

_Q, _KV = f"{_HEADS} * {_HEAD_DIM}", f"{_KV_HEADS} * {_HEAD_DIM}"
_GATE_UP = f"2 * {_I}"
_H_BLOCKS, _I_BLOCKS = f"{_H} / {BLOCK}", f"{_I} / {BLOCK}"

_LAYER: dict[str, Axes] = {
    "input_layernorm.weight": (_H,),
    "self_attn.q_proj.weight": (_Q, _H),
    "self_attn.k_proj.weight": (_KV, _H),
    "self_attn.v_proj.weight": (_KV, _H),
    "self_attn.o_proj.weight": (_H, _Q),
    "self_attn.sinks": (_HEADS,),
    "post_attention_layernorm.weight": (_H,),
    "mlp.router.weight": (_E, _H),
    "mlp.router.bias": (_E,),
    "mlp.experts.gate_up_proj_bias": (_E, _GATE_UP),
    "mlp.experts.down_proj_bias": (_E, _H),
}
_ATTENTION_BIASES: dict[str, Axes] = {
    "self_attn.q_proj.bias": (_Q,),
    "self_attn.k_proj.bias": (_KV,),
    "self_attn.v_proj.bias": (_KV,),
    "self_attn.o_proj.bias": (_H,),
}
_EXPERTS: dict[Form, dict[str, Axes]] = {
    "packed": {
        "mlp.experts.gate_up_proj_blocks": (_E, _GATE_UP, _H_BLOCKS, str(BYTES_PER_BLOCK)),
        "mlp.experts.gate_up_proj_scales": (_E, _GATE_UP, _H_BLOCKS),
        "mlp.experts.down_proj_blocks": (_E, _H, _I_BLOCKS, str(BYTES_PER_BLOCK)),
        "mlp.experts.down_proj_scales": (_E, _H, _I_BLOCKS),
    },
    "dense": {
        "mlp.experts.gate_up_proj": (_E, _H, _GATE_UP),
        "mlp.experts.down_proj": (_E, _I, _H),
    },
}


def sizes(config: Mapping[str, Any], named: str) -> dict[str, int]:
    """Return the numbers that a config has for KEYS.

    Args:
        config: the content of ``config.json``.
        named: what messages call the config.

    Raises:
        CheckpointError: the config is that of another model, or its sizes are impossible.
    """
    if (kind := config.get("model_type")) != MODEL_TYPE:
        raise CheckpointError(
            f"{named} says that model_type is {kind!r}: name a checkpoint of GPT-OSS, where it is "
            f"{MODEL_TYPE!r}, or one of another family in a format of docs/families.md"
        )
    for key in (*KEYS, *_OPTIONAL):
        if key in _OPTIONAL and key not in config:
            continue
        value = config.get(key)
        if type(value) is not int or value < 1:
            what = f"says that {key} is {value!r}" if key in config else f"has no {key}"
            raise CheckpointError(f"{named} {what}: {ITS_CONFIG}")
    found: dict[str, int] = {key: config[key] for key in KEYS}
    top_k = config.get(_TOP_K, 1)
    for key, value, is_wrong, rule in (
        (_HEADS, found[_HEADS], found[_HEADS] % found[_KV_HEADS], f"a multiple of {_KV_HEADS}"),
        (_HEAD_DIM, found[_HEAD_DIM], found[_HEAD_DIM] % 2, "even"),
        (_TOP_K, top_k, top_k > found[_E], f"{found[_E]} or less, the {_E}"),
    ):
        if is_wrong:
            raise CheckpointError(f"{named} says that {key} is {value}, not {rule}: {ITS_CONFIG}")
    return found


def quantization(config: Mapping[str, Any], named: str) -> tuple[str | None, list[str]]:
    """Return a config's ``quant_method`` (or None) and its ``modules_to_not_convert``.

    Raises:
        CheckpointError: they have wrong types.
    """
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"quantization_config is {settings!r} in {named}, not an object")
    method = settings.get("quant_method")
    modules = settings.get("modules_to_not_convert") or []
    if not isinstance(modules, list | tuple) or not all(isinstance(m, str) for m in modules):
        raise CheckpointError(
            f"modules_to_not_convert is {modules!r} in {named}, not a list of names"
        )
    return getattr(method, "value", method), list(modules)


def quantized_config(modules: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in MXFP4 whose ``modules`` are not."""
    return {"modules_to_not_convert": list(modules), "quant_method": METHOD}


def not_converted_by_default(prefix: str = "model.") -> list[str]:
    """``modules_to_not_convert`` of OpenAI's checkpoints, for those that have none.

    Args:
        prefix: of the base model's modules.
    """
    inside = ("layers.*.self_attn", "layers.*.mlp.router", "embed_tokens")
    return [*(f"{prefix}{module}" for module in inside), "lm_head"]


def require_method(method: str | None, named: str) -> None:
    """Raise CheckpointError unless `method` is MXFP4 or None."""
    if method not in (None, METHOD):
        raise CheckpointError(
            f"{named} says that quant_method is {method!r}: name a checkpoint in {METHOD}, or one "
            "that is not quantized"
        )


def tensors(prefix: str, forms: Mapping[int, Form], biases: bool, head: bool) -> dict[str, Axes]:
    """Return name -> axes of every tensor that a checkpoint must have.

    Args:
        prefix: the prefix of the base model's tensors.
        forms: layer -> form of its experts.
        biases: whether attention has biases.
        head: whether the checkpoint has ``lm_head.weight``.
    """
    found: dict[str, Axes] = {f"{prefix}embed_tokens.weight": (_V, _H)}
    for layer, form in forms.items():
        parts = _LAYER | (_ATTENTION_BIASES if biases else {}) | _EXPERTS[form]
        found |= {f"{prefix}layers.{layer}.{name}": axes for name, axes in parts.items()}
    found[f"{prefix}norm.weight"] = (_H,)
    if head:
        found["lm_head.weight"] = (_V, _H)
    return found


def dtypes(name: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes that the tensor of that name may have."""
    return (torch.uint8,) if name.endswith(("_blocks", "_scales")) else FLOATS


def size(axis: str, numbers: Mapping[str, int]) -> int:
    """Return the size of an axis; `numbers` has all of KEYS."""
    value = 1
    for factor in axis.split(" * "):
        key, _, divisor = factor.partition(" / ")
        value *= int(key) if key.isdecimal() else numbers[key]
        value //= int(divisor or 1)
    return value
