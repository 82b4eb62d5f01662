"""Dense checkpoints of other families than GPT-OSS, and the words of compressed-tensors for them.

Most files have a matrix [N, K] for each expert and projection:
"model.layers.0.mlp.experts.3.up_proj.weight"; for the others, see `fused_experts.py`. In MXFP4
they get the names, the bytes and the config of compressed-tensors' ``mxfp4-pack-quantized``, which
other programs read, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from mxfp4_fx.checkpoints.checkpoint import Checkpoint
from mxfp4_fx.checkpoints.fused_experts import experts_of, fused
from mxfp4_fx.checkpoints.gpt_oss import FLOATS, MODEL_TYPE
from mxfp4_fx.checkpoints.packed_formats import COMPRESSED_TENSORS, quantization_config
from mxfp4_fx.checkpoints.safetensors_file import StoredTensor, TensorSpec
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.core.skip import Skip

SINGLE = re.compile(r"^(.*\.experts)\.\d+\.\w+\.weight$")


def is_of_another_family(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint has dense experts, of another family than GPT-OSS."""
    is_gpt_oss = checkpoint.config.get("model_type") == MODEL_TYPE
    return not is_gpt_oss and any(map(_experts_of, checkpoint.tensors))


def _experts_of(name: str) -> str | None:
    """Return the module of experts that a tensor is of, one expert's or all of a layer's."""
    single = SINGLE.match(name)
    return single[1] if single else experts_of(name)


def to_quantize(checkpoint: Checkpoint, skip: Skip) -> set[str]:
    """Return the names of the experts' tensors that become MXFP4.

    Args:
        checkpoint: one that :func:`is_of_another_family`.
        skip: names modules of experts ("model.layers.0.mlp.experts") that stay dense.

    Raises:
        CheckpointError: the checkpoint is quantized already; a matrix cannot be MXFP4; or all
            experts are skipped.
        OptionError: a pattern of `skip` names no experts.
    """
    settings = quantization_config(checkpoint.config)
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise CheckpointError(
            f"{checkpoint.config_name} says that quant_method is {method!r}: name a checkpoint "
            "that is not quantized"
        )
    places = {name: found for name in checkpoint.tensors if (found := _experts_of(name))}
    skip.require_used(list(dict.fromkeys(places.values())))
    skipped = {place for place in places.values() if skip.names(place)}
    names = {name for name, place in places.items() if place not in skipped}
    if not names:
        raise CheckpointError(
            f"nothing of {checkpoint.files[0].parent} is left to quantize: skip fewer layers"
        )
    for name in sorted(names):
        tensor = checkpoint.tensors[name]
        if experts_of(name):
            continue  # `fused_experts.fused` checks it
        if tensor.dtype not in FLOATS or len(tensor.shape) != 2 or tensor.shape[1] % BLOCK:
            raise CheckpointError(
                f"{name} in {tensor.file} is {tensor.dtype} {list(tensor.shape)}: MXFP4 takes "
                f"matrices of float32, bfloat16 or float16 whose rows are a multiple of {BLOCK} "
                "long; skip its experts"
            )
    return names


def matrices(checkpoint: Checkpoint, names: set[str]) -> dict[str, TensorSpec]:
    """Return name -> matrix of one expert, of all that the tensors `names` hold.

    Raises:
        CheckpointError: a tensor that holds all experts of a layer cannot be MXFP4.
    """
    found = {}
    for name in names:
        tensor = checkpoint.tensors[name]
        if experts_of(name) is None:
            found[name] = tensor.spec
            continue
        whole = fused(checkpoint, name)
        found |= {s.name: s for expert in range(tensor.shape[0]) for s in whole.specs(expert)}
    return found


def packed_specs(tensor: StoredTensor | TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """Return the two tensors to write for a matrix: its blocks, then its scales."""
    n, k = tensor.shape
    stem = tensor.name.removesuffix("weight")
    return (
        TensorSpec(f"{stem}{COMPRESSED_TENSORS.blocks}", torch.uint8, (n, k // 2)),
        TensorSpec(f"{stem}{COMPRESSED_TENSORS.scales}", torch.uint8, (n, k // BLOCK)),
    )


def quantized_config(
    tensors: Mapping[str, StoredTensor | TensorSpec], names: set[str]
) -> dict[str, Any]:
    """Return ``quantization_config`` of a checkpoint in which the matrices `names` are MXFP4.

    What else may be a linear layer is named as ignored, once for all layers where that is so.

    Args:
        tensors: name -> dense tensor of the checkpoint, experts one by one.
        names: those that become MXFP4.
    """
    weights = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and name not in names
    ]
    quantized = {_of_any_layer(name.removesuffix(".weight")) for name in names}
    ignore = []
    for module in weights:
        pattern = _of_any_layer(module)
        is_one = pattern in quantized or pattern == re.escape(
            module
        )  # a skipped one, or no layer's
        ignore.append(module if is_one else f"re:^{pattern}$")
    return {
        "quant_method": COMPRESSED_TENSORS.method,
        "format": COMPRESSED_TENSORS.name,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": COMPRESSED_TENSORS.name,
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": BLOCK,
                    "dynamic": False,
                    "scale_dtype": "torch.uint8",
                },
            }
        },
        "ignore": list(dict.fromkeys(ignore)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _of_any_layer(module: str) -> str:
    """Return a pattern for a module's name with any numbers in it."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(module))
