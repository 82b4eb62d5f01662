"""GPT-OSS checkpoints: what lies in their files, and whether that is a whole and consistent model.

Everything is told from the headers of the safetensors files, so that a checkpoint of any size is
checked before anything of it is loaded. Experts of a layer are *packed* (MXFP4: ``*_blocks`` and
``*_scales``) or *dense* ([E, K, N] in bfloat16, float16 or float32); a checkpoint may have both.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mxfp4_fx.checkpoints import foreign_tensors, gpt_oss
from mxfp4_fx.checkpoints.files import (
    AGAIN,
    CONFIG,
    INDEX,
    directory_of,
    few,
    read_config,
    require_safetensors,
    weight_files,
)
from mxfp4_fx.checkpoints.gpt_oss import ITS_CONFIG, Axes, Form
from mxfp4_fx.checkpoints.safetensors_file import StoredTensor, read_header
from mxfp4_fx.core.errors import CheckpointError, CheckpointWarning, NanWeightsWarning
from mxfp4_fx.core.formats import BLOCK, E8M0_NAN
from mxfp4_fx.core.skip import Skip, not_converted, whole_name

_FROM_ONE = "copy or download all files from one and the same checkpoint"
_SHOWN = 4  # faults that a message lists


class Checkpoint:
    """The tensors and the config of a GPT-OSS checkpoint, of which headers only have been read.

    Attributes:
        config: the content of ``config.json``.
        files: its safetensors files.
        tensors: name -> where the tensor lies; ``tensors[name].read(expert)`` maps it into memory.
        prefix: what tensors of the base model begin with: "model.", or "" if it was saved alone.
        forms: layer -> whether its experts are packed or dense, for each layer that has experts.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        config: Mapping[str, Any],
        rename: Callable[[str], str] = str,
    ) -> None:
        """Read the headers of `files`, which may lie anywhere; `config` is as in ``config.json``.

        Args:
            files: safetensors files.
            config: the content of ``config.json``.
            rename: a name in the files -> the name that this tensor is to have.

        Raises:
            CheckpointError: there are no files, one is no safetensors file or a damaged one, or two
                have a tensor of the same name.
        """
        self.config = config
        self._config_name = "the config"
        self.files = [Path(file) for file in files]
        if not self.files:
            raise CheckpointError("there are no weights: name the checkpoint's safetensors files")
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            require_safetensors(file)
            for stored, tensor in read_header(file).items():
                name = rename(stored)
                if name in self.tensors:
                    raise CheckpointError(_twice(self.tensors[name], tensor))
                self.tensors[name] = tensor
        is_prefixed = any(name.startswith("model.") for name in self.tensors)
        self.prefix = "model." if is_prefixed else ""
        self.forms = self._forms()

    @classmethod
    def open(cls, path: str | os.PathLike[str], rename: Callable[[str], str] = str) -> Checkpoint:
        """Read the config and the headers of a checkpoint directory.

        Raises:
            CheckpointError: it has no ``config.json`` or no safetensors weights, or a file is
                damaged.
        Warns:
            CheckpointWarning: the index of its shards disagrees with them.
        """
        directory = directory_of(path)
        config = read_config(directory)
        files, weight_map = weight_files(directory)
        found = cls(files, config, rename)
        found._config_name = str(directory / CONFIG)
        places = {tensor.name: tensor.file.name for tensor in found.tensors.values()}
        names = {**weight_map, **places} if weight_map else {}
        if wrong := [name for name in names if places.get(name) != weight_map.get(name)]:
            warnings.warn(
                f"{directory / INDEX} is not that of these shards: {few(wrong)} "
                "is not where it says, or not in it; what lies in the shards counts",
                CheckpointWarning,
                stacklevel=2,
            )
        return found

    def experts(self, layer: int) -> str:
        """The module of a layer's experts: "model.layers.0.mlp.experts"."""
        return f"{self.prefix}layers.{layer}.mlp.experts"

    def matching(self, entry: str) -> set[int]:
        """Layers whose experts an entry of ``modules_to_not_convert`` names.

        The experts of a base model also have the name that they have in the whole one.

        Raises:
            CheckpointError: the entry is no regular expression.
        """
        return {
            layer
            for layer in self.forms
            for name in {self.experts(layer), whole_name(self.experts(layer))}
            if not_converted(entry, name)
        }

    def skipped(self, skip: Skip) -> set[int]:
        """Layers whose experts a user wants to stay dense.

        Raises:
            OptionError: a pattern names none.
        """
        experts = {layer: self.experts(layer) for layer in self.forms}
        skip.require_used(list(experts.values()))
        return {layer for layer, name in experts.items() if skip.names(name)}

    def nan_blocks(self) -> dict[str, int]:
        """Names of ``*_scales`` tensors -> how many of their bytes are 255, which stands for NaN.

        Only tensors that have such blocks are named. All scales are read, an expert at a time.
        """
        counts = {}
        for name, tensor in self.tensors.items():
            if name.endswith("_scales") and tensor.shape:
                experts = (tensor.read(i) for i in range(tensor.shape[0]))
                if count := sum(int((expert == E8M0_NAN).sum()) for expert in experts):
                    counts[name] = count
        return counts

    # ---- whether it is whole and consistent -----------------------------------------------------

    def check(self, *, ignore_sizes: bool = False) -> None:
        """Compare the tensors with the config, from headers alone.

        Experts must be packed where the config says ``quant_method: mxfp4`` and its
        ``modules_to_not_convert`` does not name them, and dense elsewhere. So the input of a
        quantization is checked with a config that has no ``quantization_config``.

        Args:
            ignore_sizes: let tensors that are not the experts' have any shape.

        Raises:
            CheckpointError: a tensor is missing, or of a wrong shape or dtype, or the config says
                that it is not there; blocks lack scales, or scales blocks; the config's sizes or
                its quantization are not those of the tensors. The message names the tensors and
                says what would help.
        """
        self._check_pairs()
        sizes = gpt_oss.sizes(self.config, self._config_name)
        self._check_layers(sizes[gpt_oss.LAYERS])
        self._check_forms(sizes)
        expected = self._expected()
        self._check_names(expected)
        if ignore_sizes:
            expected = {name: axes for name, axes in expected.items() if ".mlp.experts." in name}
        self._check_sizes(expected, sizes)
        self._check_tensors(expected, sizes)

    def strays(self) -> list[str]:
        """Tensors that the model does not have, though their names are such as its own have."""
        expected = self._expected()
        return [name for name in self.tensors if name not in expected and self._is_ours(name)]

    def _expected(self) -> dict[str, Axes]:
        layers = self.config[gpt_oss.LAYERS]
        method, _ = self.quantization()
        missing: Form = "packed" if method else "dense"
        forms = {layer: self.forms.get(layer, missing) for layer in range(layers)}
        biases = bool(self.config.get("attention_bias", True))
        head = "lm_head.weight" in self.tensors or self._needs_head()
        return gpt_oss.tensors(self.prefix, forms, biases, head)

    def _is_ours(self, name: str) -> bool:
        # What else there may be belongs to another head: score.weight, for example.
        ours = (self.prefix,) if self.prefix else ("layers.", "embed_tokens.", "norm.")
        return name.startswith((*ours, "lm_head.")) or foreign_tensors.is_an_adapters(name)

    def _layers(self) -> dict[int, list[str]]:
        layers = defaultdict(list)
        for name in self.tensors:
            if found := re.match(rf"{self.prefix}layers\.(\d+)\.", name):
                layers[int(found[1])].append(name)
        return layers

    def _forms(self) -> dict[int, Form]:
        forms: dict[int, Form] = {}
        for layer, names in sorted(self._layers().items()):
            own = {name.removeprefix(f"{self.experts(layer)}.") for name in names}
            if own & {f"{p}_{part}" for p in gpt_oss.PROJECTIONS for part in ("blocks", "scales")}:
                forms[layer] = "packed"
            elif own & set(gpt_oss.PROJECTIONS):
                forms[layer] = "dense"
        return forms

    def quantization(self) -> tuple[str | None, list[str]]:
        """The config's ``quant_method``, None if it has none, and ``modules_to_not_convert``."""
        return gpt_oss.quantization(self.config, self._config_name)

    def _needs_head(self) -> bool:
        if not self.prefix or self.config.get("tie_word_embeddings"):
            return False
        classes = self.config.get("architectures") or ["GptOssForCausalLM"]
        return any(name.endswith("ForCausalLM") for name in classes)

    def _check_pairs(self) -> None:
        for name, tensor in self.tensors.items():
            stem, _, part = name.rpartition("_")
            other = {"blocks": "scales", "scales": "blocks"}.get(part)
            if not (other and stem.endswith(gpt_oss.PROJECTIONS)):
                continue
            if f"{stem}_{other}" not in self.tensors and tensor.dtype in gpt_oss.FLOATS:
                # So does transformers 5.23 save a model that it has dequantized.
                raise CheckpointError(
                    f"{name} in {tensor.file} is no MXFP4, but dense experts under its name: save "
                    "the model again with save_pretrained(directory, save_original_format=False)"
                )
            if f"{stem}_{other}" not in self.tensors:
                raise CheckpointError(f"{name} in {tensor.file} has no {other}: {AGAIN}")

    def _check_layers(self, count: int) -> None:
        if (found := self._layers()) and (actual := max(found) + 1) != count:
            raise CheckpointError(
                f"{self._config_name} says that {gpt_oss.LAYERS} is {count}, but the tensors are "
                f"those of {actual}: {ITS_CONFIG}, or copy the shards that are missing"
            )

    def _check_forms(self, sizes: Mapping[str, int]) -> None:
        method, patterns = self.quantization()
        gpt_oss.require_method(method, self._config_name)
        skipped = {layer for pattern in patterns for layer in self.matching(pattern)}
        packed = {layer for layer, form in self.forms.items() if form == "packed"}
        dense = self.forms.keys() - packed
        if packed and not method:
            raise CheckpointError(
                f"{self._names(packed)} packed, but {self._config_name} does not say that "
                f"quant_method is mxfp4: {ITS_CONFIG}"
            )
        if packed & skipped:
            raise CheckpointError(
                f"{self._names(packed & skipped)} packed, but modules_to_not_convert in "
                f"{self._config_name} says otherwise: {ITS_CONFIG}"
            )
        if method and dense - skipped:
            raise CheckpointError(
                f"{self._names(dense - skipped)} dense, but {self._config_name} says that "
                "quant_method is mxfp4: pack them with python -m mxfp4_fx quantize, or "
                f"{ITS_CONFIG}"
            )
        for key in gpt_oss.MULTIPLES_OF_BLOCK:
            if packed and sizes[key] % BLOCK:
                raise CheckpointError(
                    f"{self._config_name} says that {key} is {sizes[key]}, but MXFP4 needs a "
                    f"multiple of {BLOCK}: {ITS_CONFIG}"
                )

    def _names(self, layers: Iterable[int]) -> str:
        names = [self.experts(layer) for layer in sorted(layers)]
        return f"{few(names)} {'is' if len(names) == 1 else 'are'}"

    def _check_names(self, expected: Mapping[str, Axes]) -> None:
        if missing := [name for name in expected if name not in self.tensors]:
            files = few([file.name for file in self.files])
            raise CheckpointError(
                f"{len(missing)} of {len(expected)} tensors are not in {files}: {few(missing)}; "
                f"{foreign_tensors.diagnosis(self.tensors, missing) or AGAIN}"
            )
        strays = self.strays()
        if wrong := [name for name in strays if foreign_tensors.contradicts(name, self.prefix)]:
            is_twice = ".mlp.experts." in wrong[0]  # packed and dense
            raise CheckpointError(
                f"{len(wrong)} tensors are none of the model that {self._config_name} describes: "
                f"{few(wrong)} in {self.tensors[wrong[0]].file}; "
                f"{_FROM_ONE if is_twice else ITS_CONFIG}"
            )

    def _check_sizes(self, expected: Mapping[str, Axes], sizes: Mapping[str, int]) -> None:
        """Is it the config that is wrong? Then all tensors agree on another size than it has."""
        found: dict[str, dict[int, StoredTensor]] = defaultdict(dict)
        for name, axes in expected.items():
            tensor = self.tensors[name]
            if len(axes) == len(tensor.shape):
                for axis, size in zip(axes, tensor.shape, strict=True):
                    found[axis].setdefault(size, tensor)
        wrong = []
        for axis, tensors in found.items():
            said, (size, tensor) = gpt_oss.size(axis, sizes), next(iter(tensors.items()))
            if len(tensors) == 1 and size != said:
                shown = f"{tensor.name} is {list(tensor.shape)}"
                wrong.append(f"{axis} is {said}, but {size} in the tensors ({shown})")
        if wrong:
            raise CheckpointError(
                f"{self._config_name} says that {'; '.join(wrong[:_SHOWN])}: {ITS_CONFIG}"
            )

    def _check_tensors(self, expected: Mapping[str, Axes], sizes: Mapping[str, int]) -> None:
        for name, axes in expected.items():
            tensor = self.tensors[name]
            shape = [gpt_oss.size(axis, sizes) for axis in axes]
            if list(tensor.shape) != shape:
                is_turned = len(shape) == 3 and list(tensor.shape) == [shape[0], *shape[:0:-1]]
                raise CheckpointError(
                    f"{name} in {tensor.file} has shape {list(tensor.shape)} and should have "
                    f"{shape}: {'transpose it' if is_turned else _FROM_ONE}"
                )
            if tensor.dtype not in (dtypes := gpt_oss.dtypes(name)):
                wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise CheckpointError(
                    f"{name} in {tensor.file} is {str(tensor.dtype).removeprefix('torch.')}: "
                    f"save it in one of {wanted}"
                )


def _twice(first: StoredTensor, second: StoredTensor) -> str:
    if first.name != second.name:
        return f"key_mapping gives {first.name} and {second.name} one and the same name"
    return (
        f"{first.name} lies both in {first.file} and in {second.file}: remove the file that "
        "belongs to another checkpoint"
    )


def warn_of_strays(checkpoint: Checkpoint) -> None:
    """Warn of tensors that are left out when a checkpoint that was checked is loaded."""
    if strays := checkpoint.strays():
        warnings.warn(
            f"{len(strays)} tensors are none of GPT-OSS's: {few(strays)} in "
            f"{checkpoint.tensors[strays[0]].file}; {foreign_tensors.described(strays)}",
            CheckpointWarning,
            stacklevel=3,
        )


def warn_of_nan_blocks(counts: Mapping[str, int]) -> None:
    """Warn once of what `Checkpoint.nan_blocks` counted, if that is anything."""
    if counts:
        named = few([f"{name} ({count})" for name, count in counts.items()])
        warnings.warn(
            f"{sum(counts.values())} MXFP4 blocks are NaN (scale byte {E8M0_NAN}), in {named}: "
            "tokens that are routed to these experts become NaN; if the original is finite, "
            "quantize or download it again",
            NanWeightsWarning,
            stacklevel=3,
        )
