"""GPT-OSS checkpoints: what lies in their files, and whether that is a whole and consistent model.

Everything is told from the headers of the safetensors files, so that a checkpoint of any size is
checked before anything of it is loaded. Experts of a layer are *packed* (MXFP4: ``*_blocks`` and
``*_scales``) or *dense* ([E, K, N] in bfloat16, float16 or float32); a checkpoint may have both.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mxfp4_fx import gpt_oss
from mxfp4_fx.errors import CheckpointError, NanWeightsWarning
from mxfp4_fx.formats import BLOCK, E8M0_NAN
from mxfp4_fx.gpt_oss import Axes, Form
from mxfp4_fx.safetensors_file import StoredTensor, read_header

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_AGAIN = "copy or download the checkpoint again"
_ITS_CONFIG = f"use the {CONFIG} that belongs to these weights"
_SHOWN = 4  # names that a message lists


class Checkpoint:
    """The tensors and the config of a GPT-OSS checkpoint, of which headers only have been read.

    Attributes:
        config: the content of ``config.json``.
        files: its safetensors files.
        tensors: name -> where the tensor lies; ``tensors[name].read(expert)`` maps it into memory.
        prefix: what tensors of the base model begin with: "model.", or "" if it was saved alone.
        forms: layer -> whether its experts are packed or dense, for each layer that has experts.
    """

    def __init__(self, files: Sequence[str | Path], config: Mapping[str, Any]) -> None:
        """Read the headers of `files`, which may lie anywhere; `config` is as in ``config.json``.

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
            _require_safetensors(file)
            for name, tensor in read_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{name} lies both in {self.tensors[name].file} and in {file}: remove the "
                        "file that belongs to another checkpoint"
                    )
                self.tensors[name] = tensor
        is_prefixed = any(name.startswith("model.") for name in self.tensors)
        self.prefix = "model." if is_prefixed else ""
        self.forms = self._forms()

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the config and the headers of a checkpoint directory.

        Raises:
            CheckpointError: it has no ``config.json`` or no safetensors weights, a file is damaged,
                or the index of its shards disagrees with them.
        """
        path = Path(path).expanduser()
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {what}: name a checkpoint's directory on this machine")
        if not (path / CONFIG).is_file():
            raise CheckpointError(
                f"{path} has no {CONFIG}: name a checkpoint's directory, or {_AGAIN}"
            )
        config = _read_json(path / CONFIG)
        if (path / WEIGHTS).is_file():  # which transformers prefers, too
            found = cls([path / WEIGHTS], config)
        elif (path / INDEX).is_file():
            found = cls._open_shards(path / INDEX, config)
        else:
            raise _no_weights(path)
        found._config_name = str(path / CONFIG)
        return found

    @classmethod
    def _open_shards(cls, index: Path, config: Mapping[str, Any]) -> Checkpoint:
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map: {_AGAIN}")
        files = list(dict.fromkeys(map(str, weight_map.values())))
        if elsewhere := [file for file in files if Path(file).name != file]:
            raise CheckpointError(f"{index} names {elsewhere[0]!r}, no file beside it: {_AGAIN}")
        if absent := [file for file in files if not (index.parent / file).is_file()]:
            raise CheckpointError(
                f"{index} names {_few(absent)}, which is not there: copy or download it as well"
            )
        found = cls([index.parent / file for file in files], config)
        for name in {**weight_map, **found.tensors}:
            says = f"says {weight_map[name]}" if name in weight_map else "does not name it"
            if name not in found.tensors:
                raise CheckpointError(f"{name} is in no shard, but {index} {says}: {_AGAIN}")
            if (file := found.tensors[name].file).name != weight_map.get(name):
                raise CheckpointError(f"{name} is in {file}, but {index} {says}: {_AGAIN}")
        return found

    def experts(self, layer: int) -> str:
        """The module of a layer's experts: "model.layers.0.mlp.experts"."""
        return f"{self.prefix}layers.{layer}.mlp.experts"

    def matching(self, pattern: str) -> set[int]:
        """Layers whose experts an entry of ``modules_to_not_convert`` names.

        An entry is the end of a module's name, or a regular expression for its beginning up to a
        dot, as in transformers. The experts of a base model also have the name that they have in
        the whole one.

        Raises:
            CheckpointError: the entry is no regular expression.
        """
        try:
            expression = re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))")
        except re.error as error:
            raise CheckpointError(
                f"{pattern!r} is no regular expression ({error}): name a module, for example "
                f"{self.experts(0)}"
            ) from error
        found = set()
        for layer in self.forms:
            for name in {self.experts(layer), f"model.layers.{layer}.mlp.experts"}:
                if name.endswith(pattern) or expression.match(name):
                    found.add(layer)
        return found

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

    def check(self) -> None:
        """Compare the tensors with the config, from headers alone.

        Experts must be packed where the config says ``quant_method: mxfp4`` and its
        ``modules_to_not_convert`` does not name them, and dense elsewhere. So the input of a
        quantization is checked with a config that has no ``quantization_config``.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of a wrong shape or dtype; blocks lack
                scales, or scales blocks; the config's sizes or its quantization are not those of
                the tensors. The message names the tensors and says what would help.
        """
        self._check_pairs()
        sizes = self._sizes()
        self._check_layers(sizes[gpt_oss.LAYERS])
        self._check_forms(sizes)
        forms = self._expected_forms(sizes[gpt_oss.LAYERS])
        biases = bool(self.config.get("attention_bias", True))
        head = "lm_head.weight" in self.tensors or self._needs_head()
        expected = gpt_oss.tensors(self.prefix, forms, biases, head)
        self._check_names(expected)
        self._check_sizes(expected, sizes)
        self._check_tensors(expected, sizes)

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

    def _sizes(self) -> dict[str, int]:
        if (kind := self.config.get("model_type")) != "gpt_oss":
            raise CheckpointError(
                f"{self._config_name} says that model_type is {kind!r}: name a checkpoint of "
                "GPT-OSS, where it is 'gpt_oss'"
            )
        for key in gpt_oss.KEYS:
            size = self.config.get(key)
            if type(size) is not int or size < 1:
                what = f"says that {key} is {size!r}" if key in self.config else f"has no {key}"
                raise CheckpointError(f"{self._config_name} {what}: {_ITS_CONFIG}")
        return {key: self.config[key] for key in gpt_oss.KEYS}

    def quantization(self) -> tuple[str | None, list[str]]:
        """The config's ``quant_method``, None if it has none, and ``modules_to_not_convert``."""
        settings = self.config.get("quantization_config") or {}
        if not isinstance(settings, Mapping):
            raise CheckpointError(f"quantization_config is {settings!r} in {CONFIG}, not an object")
        method = settings.get("quant_method")
        modules = settings.get("modules_to_not_convert") or []
        if not isinstance(modules, list | tuple) or not all(isinstance(m, str) for m in modules):
            raise CheckpointError(f"modules_to_not_convert is {modules!r}, not a list of names")
        return getattr(method, "value", method), list(modules)

    def _expected_forms(self, layers: int) -> dict[int, Form]:
        method, _ = self.quantization()
        missing: Form = "packed" if method else "dense"
        return {layer: self.forms.get(layer, missing) for layer in range(layers)}

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
                raise CheckpointError(f"{name} in {tensor.file} has no {other}: {_AGAIN}")

    def _check_layers(self, count: int) -> None:
        if (found := self._layers()) and (actual := max(found) + 1) != count:
            raise CheckpointError(
                f"{self._config_name} says that {gpt_oss.LAYERS} is {count}, but the tensors are "
                f"those of {actual}: {_ITS_CONFIG}, or copy the shards that are missing"
            )

    def _check_forms(self, sizes: Mapping[str, int]) -> None:
        method, patterns = self.quantization()
        if method not in (None, "mxfp4"):
            raise CheckpointError(
                f"{self._config_name} says that quant_method is {method!r}: name a checkpoint in "
                "mxfp4, or one that is not quantized"
            )
        skipped = {layer for pattern in patterns for layer in self.matching(pattern)}
        packed = {layer for layer, form in self.forms.items() if form == "packed"}
        dense = self.forms.keys() - packed
        if packed and not method:
            raise CheckpointError(
                f"{self._names(packed)} packed, but {self._config_name} does not say that "
                f"quant_method is mxfp4: {_ITS_CONFIG}"
            )
        if packed & skipped:
            raise CheckpointError(
                f"{self._names(packed & skipped)} packed, but modules_to_not_convert in "
                f"{self._config_name} says otherwise: {_ITS_CONFIG}"
            )
        if method and dense - skipped:
            raise CheckpointError(
                f"{self._names(dense - skipped)} dense, but {self._config_name} says that "
                "quant_method is mxfp4: pack them with python -m mxfp4_fx quantize, or "
                f"{_ITS_CONFIG}"
            )
        for key in gpt_oss.MULTIPLES_OF_BLOCK:
            if packed and sizes[key] % BLOCK:
                raise CheckpointError(
                    f"{self._config_name} says that {key} is {sizes[key]}, but MXFP4 needs a "
                    f"multiple of {BLOCK}: {_ITS_CONFIG}"
                )

    def _names(self, layers: Iterable[int]) -> str:
        names = [self.experts(layer) for layer in sorted(layers)]
        return f"{_few(names)} {'is' if len(names) == 1 else 'are'}"

    def _check_names(self, expected: Mapping[str, Axes]) -> None:
        if missing := [name for name in expected if name not in self.tensors]:
            files = _few([file.name for file in self.files])
            raise CheckpointError(
                f"{len(missing)} of {len(expected)} tensors are not in {files}: {_few(missing)}; "
                f"{_AGAIN}"
            )
        # What else there may be belongs to another head: score.weight, for example.
        ours = (self.prefix,) if self.prefix else ("layers.", "embed_tokens.", "norm.")
        extra = [n for n in self.tensors if n not in expected and n.startswith((*ours, "lm_head."))]
        if extra:
            raise CheckpointError(
                f"{len(extra)} tensors are none of the model that {self._config_name} describes: "
                f"{_few(extra)} in {self.tensors[extra[0]].file}; {_ITS_CONFIG}"
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
                f"{self._config_name} says that {'; '.join(wrong[:_SHOWN])}: {_ITS_CONFIG}"
            )

    def _check_tensors(self, expected: Mapping[str, Axes], sizes: Mapping[str, int]) -> None:
        for name, axes in expected.items():
            tensor = self.tensors[name]
            shape = [gpt_oss.size(axis, sizes) for axis in axes]
            if list(tensor.shape) != shape:
                raise CheckpointError(
                    f"{name} in {tensor.file} has shape {list(tensor.shape)} and should have "
                    f"{shape}: {_AGAIN}"
                )
            if tensor.dtype not in (dtypes := gpt_oss.dtypes(name)):
                wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise CheckpointError(
                    f"{name} in {tensor.file} is {str(tensor.dtype).removeprefix('torch.')}: "
                    f"save it in one of {wanted}"
                )


def warn_of_nan_blocks(counts: Mapping[str, int]) -> None:
    """Warn once of what `Checkpoint.nan_blocks` counted, if that is anything."""
    if counts:
        named = _few([f"{name} ({count})" for name, count in counts.items()])
        warnings.warn(
            f"{sum(counts.values())} MXFP4 blocks are NaN (scale byte {E8M0_NAN}), in {named}: "
            "tokens that are routed to these experts become NaN; if the original is finite, "
            "quantize or download it again",
            NanWeightsWarning,
            stacklevel=3,
        )


# ---- files and messages -------------------------------------------------------------------------


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): {_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object: {_AGAIN}")
    return content


def _require_safetensors(file: Path) -> None:
    if file.suffix in PICKLES:
        raise CheckpointError(
            f"{file} is a pickle, which may run any code when it is read: only safetensors are; "
            "convert it where you trust it, with transformers' model.save_pretrained"
        )
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is no .safetensors file: name the checkpoint's own")


def _no_weights(path: Path) -> CheckpointError:
    files = sorted(file for file in path.iterdir() if file.is_file())
    try:
        for file in files:
            if file.suffix in PICKLES:
                _require_safetensors(file)
    except CheckpointError as error:
        return error
    shards = [file.name for file in files if file.suffix == ".safetensors"]
    has = f"only {_few(shards)}" if shards else "no weights"
    return CheckpointError(f"{path} has {has}, but neither {WEIGHTS} nor {INDEX}: {_AGAIN}")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
