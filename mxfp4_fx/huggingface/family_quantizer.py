"""Packed experts of any family for transformers' loader.

The files have one of ``packed_formats.FORMATS``. The loader merges the tensors of single experts by
the family's own mapping. The quantizer puts `PackedExperts` into the model, and lets that mapping
merge blocks and scales instead of weights. Other matrices that are MXFP4 in the files are
dequantized. What is saved is what was loaded, byte for byte, under the names of the files.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from mxfp4_fx.checkpoints.checkpoint import Checkpoint, warn_of_nan_blocks
from mxfp4_fx.checkpoints.files import CONFIG, few, read_json
from mxfp4_fx.checkpoints.packed_formats import (
    COMPRESSED_TENSORS,
    Format,
    PackedWeight,
    format_of,
    packed_weights,
    quantization_config,
)
from mxfp4_fx.core.errors import CheckpointError, CheckpointWarning, NoExpertsWarning, OptionError
from mxfp4_fx.core.formats import quantize
from mxfp4_fx.core.version import OLDEST_FOR_FAMILIES, too_old_for_families
from mxfp4_fx.huggingface import parallel
from mxfp4_fx.huggingface.activations import activation_of
from mxfp4_fx.huggingface.arguments import refuse
from mxfp4_fx.huggingface.family_conversions import (
    DequantizeWeights,
    StackExperts,
    dense_matrix,
)
from mxfp4_fx.huggingface.family_plan import Plan, packed_like, plan_of, with_single_experts
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.huggingface.packed_quantizer import PackedQuantizer

OUR_METHOD = "mxfp4_fx_families"


def require_transformers() -> None:
    """Raise CheckpointError if transformers is too old to merge packed experts."""
    version = too_old_for_families()
    if version is not None:
        raise CheckpointError(
            f"packed experts of other families than GPT-OSS need transformers {OLDEST_FOR_FAMILIES}"
            f" or newer (pip install --upgrade transformers): {version} is installed"
        )


@register_quantization_config(OUR_METHOD)
class CompressedTensorsConfig(transformers.CompressedTensorsConfig):
    """The ``quantization_config`` with which transformers loads a family's packed experts.

    It is for ``from_pretrained`` of transformers' classes and the like, for checkpoints of
    compressed-tensors in ``mxfp4-pack-quantized``. transformers itself needs the package
    compressed-tensors for that; :func:`mxfp4_fx.from_pretrained` does not.

    Attributes:
        requantize: whether ``save_pretrained`` rounds matrices to MXFP4 again that were MXFP4 in
            the files, are no experts' and have changed since; otherwise it raises an error.
        given: in the config of a loaded model, the one that the user gave.
        stored: the ``quantization_config`` of the files, as saved models have it.
        key_mapping: patterns of names in the files -> replacements, as in transformers.
    """

    given: CompressedTensorsConfig

    def __init__(self, *, requantize: bool = False, quant_method: str = OUR_METHOD) -> None:
        if quant_method != OUR_METHOD:
            raise OptionError(f"quant_method is {quant_method!r}: it must be {OUR_METHOD!r}")
        self.quant_method = OUR_METHOD
        self.quantization_config = None
        self.dequantize = False
        self.use_optimized_inference = False
        self.requantize = requantize
        self.stored: dict[str, Any] = {}
        self.key_mapping: Mapping[str, str] = {}

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what transformers sets on the config that it makes of a checkpoint's.

        With this ``quant_method``, that config selects our quantizer.
        """
        return {"quant_method": OUR_METHOD, "given": self}

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry as a dict does: transformers asks a model's config so if it is reused."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """Return ``quantization_config`` of a saved model: that of the files it was loaded from."""
        return self.stored


@register_quantizer(OUR_METHOD)
class FamilyQuantizer(PackedQuantizer):
    """The quantizer that loads and saves `PackedExperts` of any family."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        given = getattr(quantization_config, "given", quantization_config)
        settings = CompressedTensorsConfig(requantize=given.requantize)
        settings.given, settings.key_mapping = given, given.key_mapping
        super().__init__(settings, **kwargs)

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: Sequence[str] | None = None,
        use_kernels: bool = False,
        **_: Any,
    ) -> None:
        require_transformers()
        if use_kernels:
            refuse("use_kernels")
        if parallel.is_spread(parallel.config_of(model)):
            raise OptionError(
                "from_pretrained(..., distributed_config=...) cannot spread packed experts of "
                "other families than GPT-OSS: load the checkpoint in one process"
            )
        # If this is false, the loader reads one tensor after the other, which bounds the memory.
        self.pre_quantized = False
        checkpoint, self._format = _opened(checkpoint_files or ())
        self.quantization_config.stored = dict(quantization_config(checkpoint.config))
        packed = packed_weights(checkpoint, self._format)
        self._plan = plan_of(model, checkpoint, packed, dict(self.quantization_config.key_mapping))
        _warn_of(self._plan, model)
        self._nan_blocks: dict[str, int] = {}
        for name in self._plan.experts:
            replaced = model.get_submodule(name)
            with torch.device("meta"):
                experts = packed_like(replaced, name, activation_of(replaced, name))
            parent, child = name.rpartition(".")[::2]
            setattr(model.get_submodule(parent), child, experts)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return the model's conversions, with those of packed weights before the ones they are of.

        transformers takes the first that fits a name.
        """
        form, plan = self._format, self._plan
        updated: list[Any] = []
        for conversion in with_single_experts(weight_conversions):
            sources = getattr(conversion, "_original_source_patterns", [])
            patterns = {*getattr(conversion, "source_patterns", [])}
            if patterns & plan.patterns:
                for part, ending in ((form.blocks, "blocks"), (form.scales, "scales")):
                    step = StackExperts(ending == "blocks", self._nan_blocks)
                    targets = [f"{t}_{ending}" for t in conversion._original_target_patterns]
                    names = [_with(source, part) for source in sources]
                    updated.append(conversion.copy(names, targets, operations=[step]))
            elif patterns & plan.dense_patterns:
                names = [_with(s, part) for s in sources for part in (form.blocks, form.scales)]
                steps = [DequantizeWeights(form.blocks, form.scales), *conversion.operations]
                targets = list(conversion._original_target_patterns)
                updated.append(conversion.copy(names, targets, operations=steps))
            updated.append(conversion)
        return updated + self.get_weight_conversions()

    def get_weight_conversions(self) -> list[Any]:
        """Return the conversion of packed matrices that no other conversion takes."""
        form = self._format
        step = DequantizeWeights(form.blocks, form.scales)
        return [WeightConverter([form.blocks, form.scales], "weight", [step])]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, PackedExperts):
                module.requires_grad_(False)
        warn_of_nan_blocks(self._nan_blocks)
        # Those that dequantize cannot be undone: see `get_state_dict_and_metadata`.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(
                isinstance(step, DequantizeWeights)
                for step in getattr(conversion, "operations", ())
            )
        ]
        return model

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return what is saved: matrices that were packed in the files are packed again.

        Raises:
            CheckpointError: such a matrix has changed since it was loaded.
        """
        state: dict[str, Any] = model.state_dict()
        form = self._format
        for name, weight in self._plan.dense.items():
            if name in state:
                blocks, scales = self._packed_again(name, state.pop(name).detach(), weight)
                stem = name.removesuffix("weight")
                state |= {f"{stem}{form.blocks}": blocks, f"{stem}{form.scales}": scales}
        return state, {}

    def _packed_again(self, name: str, value: Tensor, weight: PackedWeight) -> tuple[Tensor, ...]:
        """Return the bytes of a dequantized matrix: those of the file while it is unchanged."""
        given = self.quantization_config.given
        try:
            # Copied, because the file may be the one that is overwritten.
            stored = tuple(part.read().clone() for part in (weight.blocks, weight.scales))
        except (OSError, CheckpointError) as error:
            if not given.requantize:
                raise CheckpointError(
                    f"{name} is MXFP4 in {weight.blocks.file}, which cannot be read any longer "
                    f"({error}): {_AGAIN}"
                ) from error
        else:
            blocks, scales = (part.view(torch.uint8) for part in stored)
            was = dense_matrix(blocks, scales, value.dtype)
            if torch.equal(was.view(torch.uint8), value.cpu().contiguous().view(torch.uint8)):
                return stored
            if not given.requantize:
                raise CheckpointError(
                    f"{name} was MXFP4 in {weight.blocks.file}, and has changed since it was "
                    f"loaded: {_AGAIN}"
                )
        blocks, scales = quantize(value.cpu())
        return (
            blocks.flatten(1).view(self._format.blocks_dtype),
            scales.view(self._format.scales_dtype),
        )


_AGAIN = (
    "load the model with mxfp4_fx.from_pretrained(..., requantize=True), and saving rounds it to "
    "MXFP4 again"
)


def _opened(files: Sequence[str]) -> tuple[Checkpoint, Format]:
    """Return the checkpoint of these files, with the ``config.json`` beside them, and its format.

    Raises:
        CheckpointError: there is no such config, or it names no format.
    """
    beside = Path(files[0]).with_name(CONFIG) if files else Path(CONFIG)
    if not beside.is_file():
        raise CheckpointError(f"{beside} is not there: it says how the files hold their weights")
    checkpoint = Checkpoint(files, read_json(beside))
    checkpoint.config_name = str(beside)
    form = format_of(checkpoint.config, str(beside))
    if form is None:
        raise CheckpointError(
            f"{beside} names no quant_method of {COMPRESSED_TENSORS.method}: load the checkpoint "
            "with mxfp4_fx.from_pretrained(...), or without quantization_config"
        )
    return checkpoint, form


def _with(source: str, part: str) -> str:
    """Return the pattern of a dense tensor's name as that of one of its packed parts."""
    return re.sub(r"weight(\$?)$", rf"{part}\1", source)


def _warn_of(plan: Plan, model: Any) -> None:
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    strays = [s for s in plan.strays if not any(re.search(one, s) for one in ignored)]
    if strays:
        warnings.warn(
            f"{len(strays)} packed matrices do not belong to a {type(model).__name__}: "
            f"{few(strays)}; the model is loaded without them, as transformers does it",
            CheckpointWarning,
            stacklevel=3,
        )
    if not plan.experts:
        warnings.warn(
            f"no experts of this {type(model).__name__} are MXFP4 in the files; what else is "
            "becomes dense",
            NoExpertsWarning,
            stacklevel=3,
        )
