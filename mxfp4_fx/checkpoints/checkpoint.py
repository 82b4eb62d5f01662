"""`Checkpoint`: the tensors and the config of a GPT-OSS checkpoint.

Opening one reads only the headers of its files; `consistency.py` compares these with the config.
The experts of a layer are *packed* (MXFP4: ``*_blocks`` and ``*_scales``) or *dense* ([E, K, N] in
bfloat16, float16 or float32). One checkpoint may have both.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mxfp4_fx.checkpoints import gpt_oss
from mxfp4_fx.checkpoints.files import (
    CONFIG,
    INDEX,
    directory_of,
    few,
    read_config,
    require_safetensors,
    weight_files,
)
from mxfp4_fx.checkpoints.gpt_oss import Form
from mxfp4_fx.checkpoints.safetensors_file import StoredTensor, read_header
from mxfp4_fx.core.errors import CheckpointError, CheckpointWarning, NanWeightsWarning
from mxfp4_fx.core.formats import E8M0_NAN, count_nan
from mxfp4_fx.core.skip import Skip, not_converted, whole_name


class Checkpoint:
    """The tensors and the config of a GPT-OSS checkpoint, as its headers describe them.

    Attributes:
        config: the content of ``config.json``.
        config_name: what messages call the config: the path of its file, or "the config".
        files: the safetensors files.
        tensors: name -> file, offset, dtype and shape of the tensor; ``tensors[name].read(expert)``
            maps an expert into memory.
        prefix: the prefix of the base model's tensors: "model.", or "" if it was saved alone.
        forms: layer -> "packed" or "dense", for each layer that has experts.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        config: Mapping[str, Any],
        rename: Callable[[str], str] = str,
    ) -> None:
        """Read the headers of `files`.

        Args:
            files: safetensors files, in any directory.
            config: the content of ``config.json``.
            rename: maps a name in the files to the tensor's name in `tensors`.

        Raises:
            CheckpointError: there are no files, a file is damaged or not in the safetensors format,
                or two tensors have the same name.
        """
        self.config = config
        self.config_name = "the config"
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
            CheckpointError: the directory has no ``config.json`` or no safetensors weights, or a
                file is damaged.
        Warns:
            CheckpointWarning: the index disagrees with the shards.
        """
        directory = directory_of(path)
        config = read_config(directory)
        files, weight_map = weight_files(directory)
        found = cls(files, config, rename)
        found.config_name = str(directory / CONFIG)
        places = {tensor.name: tensor.file.name for tensor in found.tensors.values()}
        names = {**weight_map, **places} if weight_map else {}
        if wrong := [name for name in names if places.get(name) != weight_map.get(name)]:
            warnings.warn(
                f"{directory / INDEX} does not match the shards: {few(wrong)} "
                "is in another shard than the index says, or missing from one of the two; "
                "the tensors are read from the shards as they are",
                CheckpointWarning,
                stacklevel=2,
            )
        return found

    def quantization(self) -> tuple[str | None, list[str]]:
        """Return the config's ``quant_method`` (or None) and its ``modules_to_not_convert``.

        Raises:
            CheckpointError: they have wrong types.
        """
        return gpt_oss.quantization(self.config, self.config_name)

    def layers(self) -> dict[int, list[str]]:
        """Return layer -> names of its tensors, for each layer that has tensors."""
        layers = defaultdict(list)
        for name in self.tensors:
            if found := re.match(rf"{self.prefix}layers\.(\d+)\.", name):
                layers[int(found[1])].append(name)
        return layers

    def experts(self, layer: int) -> str:
        """Return the name of a layer's experts: "model.layers.0.mlp.experts"."""
        return f"{self.prefix}layers.{layer}.mlp.experts"

    def matching(self, entry: str) -> set[int]:
        """Return the layers whose experts an entry of ``modules_to_not_convert`` names.

        In a base model that was saved alone, an entry may name the experts with "model." or
        without.

        Raises:
            CheckpointError: the entry is not a regular expression.
        """
        return {
            layer
            for layer in self.forms
            for name in {self.experts(layer), whole_name(self.experts(layer))}
            if not_converted(entry, name)
        }

    def skipped(self, skip: Skip) -> set[int]:
        """Return the layers whose experts `skip` names.

        Raises:
            OptionError: a pattern of `skip` names no experts.
        """
        experts = {layer: self.experts(layer) for layer in self.forms}
        skip.require_used(list(experts.values()))
        return {layer for layer, name in experts.items() if skip.names(name)}

    def nan_blocks(self, is_stopped: Callable[[], bool] = lambda: False) -> dict[str, int]:
        """Return name -> number of NaN bytes (255), for each ``*_scales`` tensor that has any.

        This reads all scales, some megabytes at a time.

        Args:
            is_stopped: asked before each read whether to stop, and return what is found so far.
        """
        counts: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            for chunk in tensor.chunks() if name.endswith("_scales") else ():
                if is_stopped():
                    return counts
                if count := count_nan(torch.frombuffer(chunk, dtype=torch.uint8)):
                    counts[name] = counts.get(name, 0) + count
        return counts

    def _forms(self) -> dict[int, Form]:
        forms: dict[int, Form] = {}
        for layer, names in sorted(self.layers().items()):
            own = {name.removeprefix(f"{self.experts(layer)}.") for name in names}
            if own & {f"{p}_{part}" for p in gpt_oss.PROJECTIONS for part in ("blocks", "scales")}:
                forms[layer] = "packed"
            elif own & set(gpt_oss.PROJECTIONS):
                forms[layer] = "dense"
        return forms


def _twice(first: StoredTensor, second: StoredTensor) -> str:
    if first.name != second.name:
        return f"key_mapping gives {first.name} and {second.name} one and the same name"
    return (
        f"{first.name} lies both in {first.file} and in {second.file}: remove the file that "
        "belongs to another checkpoint"
    )


def warn_of_nan_blocks(counts: Mapping[str, int]) -> None:
    """Give one warning for all blocks that `Checkpoint.nan_blocks` counted, if there are any."""
    if counts:
        named = few([f"{name} ({count})" for name, count in counts.items()])
        warnings.warn(
            f"{sum(counts.values())} MXFP4 blocks are NaN (scale byte {E8M0_NAN}), in {named}: "
            "tokens that are routed to these experts become NaN; if the original is finite, "
            "quantize or download it again",
            NanWeightsWarning,
            stacklevel=3,
        )
