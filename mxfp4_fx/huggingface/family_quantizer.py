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
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxfp4_fx.checkpoints.checkpoint import Checkpoint, warn_of_nan_blocks
from mxfp4_fx.checkpoints.encodings import Encoding
from mxfp4_fx.checkpoints.files import CONFIG, few, read_json
from mxfp4_fx.checkpoints.gpt_oss import PROJECTIONS
from mxfp4_fx.checkpoints.packed_formats import (
    Format,
    PackedWeight,
    format_of,
    packed_weights,
    quantization_config,
)
from mxfp4_fx.core.errors import CheckpointError, CheckpointWarning, NoExpertsWarning, OptionError
from mxfp4_fx.huggingface.activations import activation_of
from mxfp4_fx.huggingface.arguments import require_transformers_for_families
from mxfp4_fx.huggingface.dense_matrices import fresh, parts_of
from mxfp4_fx.huggingface.family_conversions import (
    ConvertDequantized,
    DequantizeWeights,
    InterleaveExperts,
    StackExperts,
)
from mxfp4_fx.huggingface.family_plan import Plan, packed_like, plan_of, with_single_experts
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.huggingface.packed_names import BLOCKS, SCALES, names_of, renamings
from mxfp4_fx.huggingface.packed_quantizer import PackedQuantizer

OUR_METHOD = "mxfp4_fx_families"


def require_transformers() -> None:
    """Raise CheckpointError if transformers is too old to merge packed experts."""
    require_transformers_for_families("packed experts")


@register_quantization_config(OUR_METHOD)
class FamilyConfig(QuantizationConfigMixin):
    """The ``quantization_config`` with which transformers loads a family's packed experts.

    Attributes:
        requantize: whether ``save_pretrained`` rounds matrices again that were MXFP4 or FP8 in the
            files, are no experts' and have changed since; otherwise it raises an error.
        given: in the config of a loaded model, the one that the user gave.
        stored: the ``quantization_config`` of the files, as saved models have it.
        key_mapping: patterns of names in the files -> replacements, as in transformers.
    """

    given: FamilyConfig

    def __init__(self, *, requantize: bool = False, quant_method: str = OUR_METHOD) -> None:
        if quant_method != OUR_METHOD:
            raise OptionError(f"quant_method is {quant_method!r}: it must be {OUR_METHOD!r}")
        self.quant_method = OUR_METHOD
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


class CompressedTensorsConfig(FamilyConfig, transformers.CompressedTensorsConfig):
    """The same for ``from_pretrained`` of transformers' own classes and the like.

    It is for checkpoints of compressed-tensors, because transformers takes no config of another
    class than it makes of the checkpoint's. For these it needs the package compressed-tensors.
    """

    quantization_config = None
    dequantize = False
    use_optimized_inference = False


@register_quantizer(OUR_METHOD)
class FamilyQuantizer(PackedQuantizer):
    """The quantizer that loads and saves `PackedExperts` of any family."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        given = getattr(quantization_config, "given", quantization_config)
        settings = FamilyConfig(requantize=given.requantize)
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
        self._require_one_process(model, use_kernels)
        # If this is false, the loader reads one tensor after the other, which bounds the memory.
        self.pre_quantized = False
        checkpoint, self._format = _opened(checkpoint_files or ())
        self.quantization_config.stored = dict(quantization_config(checkpoint.config))
        packed = packed_weights(checkpoint, self._format)
        self._renamings = renamings(self._format, packed, checkpoint.tensors)
        self._plan = plan_of(model, checkpoint, packed, dict(self.quantization_config.key_mapping))
        _warn_of(self._plan, model)
        self._nan_blocks: dict[str, int] = {}
        for name in self._plan.experts:
            replaced = model.get_submodule(name)
            with torch.device("meta"):
                experts = packed_like(replaced, name, activation_of(replaced, name))
            parent, child = name.rpartition(".")[::2]
            setattr(model.get_submodule(parent), child, experts)
            for projection in PROJECTIONS:  # the loader casts what it reads to the declared dtype
                scales = experts.get_parameter(f"{projection}_scales")
                scales.data = scales.data.to(self._format.scales_dtype)
        self._dtypes: dict[str, torch.dtype] = {}
        for matrices in self._plan.dense.values():
            weights = matrices.sources.values()
            if not any(weight.scales.dtype.is_floating_point for weight in weights):
                continue
            for name in matrices.parameters:
                parameter = model.get_parameter(name)
                if parameter.dtype is torch.float16:
                    self._dtypes[name] = parameter.dtype  # which does not hold all scales
                    parameter.data = parameter.data.float()

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return the model's conversions, with those of packed weights before the ones they are of.

        transformers takes the first that fits a name, after all renamings.
        """
        plan = self._plan
        updated: list[Any] = []
        for conversion in with_single_experts(weight_conversions):
            sources = getattr(conversion, "_original_source_patterns", [])
            patterns = {*getattr(conversion, "source_patterns", [])}
            if patterns & plan.patterns:
                for part, ending, dtype in self._kinds():
                    step = StackExperts(part == BLOCKS, dtype, self._nan_blocks)
                    targets = [f"{t}_{ending}" for t in conversion._original_target_patterns]
                    names = [_with(source, part) for source in sources]
                    updated.append(conversion.copy(names, targets, operations=[step]))
            elif patterns & plan.dense_patterns.keys():
                encodings = {e for p in patterns for e in plan.dense_patterns.get(p, ())}
                for encoding in sorted(encodings, key=names_of):
                    names, targets = parts_of(conversion, encoding)
                    made = ConvertDequantized(
                        encoding, names_of(encoding), self._dtypes, fresh(conversion)
                    )
                    updated.append(conversion.copy(names, targets, operations=[made]))
            updated.append(conversion)
        own = [*self._renamings, *self._of_stacked()]
        return [*own, *updated, *self.get_weight_conversions()]

    def _kinds(self) -> tuple[tuple[str, str, torch.dtype], ...]:
        """Return of blocks and scales: the name in files, the end of the parameter's, the dtype."""
        form = self._format
        return (BLOCKS, "blocks", form.blocks_dtype), (SCALES, "scales", form.scales_dtype)

    def _of_stacked(self) -> list[Any]:
        """Return the conversions of experts of which a layer's are one tensor in the files."""
        found = []
        for experts, parameter in self._format.stacked.items():
            for part, ending, dtype in self._kinds():
                source = rf"\.{self._format.joined(experts, getattr(self._format, ending))}"
                step = InterleaveExperts(part == BLOCKS, dtype, self._nan_blocks)
                found.append(WeightConverter([source], rf"\.{parameter}_{ending}", [step]))
        return found

    def get_weight_conversions(self) -> list[Any]:
        """Return the conversions of packed matrices that no other conversion takes."""
        encodings = {
            weight.encoding
            for matrices in self._plan.dense.values()
            for weight in matrices.sources.values()
        }
        return [
            WeightConverter(list(names_of(one)), "weight", [self._dequantizing(one)])
            for one in sorted(encodings, key=names_of)
        ]

    def _dequantizing(self, encoding: Encoding) -> DequantizeWeights:
        return DequantizeWeights(encoding, names_of(encoding), self._dtypes)

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
        for matrices in self._plan.dense.values():
            if not state.keys() >= {*matrices.parameters}:
                continue
            values = {name: state.pop(name).detach() for name in matrices.parameters}
            for name, value in matrices.to_matrices(model, values).items():
                weight = matrices.sources[name]
                parts = self._packed_again(few([*matrices.parameters]), value, weight)
                stem = name.removesuffix("weight")
                for part, packed in zip(names_of(weight.encoding), parts, strict=True):
                    state[stem + part] = packed
        return state, {}

    def _packed_again(self, name: str, value: Tensor, weight: PackedWeight) -> tuple[Tensor, ...]:
        """Return the bytes of a dequantized matrix: those of the file while it is unchanged."""
        given = self.quantization_config.given
        try:
            # Copied, because the file may be the one that is overwritten.
            stored = weight.blocks.read().clone(), weight.scales.read().clone()
        except (OSError, CheckpointError) as error:
            if not given.requantize:
                raise CheckpointError(
                    f"{name} is packed in {weight.blocks.file}, which cannot be read any longer "
                    f"({error}): {_AGAIN}"
                ) from error
        else:
            was = weight.encoding.to_dense(*stored, value.dtype)
            if torch.equal(was.view(torch.uint8), value.cpu().contiguous().view(torch.uint8)):
                return stored
            if not given.requantize:
                raise CheckpointError(
                    f"{name} was packed in {weight.blocks.file}, and has changed since it was "
                    f"loaded: {_AGAIN}"
                )
        return weight.encoding.from_dense(value.cpu())


_AGAIN = (
    "load the model with mxfp4_fx.from_pretrained(..., requantize=True), and saving rounds it again"
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
            f"{beside} names no format of docs/families.md: load the checkpoint with "
            "mxfp4_fx.from_pretrained(...), or without quantization_config"
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
