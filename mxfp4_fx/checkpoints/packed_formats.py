"""Formats of packed checkpoints beside GPT-OSS's: a matrix [N, K] is two tensors of their own.

All of them hold the same bytes; names, dtypes and the words of ``quantization_config`` differ. To
add a format, add a row to :data:`FORMATS` and a reader of its config to ``packed_configs.py``.

Sources: compressed-tensors, compressors/mxfp4/base.py; Quark, torch/utils/pack.py (``Pack_fp4``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mxfp4_fx.checkpoints import packed_configs
from mxfp4_fx.checkpoints.checkpoint import Checkpoint
from mxfp4_fx.checkpoints.encodings import Encoding, Fp8, Mxfp4
from mxfp4_fx.checkpoints.files import AGAIN
from mxfp4_fx.checkpoints.gpt_oss import FLOATS
from mxfp4_fx.checkpoints.packed_configs import NVFP4, OTHER, quantization_config
from mxfp4_fx.checkpoints.safetensors_file import StoredTensor
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK

_DENSE = "weight"  # the last part of a dense matrix's name


@dataclass(frozen=True)
class Format:
    """How the files hold a packed matrix.

    Attributes:
        name: in messages.
        method: ``quant_method`` of the config.
        blocks, scales: the last parts of the names of the two tensors, which are [N, K/2] and
            [N, K/32].
        blocks_dtype, scales_dtype: their dtypes; the bits are those of uint8.
        reads: returns whether a config names the format. Its arguments are the config, its
            ``quantization_config`` and what messages call it. It raises CheckpointError for other
            properties than those that kernels read.
        strange: last parts of names that only other formats have -> what such a tensor is.
        fp8: returns, of the ``quantization_config``, how matrices are FP8 that lie beside those in
            MXFP4 under the same names; None if the format has none.
    """

    name: str
    method: str
    blocks: str
    scales: str
    blocks_dtype: torch.dtype
    scales_dtype: torch.dtype
    reads: Callable[[Mapping[str, Any], Mapping[str, Any], str], bool]
    strange: Mapping[str, str]
    fp8: Callable[[Mapping[str, Any]], Fp8] | None = None

    @property
    def encoding(self) -> Mxfp4:
        return Mxfp4((self.blocks_dtype, self.scales_dtype))


_INTEGERS = f"belongs to packed integers, not to MXFP4: {OTHER}"
_ZERO_POINT = f"is the zero point of integers, which MXFP4 has not: {OTHER}"

COMPRESSED_TENSORS = Format(
    packed_configs.COMPRESSED_TENSORS,
    "compressed-tensors",
    "weight_packed",
    "weight_scale",
    torch.uint8,
    torch.uint8,
    packed_configs.compressed_tensors,
    {
        "weight_global_scale": NVFP4,
        "input_global_scale": NVFP4,
        "weight_zero_point": _ZERO_POINT,
        "weight_shape": _INTEGERS,
        "weight_g_idx": _INTEGERS,
    },
)
QUARK = Format(
    "Quark's fp4",
    "quark",
    "weight",
    "weight_scale",
    torch.uint8,
    torch.uint8,
    packed_configs.quark,
    {
        "weight_scale_2": NVFP4,
        "weight_zero_point": _ZERO_POINT,
        "weight_packed": f"is compressed-tensors', in a checkpoint of Quark's: {AGAIN}",
    },
)
DEEPSEEK = Format(
    "DeepSeek's fp4",
    "fp8",
    "weight",
    "scale",
    torch.int8,
    torch.float8_e8m0fnu,
    packed_configs.deepseek,
    {
        "weight_scale": f"is not what DeepSeek calls scales: {AGAIN}",
        "weight_scale_inv": f"is not what DeepSeek-V4 calls scales: {AGAIN}",
        "weight_packed": f"is compressed-tensors', in a checkpoint of DeepSeek's: {AGAIN}",
    },
    lambda settings: Fp8(tuple(settings["weight_block_size"])),
)
FORMATS = (COMPRESSED_TENSORS, QUARK, DEEPSEEK)


class PackedWeight(NamedTuple):
    """A packed matrix [N, K] in the files.

    Attributes:
        stem: its name without the last part: "model.layers.0.mlp.experts.3.up_proj".
        blocks, scales: its tensors.
        encoding: what they mean.
    """

    stem: str
    blocks: StoredTensor
    scales: StoredTensor
    encoding: Encoding

    @property
    def n(self) -> int:
        return self.encoding.shape(self.blocks.shape)[0]

    @property
    def k(self) -> int:
        return self.encoding.shape(self.blocks.shape)[1]


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
    return next((one for one in FORMATS if one.reads(config, settings, named)), None)


def packed_weights(checkpoint: Checkpoint, form: Format) -> dict[str, PackedWeight]:
    """Return stem -> packed matrix, for every one in the files. Only headers are read.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape, or belongs to another
            format. The message names the tensor.
    """
    stems = {stem for stem, part in _parts(checkpoint) if _is_packed(checkpoint, form, stem, part)}
    for stem, part in _parts(checkpoint):
        name = _joined(stem, part)
        if part in form.strange:
            raise CheckpointError(f"{_placed(checkpoint, name)} {form.strange[part]}")
        if stem in stems and part == _DENSE != form.blocks:
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


def _is_packed(checkpoint: Checkpoint, form: Format, stem: str, part: str) -> bool:
    """Return whether a tensor belongs to a packed matrix, or seems to."""
    if part == form.blocks == _DENSE:  # where dense matrices have the same name
        return checkpoint.tensors[_joined(stem, part)].dtype not in FLOATS
    return part in (form.blocks, form.scales)


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
        raise CheckpointError(f"{_placed(checkpoint, names[1])} {NVFP4}")
    encoding: Encoding = form.encoding
    if form.fp8 is not None and blocks.dtype == Fp8.dtypes[0]:
        encoding = form.fp8(quantization_config(checkpoint.config))
    for name, tensor, dtype in zip(names, (blocks, scales), encoding.dtypes, strict=True):
        if tensor.dtype != dtype or len(tensor.shape) != 2:
            raise CheckpointError(
                f"{_placed(checkpoint, name)} is {tensor.dtype} {list(tensor.shape)}, and in "
                f"{form.name} a matrix of {dtype}: {AGAIN}"
            )
    weight = PackedWeight(stem, blocks, scales, encoding)
    expected = encoding.scales_shape(weight.n, weight.k)
    if isinstance(encoding, Fp8) and scales.shape != expected:
        raise CheckpointError(
            f"{_placed(checkpoint, names[1])} is {list(scales.shape)}; for {form.blocks} "
            f"{list(blocks.shape)} and weight_block_size {list(encoding.rectangle)} FP8 has scales "
            f"{list(expected)}: {AGAIN}"
        )
    if not encoding.is_whole(weight.n, weight.k) or scales.shape != expected:
        size, rest = divmod(weight.k, scales.shape[1]) if scales.shape[1] else (0, 1)
        of = f", which is a scale for {size} values" if not rest and size != BLOCK else ""
        raise CheckpointError(
            f"{_placed(checkpoint, names[1])} is {list(scales.shape)}{of}; for "
            f"{form.blocks} {list(blocks.shape)} MXFP4 has a scale for {BLOCK} values, "
            f"{list(expected)}: {AGAIN}, or quantize it with groups of {BLOCK}"
        )
    return weight
