"""What a ``config.json`` says of its packed weights, one reader for each format.

A reader gets a config with its format's ``quant_method``, the ``quantization_config`` in it and
what messages call it. It returns whether the config names the format, and raises an error if it
does, but with other properties than those that kernels read.

Sources: compressed-tensors, quantization/quant_config.py; Quark, torch/quantization/config; vLLM,
quantization/quark/quark.py; transformers, DeepseekV4Config and FineGrainedFP8Config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mxfp4_fx.checkpoints.files import AGAIN, few
from mxfp4_fx.checkpoints.gpt_oss import MODEL_TYPE
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK

OTHER = "name a checkpoint in MXFP4, or a dense one; transformers itself may load this one"
NVFP4 = (
    "is NVFP4, which is another format than MXFP4 (blocks of 16 values with E4M3 scales): " + OTHER
)
COMPRESSED_TENSORS = "mxfp4-pack-quantized"  # its `format`

Json = Mapping[str, Any]


def quantization_config(config: Json) -> Any:
    """Return the ``quantization_config`` of a model, or of the text model in it, or None."""
    return config.get("quantization_config") or _text(config).get("quantization_config")


def compressed_tensors(config: Json, settings: Json, named: str) -> bool:
    """Return True for compressed-tensors', all of whose groups must be MXFP4."""
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{named} has no config_groups in quantization_config: {AGAIN}")
    whole = settings.get("format")
    others = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"{named} says of {name} not how its weights are held: {AGAIN}")
        form = group.get("format") or whole
        size = weights.get("group_size")
        is_fp4 = (weights.get("type"), weights.get("num_bits")) == ("float", 4)
        if form == "nvfp4-pack-quantized" or (is_fp4 and size == 16):
            raise CheckpointError(f"{name} in {named} {NVFP4}")
        if form != COMPRESSED_TENSORS or not is_fp4:
            others.append(f"{name} ({form})")
        elif size != BLOCK or not weights.get("symmetric", True):
            raise CheckpointError(
                f"{name} in {named} has group_size {size}, and symmetric "
                f"{weights.get('symmetric', True)}: MXFP4 has groups of {BLOCK}, symmetric ones; "
                "quantize the original again, with the preset MXFP4A16"
            )
    _require_no_others(named, others, len(groups), COMPRESSED_TENSORS)
    for key in ("transform_config", "sparsity_config"):
        value = settings.get(key)
        if isinstance(value, Mapping) and any(value.values()):
            raise CheckpointError(
                f"{named} has a {key}, which changes what the weights mean: {OTHER}"
            )
    return True


def quark(config: Json, settings: Json, named: str) -> bool:
    """Return True for Quark's, all of whose quantized weights must be MXFP4."""
    weight_format = _mapping(settings.get("export")).get("weight_format", "real_quantized")
    if weight_format != "real_quantized":
        raise CheckpointError(
            f"{named} has weight_format {weight_format!r}, whose weights are dense: export it "
            "again with real_quantized"
        )
    specs = [*_quark_specs(settings)]
    if not specs:
        raise CheckpointError(f"{named} says of no weights how Quark quantized them: {AGAIN}")
    others = []
    for where, spec in specs:
        dtype, size = spec.get("dtype"), spec.get("group_size")
        if dtype == "fp4" and (size == 16 or str(spec.get("scale_format")).startswith("fp8")):
            raise CheckpointError(f"{where} in {named} {NVFP4}")
        if dtype != "fp4":  # "mx" of old releases stores scales without the bias of E8M0
            others.append(f"{where} ({dtype})")
        elif size != BLOCK or spec.get("scale_format", "e8m0") != "e8m0":
            raise CheckpointError(
                f"{where} in {named} has group_size {size} and scale_format "
                f"{spec.get('scale_format')}: MXFP4 has groups of {BLOCK} and e8m0; quantize the "
                "original again, with Quark's scheme mxfp4"
            )
    _require_no_others(named, others, len(specs), "fp4")
    algorithms = settings.get("algo_config") or ()
    for algorithm in [algorithms] if isinstance(algorithms, Mapping) else algorithms:
        entries = _mapping(algorithm)
        name = str(entries.get("name"))
        online = any("online" in key and value for key, value in entries.items())
        if online or name.startswith("svd"):
            raise CheckpointError(
                f"{named} has the algorithm {name} in algo_config, which changes what the weights "
                f"mean: {OTHER}"
            )
    return True


def deepseek(config: Json, settings: Json, named: str) -> bool:
    """Return whether experts are MXFP4 as in DeepSeek-V4, beside other matrices in FP8."""
    places = settings, config, _text(config)
    expert_dtype = next((p["expert_dtype"] for p in places if "expert_dtype" in p), None)
    if expert_dtype != "fp4":
        return False
    rectangle = settings.get("weight_block_size")
    sizes = rectangle if isinstance(rectangle, Sequence) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(
            f"{named} has weight_block_size {rectangle!r}, which must be two positive integers: "
            f"{AGAIN}"
        )
    for key, known in (("scale_fmt", "ue8m0"), ("fmt", "e4m3")):
        if (value := settings.get(key, known)) != known:
            raise CheckpointError(
                f"{named} has {key} {value!r}; beside experts in MXFP4 only {known} is known: "
                f"{OTHER}"
            )
    return True


def vllm(config: Json, settings: Json, named: str) -> bool:
    """Return whether experts of another family than GPT-OSS are in what vLLM calls ``mxfp4``."""
    if config.get("model_type") == MODEL_TYPE:
        return False
    if (size := settings.get("group_size", BLOCK)) != BLOCK:
        raise CheckpointError(
            f"{named} has group_size {size}: MXFP4 has groups of {BLOCK}; quantize the original "
            "again"
        )
    return True


def _quark_specs(settings: Json) -> Iterator[tuple[str, Json]]:
    """Yield where weights are quantized -> how, for each part of a config of Quark."""
    parts = {"global_quant_config": settings.get("global_quant_config")}
    for key in ("layer_quant_config", "layer_type_quant_config"):
        for name, part in _mapping(settings.get(key)).items():
            parts[f"{key} {name}"] = part
    for where, part in parts.items():
        weight = _mapping(part).get("weight")
        for spec in weight if isinstance(weight, list) else [weight]:
            if isinstance(spec, Mapping):
                yield where, spec


def _require_no_others(named: str, others: list[str], count: int, expected: str) -> None:
    if others:
        mixed = "a mix of formats" if len(others) < count else "another format"
        raise CheckpointError(f"{named} has {mixed}: {few(others)} instead of {expected}: {OTHER}")


def _text(config: Json) -> Json:
    """Return the config of the text model in a model of several kinds of inputs."""
    return _mapping(config.get("text_config"))


def _mapping(value: Any) -> Json:
    return value if isinstance(value, Mapping) else {}
