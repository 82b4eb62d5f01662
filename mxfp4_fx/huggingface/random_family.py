"""Write a checkpoint of random weights of another family than GPT-OSS, as its own files are.

transformers' class of the family's config gives the sizes, its model and its mapping of names give
the tensors, so that files have the names, shapes and dtypes of the family's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mxfp4_fx.checkpoints import single_experts
from mxfp4_fx.checkpoints.files import CONFIG
from mxfp4_fx.checkpoints.random_config import (
    BOS,
    EOS,
    PAD,
    TOKEN_IDS,
    as_json,
    require_sizes,
    tokenizer_texts,
)
from mxfp4_fx.checkpoints.random_weights import (
    ANY_BYTE,
    RandomTensor,
    normal,
    scale_bytes,
    write_tensors,
)
from mxfp4_fx.checkpoints.safetensors_file import SHARD_BYTES, TensorSpec
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.huggingface.arguments import require_transformers_for_families

# Sizes, by the names of CheckpointShape -> what most configs call them.
_KEYS = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "intermediate": ("moe_intermediate_size",),
    "experts": ("num_experts",),
    "experts_per_token": ("num_experts_per_tok",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
}
_WHOLE = {"intermediate": ("intermediate_size",)}
_LOCAL = {**_WHOLE, "experts": ("num_local_experts",)}
_ROUTED = {"experts": ("n_routed_experts",)}


@dataclass(frozen=True)
class Family:
    """A family whose checkpoints can be written.

    Attributes:
        model: the model whose sizes are the default.
        keys: size -> keys of the config; () if the family has no such size.
        values: other keys of the config than its class has them.
    """

    model: str
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def keys_of(self, size: str) -> tuple[str, ...]:
        return self.keys.get(size, _KEYS.get(size, ()))


# All layers have experts: models of few layers would have none otherwise.
_NO_DENSE_LAYERS = {"first_k_dense_replace": 0}
FAMILIES = {
    "deepseek_v3": Family(
        "DeepSeek-V3",
        # Its attention has as many key-value heads, and widths of its own.
        {**_ROUTED, "heads": ("num_attention_heads", "num_key_value_heads"), "kv_heads": (),
         "head_dim": ()},
        _NO_DENSE_LAYERS,
    ),
    "glm4_moe": Family("GLM-4.5-Air", _ROUTED, {"head_dim": 128, **_NO_DENSE_LAYERS}),
    "minimax_m2": Family("MiniMax-M2", _LOCAL),
    "mixtral": Family("Mixtral-8x7B", _LOCAL, {"head_dim": 128}),
    "olmoe": Family("OLMoE-1B-7B", {**_WHOLE, "head_dim": ()}, {"intermediate_size": 1024}),
    "qwen2_moe": Family("Qwen1.5-MoE-A2.7B", {"head_dim": ()}),
    "qwen3_moe": Family("Qwen3-30B-A3B", {}, {"head_dim": 128, "norm_topk_prob": True}),
}  # fmt: skip


def write_random_family(
    path: str | Path,
    family: str,
    sizes: Mapping[str, int] | None = None,
    *,
    dense: bool = False,
    others: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write the checkpoint directory `path`, which appears only when it is complete.

    Each expert has matrices [N, K] of its own. In MXFP4 these are uint8 [N, K/2] and [N, K/32] of
    compressed-tensors' ``mxfp4-pack-quantized``; all else is bf16, or float32 where the family
    insists. The directory also gets the configs and a byte-level tokenizer.

    Args:
        path: a directory that does not exist or is empty; its parents are created.
        family: one of FAMILIES.
        sizes: sizes by the names of ``CheckpointShape``. Those that are missing are those of the
            family's model, except 2 layers and a vocabulary of 512.
        dense: write experts in bf16.
        others: further keys of the config, such as ``q_lora_rank``.
        seed: the same seed and config give the same bytes, whatever the shards.
        max_shard_bytes: tensor bytes in a shard; a larger tensor has a shard of its own.
        progress: show a progress bar if stderr is a terminal.

    Returns:
        `path` as an absolute path.

    Raises:
        CheckpointError: `family` is not one of FAMILIES, or cannot have these sizes; `path` exists
            and is not empty, or cannot be written; the disk has too little room; transformers is
            too old, or `tokenizers` is not installed. Nothing was written.
    """
    require_transformers_for_families("checkpoints")
    from transformers.core_model_loading import revert_weight_conversion  # older ones have none

    config = family_config(family, sizes or {}, others or {})
    dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures, config.dtype = [type(model).__name__], dtype
    stored = revert_weight_conversion(model, model.state_dict())
    specs = {name: TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in stored.items()}
    names = {name for name in specs if single_experts.SINGLE.match(name) and not dense}
    content = json.loads(config.to_json_string())
    if names:
        content["quantization_config"] = single_experts.quantized_config(specs, names)
    tensors = [
        tensor
        for name, spec in specs.items()
        for tensor in (_packed(spec) if name in names else (_dense(spec),))
    ]
    texts = {CONFIG: as_json(content), **tokenizer_texts()}
    return write_tensors(path, tensors, texts, seed, max_shard_bytes, progress)


def family_config(family: str, sizes: Mapping[str, int], others: Mapping[str, Any]) -> Any:
    """Return the config of a family in these sizes.

    Raises:
        CheckpointError: the family is not known, or cannot have them.
    """
    known = FAMILIES.get(family)
    if known is None:
        raise CheckpointError(
            f"{family} is no family that can be written: gpt_oss, {', '.join(FAMILIES)} can"
        )
    values = {**known.values, **others}
    for size, number in {"layers": 2, "vocab": 512, **sizes}.items():
        keys = known.keys_of(size)
        if not keys:
            raise CheckpointError(f"{family} has no {size} of its own: leave it out")
        values.update(dict.fromkeys(keys, number))
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = CONFIG_MAPPING[family](**values, **{k: TOKEN_IDS[t] for k, t in tokens.items()})
    taken = {s: getattr(config, keys[0]) for s in _KEYS if (keys := known.keys_of(s))}
    heads = taken["heads"]
    width = getattr(config, "head_dim", None)
    if width is None:
        width, rest = divmod(taken["hidden"], max(heads, 1))
        if rest or width % 2 or not width:
            raise CheckpointError(
                f"heads is {heads}: {family} divides hidden ({taken['hidden']}) by it, which must "
                "give an even number: pass other heads"
            )
    require_sizes({"kv_heads": heads, "head_dim": width, **taken})
    groups, chosen = getattr(config, "n_group", 1), getattr(config, "topk_group", 1)
    in_group, rest = divmod(taken["experts"], groups)
    # A group is rated by its best two experts, and experts are chosen in some of the groups.
    if groups > 1 and (rest or in_group < 2 or chosen * in_group < taken["experts_per_token"]):
        raise CheckpointError(
            f"experts is {taken['experts']}: {family} has {groups} groups of as many, two or more "
            f"in each, and chooses experts_per_token ({taken['experts_per_token']}) in {chosen}"
        )
    return config


def _packed(spec: TensorSpec) -> tuple[RandomTensor, RandomTensor]:
    blocks, scales = single_experts.packed_specs(spec)
    return (
        RandomTensor(blocks.name, blocks.shape, ANY_BYTE),
        RandomTensor(scales.name, scales.shape, scale_bytes(spec.shape[1])),
    )


def _dense(spec: TensorSpec) -> RandomTensor:
    """Return a tensor that keeps values of order one in range, by what its name says it is."""
    std, mean = 0.1, 0.0
    if spec.name.endswith("norm.weight"):
        mean = 1.0
    elif "embed_tokens" in spec.name:
        std = 1.0
    elif len(spec.shape) > 1:
        std = spec.shape[-1] ** -0.5
        if spec.name.endswith(".gate.weight"):  # so that the chosen experts get unequal weights
            std *= 2
    return RandomTensor(spec.name, spec.shape, normal(std, mean, spec.dtype))
