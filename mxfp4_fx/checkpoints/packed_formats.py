"""Formats of packed checkpoints beside GPT-OSS's: a matrix [N, K] is two tensors of their own.

All of them hold the same bytes; names, dtypes and the words of ``quantization_config`` differ. To
add a format, add a row to :data:`FORMATS` and a reader of its config to :data:`_READERS`.

Sources: compressed-tensors, compressors/mxfp4/base.py and quantization/quant_config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mxfp4_fx.checkpoints.checkpoint import Checkpoint
from mxfp4_fx.checkpoints.files import AGAIN, few
from mxfp4_fx.checkpoints.safetensors_file import StoredTensor
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK

OTHER = "name a checkpoint in MXFP4, or a dense one; transformers itself may load this one"
_NVFP4 = (
    "is NVFP4, which is another format than MXFP4 (blocks of 16 values with E4M3 scales): " + OTHER
)


@dataclass(frozen=True)
class Format:
    """How the files hold a packed matrix.

    Attributes:
        name: in messages.
        method: ``quant_method`` of the config.
        blocks, scales: the last parts of the names of the two tensors, which are [N, K/2] and
            [N, K/32].
        blocks_dtype, scales_dtype: their dtypes; the bits are those of uint8.
        strange: last parts of names that only other formats have -> what such a tensor is.
    """

    name: str
    method: str
    blocks: str
    scales: str
    blocks_dtype: torch.dtype
    scales_dtype: torch.dtype
    strange: Mapping[str, str]


COMPRESSED_TENSORS = Format(
    "mxfp4-pack-quantized",
    "compressed-tensors",
    "weight_packed",
    "weight_scale",
    torch.uint8,
    torch.uint8,
    {
        "weight_global_scale": _NVFP4,
        "input_global_scale": _NVFP4,
        "weight_zero_point": f"is the zero point of integers, which MXFP4 has not: {OTHER}",
        "weight_shape": f"belongs to packed integers, not to MXFP4: {OTHER}",
        "weight_g_idx": f"belongs to packed integers, not to MXFP4: {OTHER}",
    },
)
FORMATS = (COMPRESSED_TENSORS,)


class PackedWeight(NamedTuple):
    """A packed matrix [N, K] in the files.

    Attributes:
        stem: its name without the last part: "model.layers.0.mlp.experts.3.up_proj".
        blocks, scales: its tensors.
    """

    stem: str
    blocks: StoredTensor
    scales: StoredTensor

    @property
    def n(self) -> int:
        return self.blocks.shape[0]

    @property
    def k(self) -> int:
        return 2 * self.blocks.shape[1]


def format_of(config: Mapping[str, Any], named: str) -> Format | None:
    """Return the format that a ``config.json`` names, or None for GPT-OSS's own and for dense ones.

    Args:
        config: its content.
        named: what messages call it.

    Raises:
        CheckpointError: it names MXFP4 with other properties than those that kernels read.
    """
    settings = quantization_config(config)
    if not isinstance(settings, Mapping):
        return None
    method = settings.get("quant_method")
    found = next((one for one in FORMATS if one.method == method), None)
    if found is not None:
        _READERS[found.name](settings, named)
    return found


def quantization_config(config: Mapping[str, Any]) -> Any:
    """Return the ``quantization_config`` of a model, or of the text model in it, or None."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    return config.get("quantization_config") or inner


def packed_weights(checkpoint: Checkpoint, form: Format) -> dict[str, PackedWeight]:
    """Return stem -> packed matrix, for every one in the files. Only headers are read.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape, or belongs to another
            format. The message names the tensor.
    """
    stems = {stem for stem, part in _parts(checkpoint) if part in (form.blocks, form.scales)}
    for stem, part in _parts(checkpoint):
        name = _joined(stem, part)
        if part in form.strange:
            raise CheckpointError(f"{_placed(checkpoint, name)} {form.strange[part]}")
        if stem in stems and part == "weight" and form.blocks != part:
            raise CheckpointError(
                f"{_placed(checkpoint, name)} has the same weight in another format as "
                f"{_joined(stem, form.blocks)} or {_joined(stem, form.scales)}: {AGAIN}, or save "
                "it again with one of them"
            )
    found = {stem: _weight(checkpoint, form, stem) for stem in sorted(stems)}
    if not found:
        raise CheckpointError(
            f"{checkpoint.config_name} says that weights are {form.name}, but no tensor's "
            f"name ends in .{form.blocks}: {AGAIN}"
        )
    return found


def _parts(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    for name in checkpoint.tensors:
        stem, _, part = name.rpartition(".")
        yield stem, part


def _joined(stem: str, part: str) -> str:
    return f"{stem}.{part}" if stem else part


def _placed(checkpoint: Checkpoint, name: str) -> str:
    return f"{name} in {checkpoint.tensors[name].file}"


def _weight(checkpoint: Checkpoint, form: Format, stem: str) -> PackedWeight:
    names = _joined(stem, form.blocks), _joined(stem, form.scales)
    for name, other in (names, names[::-1]):
        if name not in checkpoint.tensors:
            raise CheckpointError(
                f"{_placed(checkpoint, other)} has no {name}: {AGAIN}, with all of its shards"
            )
    blocks, scales = (checkpoint.tensors[name] for name in names)
    if scales.dtype == torch.float8_e4m3fn:
        raise CheckpointError(f"{_placed(checkpoint, names[1])} {_NVFP4}")
    dtypes = form.blocks_dtype, form.scales_dtype
    for name, tensor, dtype in zip(names, (blocks, scales), dtypes, strict=True):
        if tensor.dtype != dtype or len(tensor.shape) != 2:
            raise CheckpointError(
                f"{_placed(checkpoint, name)} is {tensor.dtype} {list(tensor.shape)}, and in "
                f"{form.name} a matrix of {dtype}: {AGAIN}"
            )
    weight = PackedWeight(stem, blocks, scales)
    if weight.k % BLOCK or scales.shape != (weight.n, weight.k // BLOCK):
        size, rest = divmod(weight.k, scales.shape[1]) if scales.shape[1] else (0, 1)
        of = f", which is a scale for {size} values" if not rest and size != BLOCK else ""
        raise CheckpointError(
            f"{_placed(checkpoint, names[1])} is {list(scales.shape)}{of}; for "
            f"{form.blocks} {list(blocks.shape)} MXFP4 has a scale for {BLOCK} values, "
            f"{[weight.n, weight.k // BLOCK]}: {AGAIN}, or quantize it with groups of {BLOCK}"
        )
    return weight


def _read_compressed_tensors(settings: Mapping[str, Any], named: str) -> None:
    """Raise CheckpointError unless all groups of a config of compressed-tensors are MXFP4."""
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
            raise CheckpointError(f"{name} in {named} {_NVFP4}")
        if form != COMPRESSED_TENSORS.name or not is_fp4:
            others.append(f"{name} ({form})")
        elif size != BLOCK or not weights.get("symmetric", True):
            raise CheckpointError(
                f"{name} in {named} has group_size {size}, and symmetric "
                f"{weights.get('symmetric', True)}: MXFP4 has groups of {BLOCK}, symmetric ones; "
                "quantize the original again, with the preset MXFP4A16"
            )
    if others:
        mixed = "a mix of formats" if len(others) < len(groups) else "another format"
        raise CheckpointError(
            f"{named} has {mixed}: {few(others)} instead of {COMPRESSED_TENSORS.name}: {OTHER}"
        )
    for key in ("transform_config", "sparsity_config"):
        value = settings.get(key)
        if isinstance(value, Mapping) and any(value.values()):
            raise CheckpointError(
                f"{named} has a {key}, which changes what the weights mean: {OTHER}"
            )


_READERS: dict[str, Callable[[Mapping[str, Any], str], None]] = {
    COMPRESSED_TENSORS.name: _read_compressed_tensors,
}
