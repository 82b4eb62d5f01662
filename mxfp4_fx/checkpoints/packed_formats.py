"""Formats of packed checkpoints beside GPT-OSS's: a matrix [N, K] is two tensors of their own.

All of them hold the same bytes; names, dtypes and the words of ``quantization_config`` differ. To
add a format, add a row to :data:`FORMATS` and a reader of its config to ``packed_configs.py``.

Sources: compressed-tensors, compressors/mxfp4/base.py; Quark, torch/utils/pack.py (``Pack_fp4``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
_OLD_SCALES = "weight_quantizer.scale"


@dataclass(frozen=True)
class Format:
    """How the files hold a packed matrix.

    Attributes:
        name: in messages.
        method: ``quant_method`` of the config, which other formats may have, too.
        blocks, scales: the last parts of the names of the two tensors, which are [N, K/2] and
            [N, K/32].
        blocks_dtype, scales_dtype: their dtypes; the bits are those of uint8.
        reads: its reader in ``packed_configs.py``.
        strange: last parts of names that only other formats have -> what such a tensor is.
        stacked: the last part of the name of a layer's stacked experts, [E, N, K], before
            ``_weight`` -> the parameter of transformers. Rows are gates, then ups. It is empty if
            the files hold matrices one by one.
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
    stacked: Mapping[str, str] = field(default_factory=dict)
    fp8: Callable[[Mapping[str, Any]], Fp8] | None = None

    @property
    def encoding(self) -> Mxfp4:
        return Mxfp4((self.blocks_dtype, self.scales_dtype))

    def split(self, name: str) -> tuple[str, str]:
        """Return the stem of a tensor's name, and the part that says which tensor it is."""
        stem, _, part = name.rpartition(".")
        for experts in self.stacked:
            if part.startswith(f"{experts}_"):
                return f"{stem}.{experts}", part.removeprefix(f"{experts}_")
        return stem, part

    def joined(self, stem: str, part: str) -> str:
        """Return the name that `split` splits."""
        if stem.rpartition(".")[2] in self.stacked:
            return f"{stem}_{part}"
        return f"{stem}.{part}" if stem else part

    def dense_name(self, stem: str) -> str:
        """Return what a packed matrix would be called if it were dense."""
        path, _, last = stem.rpartition(".")
        return f"{path}.{self.stacked[last]}" if last in self.stacked else f"{stem}.{_DENSE}"


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
    fp8=lambda settings: Fp8(tuple(settings["weight_block_size"])),
)
VLLM = Format(
    "vLLM's mxfp4",
    "mxfp4",
    "weight",
    "weight_scale",
    torch.uint8,
    torch.uint8,
    packed_configs.vllm,
    {"weight_packed": f"is compressed-tensors', in a checkpoint with vLLM's names: {AGAIN}"},
    {"w13": "gate_up_proj", "w2": "down_proj"},
)
FORMATS = (COMPRESSED_TENSORS, QUARK, DEEPSEEK, VLLM)


class PackedWeight(NamedTuple):
    """A packed matrix [N, K] in the files, or one for each expert of a layer.

    Attributes:
        stem: its name without the last part: "model.layers.0.mlp.experts.3.up_proj".
        dense_name: its name if it were dense.
        blocks, scales: its tensors.
        encoding: what they mean.
    """

    stem: str
    dense_name: str
    blocks: StoredTensor
    scales: StoredTensor
    encoding: Encoding

    @property
    def experts(self) -> int | None:
        return self.blocks.shape[0] if len(self.blocks.shape) == 3 else None

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
    method = settings.get("quant_method")
    known = [one for one in FORMATS if one.method == method]
    return next((one for one in known if one.reads(config, settings, named)), None)


def packed_weights(checkpoint: Checkpoint, form: Format) -> dict[str, PackedWeight]:
    """Return stem -> packed matrix, for every one in the files. Only headers are read.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape, or belongs to another
            format. The message names the tensor.
    """
    stems = {
        form.split(name)[0] for name in checkpoint.tensors if _is_packed(checkpoint, form, name)
    }
    for name, tensor in checkpoint.tensors.items():
        stem, part = form.split(name)
        if part in form.strange:
            raise CheckpointError(f"{_placed(checkpoint, name)} {form.strange[part]}")
        if stem in stems and part == _DENSE != form.blocks:
            raise CheckpointError(
                f"{_placed(checkpoint, name)} has the same weight in another format as "
                f"{form.joined(stem, form.blocks)} or {form.joined(stem, form.scales)}: {AGAIN}, "
                "or save it again with one of them"
            )
        if stem not in stems and part == _DENSE and tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{_placed(checkpoint, name)} is {tensor.dtype}, and what is not packed as in "
                f"{form.name} must be dense: {OTHER}"
            )
    found = {stem: _weight(checkpoint, form, stem) for stem in sorted(stems)}
    if not found:
        ends = [form.joined(stem, form.blocks) for stem in form.stacked or [""]]
        raise CheckpointError(
            f"{checkpoint.config_name}, whose model_type is "
            f"{checkpoint.config.get('model_type')!r}, says that weights are {form.name}, but none "
            f"is packed, with a name that ends in {' or '.join(ends)}: {AGAIN}"
        )
    return found


def _is_packed(checkpoint: Checkpoint, form: Format, name: str) -> bool:
    """Return whether a tensor belongs to a packed matrix, or seems to."""
    stem, part = form.split(name)
    if form.stacked and stem.rpartition(".")[2] not in form.stacked:
        return False
    if part == form.blocks == _DENSE:  # where dense matrices have the same name
        return checkpoint.tensors[name].dtype not in FLOATS
    return part in (form.blocks, form.scales)


def _placed(checkpoint: Checkpoint, name: str) -> str:
    return f"{name} in {checkpoint.tensors[name].file}"


def _weight(checkpoint: Checkpoint, form: Format, stem: str) -> PackedWeight:
    names = form.joined(stem, form.blocks), form.joined(stem, form.scales)
    old = f"{stem}.{_OLD_SCALES}"
    if form is QUARK and old in checkpoint.tensors:
        raise CheckpointError(
            f"{_placed(checkpoint, old)} are scales with a name of Quark's older exports "
            f"instead of {names[1]}: export the original again with a current Quark"
        )
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
        if tensor.dtype != dtype or len(tensor.shape) != (3 if form.stacked else 2):
            one = "a matrix for each expert" if form.stacked else "a matrix"
            raise CheckpointError(
                f"{_placed(checkpoint, name)} is {tensor.dtype} {list(tensor.shape)}, and in "
                f"{form.name} {one} of {dtype}: {AGAIN}"
            )
    weight = PackedWeight(stem, form.dense_name(stem), blocks, scales, encoding)
    expected = (*blocks.shape[:-2], *encoding.scales_shape(weight.n, weight.k))
    if isinstance(encoding, Fp8) and scales.shape != expected:
        raise CheckpointError(
            f"{_placed(checkpoint, names[1])} is {list(scales.shape)}; for {form.blocks} "
            f"{list(blocks.shape)} and weight_block_size {list(encoding.rectangle)} FP8 has scales "
            f"{list(expected)}: {AGAIN}"
        )
    if not encoding.is_whole(weight.n, weight.k) or scales.shape != expected:
        size, rest = divmod(weight.k, scales.shape[-1]) if scales.shape[-1] else (0, 1)
        of = f", which is a scale for {size} values" if not rest and size != BLOCK else ""
        raise CheckpointError(
            f"{_placed(checkpoint, names[1])} is {list(scales.shape)}{of}; for "
            f"{form.blocks} {list(blocks.shape)} MXFP4 has a scale for {BLOCK} values, "
            f"{list(expected)}: {AGAIN}, or quantize it with groups of {BLOCK}"
        )
    return weight
