"""The consistency of a checkpoint: whether its tensors are those that its config describes.

Only headers are compared, so that a fault raises an error before any weight is read.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping

from mxfp4_fx.checkpoints import foreign_tensors, gpt_oss
from mxfp4_fx.checkpoints.checkpoint import Checkpoint
from mxfp4_fx.checkpoints.files import AGAIN, few
from mxfp4_fx.checkpoints.gpt_oss import ITS_CONFIG, Axes, Form
from mxfp4_fx.checkpoints.safetensors_file import StoredTensor
from mxfp4_fx.core.errors import CheckpointError, CheckpointWarning
from mxfp4_fx.core.formats import BLOCK

_FROM_ONE = "copy or download all files from one and the same checkpoint"
_SHOWN = 4  # faults that a message lists


def check(checkpoint: Checkpoint, *, ignore_sizes: bool = False) -> None:
    """Raise an error unless the tensors are those that the config describes.

    The experts of a layer must be packed if the config says ``quant_method: mxfp4`` and its
    ``modules_to_not_convert`` does not name them; otherwise they must be dense. The input of a
    quantization is dense whatever its config says, so check it with a config that has no
    ``quantization_config``.

    Args:
        checkpoint: what to check.
        ignore_sizes: accept any shape of the tensors that are not the experts'.

    Raises:
        CheckpointError: a tensor is missing, has a wrong shape or dtype, or contradicts the config;
            blocks lack scales, or scales lack blocks; the config's sizes or its quantization are
            not those of the tensors. The message names the tensors and a remedy.
    """
    _check_pairs(checkpoint)
    sizes = gpt_oss.sizes(checkpoint.config, checkpoint.config_name)
    _check_layers(checkpoint, sizes[gpt_oss.LAYERS])
    _check_forms(checkpoint, sizes)
    expected = _expected(checkpoint)
    _check_names(checkpoint, expected)
    if ignore_sizes:
        expected = {name: axes for name, axes in expected.items() if ".mlp.experts." in name}
    _check_sizes(checkpoint, expected, sizes)
    _check_tensors(checkpoint, expected, sizes)


def strays(checkpoint: Checkpoint) -> list[str]:
    """Return the names of tensors that the model does not have, though they look like its own.

    These are names of the base model, of the language model's head and of adapters. Other heads,
    such as ``score.weight``, do not count.
    """
    expected = _expected(checkpoint)
    return [
        name
        for name in checkpoint.tensors
        if name not in expected and _is_ours(name, checkpoint.prefix)
    ]


def warn_of_strays(checkpoint: Checkpoint) -> None:
    """Warn of the tensors of a checked checkpoint that the loader leaves out."""
    if found := strays(checkpoint):
        warnings.warn(
            f"{len(found)} tensors do not belong to GPT-OSS: {few(found)} in "
            f"{checkpoint.tensors[found[0]].file}; {foreign_tensors.described(found)}",
            CheckpointWarning,
            stacklevel=3,
        )


def _expected(checkpoint: Checkpoint) -> dict[str, Axes]:
    """Return name -> axes of every tensor that the config asks for."""
    layers = checkpoint.config[gpt_oss.LAYERS]
    method, _ = checkpoint.quantization()
    missing: Form = "packed" if method else "dense"
    forms = {layer: checkpoint.forms.get(layer, missing) for layer in range(layers)}
    biases = bool(checkpoint.config.get("attention_bias", True))
    head = "lm_head.weight" in checkpoint.tensors or _needs_head(checkpoint)
    return gpt_oss.tensors(checkpoint.prefix, forms, biases, head)


def _needs_head(checkpoint: Checkpoint) -> bool:
    if not checkpoint.prefix or checkpoint.config.get("tie_word_embeddings"):
        return False
    classes = checkpoint.config.get("architectures") or ["GptOssForCausalLM"]
    return any(name.endswith("ForCausalLM") for name in classes)


def _is_ours(name: str, prefix: str) -> bool:
    # A tensor of any other name belongs to another head: score.weight, for example.
    ours = (prefix,) if prefix else ("layers.", "embed_tokens.", "norm.")
    return name.startswith((*ours, "lm_head.")) or foreign_tensors.is_an_adapters(name)


def _check_pairs(checkpoint: Checkpoint) -> None:
    for name, tensor in checkpoint.tensors.items():
        stem, _, part = name.rpartition("_")
        other = {"blocks": "scales", "scales": "blocks"}.get(part)
        if not (other and stem.endswith(gpt_oss.PROJECTIONS)):
            continue
        if f"{stem}_{other}" not in checkpoint.tensors and tensor.dtype in gpt_oss.FLOATS:
            # transformers 5.23 saves a model that it has dequantized in this way.
            raise CheckpointError(
                f"{name} in {tensor.file} holds dense experts under an MXFP4 name: save the model "
                "again with save_pretrained(directory, save_original_format=False)"
            )
        if f"{stem}_{other}" not in checkpoint.tensors:
            raise CheckpointError(f"{name} in {tensor.file} has no {other}: {AGAIN}")


def _check_layers(checkpoint: Checkpoint, count: int) -> None:
    if (found := checkpoint.layers()) and (actual := max(found) + 1) != count:
        raise CheckpointError(
            f"{checkpoint.config_name} says that {gpt_oss.LAYERS} is {count}, but the tensors are "
            f"those of {actual}: {ITS_CONFIG}, or copy the shards that are missing"
        )


def _check_forms(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    method, patterns = checkpoint.quantization()
    gpt_oss.require_method(method, checkpoint.config_name)
    skipped = {layer for pattern in patterns for layer in checkpoint.matching(pattern)}
    packed = {layer for layer, form in checkpoint.forms.items() if form == "packed"}
    dense = checkpoint.forms.keys() - packed
    if packed and not method:
        raise CheckpointError(
            f"{_names(checkpoint, packed)} packed, but {checkpoint.config_name} does not say that "
            f"quant_method is mxfp4: {ITS_CONFIG}"
        )
    if packed & skipped:
        raise CheckpointError(
            f"{_names(checkpoint, packed & skipped)} packed, but modules_to_not_convert in "
            f"{checkpoint.config_name} says otherwise: {ITS_CONFIG}"
        )
    if method and dense - skipped:
        raise CheckpointError(
            f"{_names(checkpoint, dense - skipped)} dense, but {checkpoint.config_name} says that "
            "quant_method is mxfp4: pack them with python -m mxfp4_fx quantize, or "
            f"{ITS_CONFIG}"
        )
    for key in gpt_oss.MULTIPLES_OF_BLOCK:
        if packed and sizes[key] % BLOCK:
            raise CheckpointError(
                f"{checkpoint.config_name} says that {key} is {sizes[key]}, but MXFP4 needs a "
                f"multiple of {BLOCK}: {ITS_CONFIG}"
            )


def _names(checkpoint: Checkpoint, layers: Iterable[int]) -> str:
    names = [checkpoint.experts(layer) for layer in sorted(layers)]
    return f"{few(names)} {'is' if len(names) == 1 else 'are'}"


def _check_names(checkpoint: Checkpoint, expected: Mapping[str, Axes]) -> None:
    tensors = checkpoint.tensors
    if missing := [name for name in expected if name not in tensors]:
        files = few([file.name for file in checkpoint.files])
        raise CheckpointError(
            f"{len(missing)} of {len(expected)} tensors are not in {files}: {few(missing)}; "
            f"{foreign_tensors.diagnosis(tensors, missing) or AGAIN}"
        )
    found = strays(checkpoint)
    if wrong := [name for name in found if foreign_tensors.contradicts(name, checkpoint.prefix)]:
        is_twice = ".mlp.experts." in wrong[0]  # packed and dense
        raise CheckpointError(
            f"{len(wrong)} tensors do not belong to the model that {checkpoint.config_name} "
            f"describes: {few(wrong)} in {tensors[wrong[0]].file}; "
            f"{_FROM_ONE if is_twice else ITS_CONFIG}"
        )


def _check_sizes(
    checkpoint: Checkpoint, expected: Mapping[str, Axes], sizes: Mapping[str, int]
) -> None:
    """Raise an error if the config is wrong: all tensors agree on a size that it does not have."""
    found: dict[str, dict[int, StoredTensor]] = defaultdict(dict)
    for name, axes in expected.items():
        tensor = checkpoint.tensors[name]
        if len(axes) == len(tensor.shape):
            for axis, size in zip(axes, tensor.shape, strict=True):
                found[axis].setdefault(size, tensor)
    wrong = []
    for axis, tensors in found.items():
        configured, (size, tensor) = gpt_oss.size(axis, sizes), next(iter(tensors.items()))
        if len(tensors) == 1 and size != configured:
            shown = f"{tensor.name} is {list(tensor.shape)}"
            wrong.append(f"{axis} is {configured}, but {size} in the tensors ({shown})")
    if wrong:
        raise CheckpointError(
            f"{checkpoint.config_name} says that {'; '.join(wrong[:_SHOWN])}: {ITS_CONFIG}"
        )


def _check_tensors(
    checkpoint: Checkpoint, expected: Mapping[str, Axes], sizes: Mapping[str, int]
) -> None:
    for name, axes in expected.items():
        tensor = checkpoint.tensors[name]
        shape = [gpt_oss.size(axis, sizes) for axis in axes]
        if list(tensor.shape) != shape:
            is_transposed = len(shape) == 3 and list(tensor.shape) == [shape[0], *shape[:0:-1]]
            raise CheckpointError(
                f"{name} in {tensor.file} has shape {list(tensor.shape)} and should have "
                f"{shape}: {'transpose it' if is_transposed else _FROM_ONE}"
            )
        if tensor.dtype not in (dtypes := gpt_oss.dtypes(name)):
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(
                f"{name} in {tensor.file} is {str(tensor.dtype).removeprefix('torch.')}: "
                f"save it in one of {wanted}"
            )
