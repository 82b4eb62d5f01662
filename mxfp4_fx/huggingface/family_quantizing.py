"""Dense experts of other families than GPT-OSS, quantized while transformers loads them.

The quantizer puts `PackedExperts` into the model, as `family_quantizer.py` does for packed files.
A conversion for each projection of each layer takes the dense matrices of its experts, so that the
loader holds no more dense weights than one projection has. What is saved has compressed-tensors'
format.

Shape letters: E experts, I intermediate, N output rows, K contraction.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxfp4_fx.checkpoints import single_experts
from mxfp4_fx.checkpoints.checkpoint import Checkpoint, warn_of_nan_blocks
from mxfp4_fx.checkpoints.files import AGAIN, CONFIG, few, read_json
from mxfp4_fx.checkpoints.fused_experts import experts_of, fused
from mxfp4_fx.checkpoints.packed_formats import COMPRESSED_TENSORS
from mxfp4_fx.checkpoints.safetensors_file import StoredTensor
from mxfp4_fx.core.errors import CheckpointError, OptionError
from mxfp4_fx.core.formats import count_nan, quantize
from mxfp4_fx.core.skip import KEEP_DENSE, Skip
from mxfp4_fx.huggingface.activations import activation_of
from mxfp4_fx.huggingface.arguments import check_scale_rule
from mxfp4_fx.huggingface.conversions import PROJECTIONS, _only, exactly, set_loading_dtype
from mxfp4_fx.huggingface.dense_matrices import parameters_of
from mxfp4_fx.huggingface.family_plan import (
    _experts,
    _require_all,
    is_family,
    packed_like,
    with_single_experts,
)
from mxfp4_fx.huggingface.family_quantizer import require_transformers
from mxfp4_fx.huggingface.packed import PackedExperts
from mxfp4_fx.huggingface.packed_quantizer import PackedQuantizer

OUR_METHOD = "mxfp4_fx_dense_families"
_EXPERT = re.compile(r".*\.(\d+)(?=\.)")  # the last number of a name


@register_quantization_config(OUR_METHOD)
class QuantizeFamilyConfig(QuantizationConfigMixin):
    """The ``quantization_config`` with which transformers quantizes a family's dense experts.

    Args:
        skip: names of modules, or patterns (`core/skip.py`), whose experts stay dense.
        scale_rule: for ``formats.quantize``.
        quant_method: "mxfp4_fx_dense_families", if the arguments are those of a dict.

    Attributes:
        stored: the ``quantization_config`` that saved models have.
        key_mapping: patterns of names in the files -> replacements, as in transformers.

    Raises:
        OptionError: an argument has no meaning here.
    """

    def __init__(
        self,
        *,
        skip: str | Sequence[str] = (),
        scale_rule: str = "max",
        quant_method: str = OUR_METHOD,
    ) -> None:
        if quant_method != OUR_METHOD:
            raise OptionError(f"quant_method is {quant_method!r}: it must be {OUR_METHOD!r}")
        check_scale_rule(scale_rule, "QuantizeFamilyConfig")
        self.quant_method = OUR_METHOD
        self.skip, self.scale_rule = Skip.of(skip), scale_rule
        self.stored: dict[str, Any] = {}
        self.key_mapping: Mapping[str, str] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry as a dict does: transformers asks a model's config so if it is reused."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """Return ``quantization_config`` of a saved model."""
        return self.stored


@register_quantizer(OUR_METHOD)
class DenseFamilyQuantizer(PackedQuantizer):
    """The quantizer that loads dense experts of any family as `PackedExperts`."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # Copied, because the user may load another model with the one given.
        super().__init__(copy.copy(quantization_config), **kwargs)

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: Sequence[str] | None = None,
        use_kernels: bool = False,
        **_: Any,
    ) -> None:
        require_transformers()
        self._require_one_process(model, use_kernels)
        self.pre_quantized = False  # so the loader reads one tensor after the other
        settings, checkpoint = self.quantization_config, _opened(checkpoint_files or ())
        names = single_experts.to_quantize(checkpoint, settings.skip)
        plan = dense_plan_of(model, checkpoint, names, dict(settings.key_mapping))
        matrices = single_experts.matrices(checkpoint, names)
        settings.stored = single_experts.quantized_config(
            {**checkpoint.tensors, **matrices}, {*matrices}
        )
        self._nan_blocks: dict[str, int] = {}
        self._conversions: list[Any] = []
        for path, projections in plan.items():
            replaced = model.get_submodule(path)
            with torch.device("meta"):
                packed = packed_like(replaced, path, activation_of(replaced, path))
            parent, child = path.rpartition(".")[::2]
            setattr(model.get_submodule(parent), child, packed)
            for projection, found in projections.items():
                set_loading_dtype(packed, projection, found.dtype)
                self._conversions.append(self._conversion(path, projection, found))
        for name, module in model.named_modules():
            if is_family(module) and name not in plan and not isinstance(module, PackedExperts):
                setattr(module, KEEP_DENSE, True)  # skipped: the backend leaves it dense, too

    def _conversion(self, path: str, projection: str, found: _Projection) -> WeightConverter:
        """Return the conversion of one layer's dense matrices to blocks and scales."""
        # Conversions match the end of a name, because models and files may lack the prefix.
        short = path[path.index("layers.") :] if "layers." in path else path
        step = QuantizeFamily(
            found.names, found.is_transposed, self.quantization_config.scale_rule, self._nan_blocks
        )
        sources = [exactly(f"{short}.{projection}")]
        if found.is_transposed is None:
            start = short.replace(".", r"\.")
            sources = [rf"{start}\.*.{name}.weight$" for name in found.names]
        return WeightConverter(sources, [f"{short}.{projection}_{p}" for p in _PARTS], [step])

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return the model's conversions behind ours: transformers takes the first that fits."""
        return [*self._conversions, *weight_conversions]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, PackedExperts):
                module.requires_grad_(False)
        warn_of_nan_blocks(self._nan_blocks)
        return model


_PARTS = ("blocks", "scales")


class _Matrix(NamedTuple):
    """A dense matrix [N, K] of one expert, with the attributes of a ``PackedWeight``.

    Attributes:
        stem: its name without ".weight", as if the file held it alone.
        blocks: the tensor that it is, or is a part of.
    """

    stem: str
    blocks: StoredTensor
    n: int
    k: int


class _Projection(NamedTuple):
    """A dense projection of a layer's experts.

    Attributes:
        names: the last parts of the names of an expert's matrices.
        is_transposed: whether the file holds all in one tensor as [E, K, N]; None if it holds
            matrices one by one.
        dtype: the dtype in which the loader reads it.
    """

    names: list[str]
    is_transposed: bool | None
    dtype: torch.dtype


def dense_plan_of(
    model: Any, checkpoint: Checkpoint, names: set[str], key_mapping: dict[str, str]
) -> dict[str, dict[str, _Projection]]:
    """Return module of experts -> projection, and check that the files are the model's.

    Args:
        model: as transformers makes it, on meta.
        checkpoint: its files.
        names: the tensors in them that are to be quantized.
        key_mapping: as in transformers' ``from_pretrained``.

    Raises:
        CheckpointError: experts are incomplete or have other sizes than the model's, or a tensor of
            the model is missing.
    """
    conversions = with_single_experts(get_model_conversion_mapping(model, key_mapping or None))
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    held = model.state_dict()
    modules = {name for name, module in model.named_modules() if is_family(module)}
    parts: dict[str, dict[str, dict[int, _Matrix]]] = defaultdict(lambda: defaultdict(dict))
    forms: dict[str, set[bool | None]] = defaultdict(set)
    found: set[str] = set()

    def place(name: str) -> tuple[str, str | None]:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, held)

    for name, tensor in checkpoint.tensors.items():
        if name not in names:
            target, pattern = place(name)
            converter = next((c for c in converters if pattern in c.source_patterns), None)
            found |= {*parameters_of(target, converter)}
            continue
        whole = fused(checkpoint, name) if experts_of(name) else None
        for expert in range(tensor.shape[0] if whole else 1):
            for spec in whole.specs(expert) if whole else [tensor.spec]:
                target, pattern = place(spec.name)
                if target not in held:  # of a layer that the model has not, for further tokens
                    continue
                number = _EXPERT.match(spec.name.removesuffix(".weight"))
                if target.rpartition(".")[0] not in modules or pattern is None or number is None:
                    raise CheckpointError(
                        f"{name} in {tensor.file} is no expert of a {type(model).__name__} that "
                        "can be quantized: transformers loads the checkpoint dense"
                    )
                matrix = _Matrix(spec.name.removesuffix(".weight"), tensor, *spec.shape)
                parts[target][pattern][int(number[1])] = matrix
                forms[target].add(whole.is_transposed if whole else None)
    found |= parts.keys()
    _require_all(model, held, found, checkpoint)
    plan: dict[str, dict[str, _Projection]] = defaultdict(dict)
    for target, of_patterns in parts.items():
        path, _, projection = target.rpartition(".")
        converter = next(c for c in converters if next(iter(of_patterns)) in c.source_patterns)
        # It asks for what `_Matrix` has, too.
        given: Any = of_patterns
        ordered = _experts(model.get_submodule(path), target, given, converter)
        if len(forms[target]) > 1:
            raise CheckpointError(f"the files hold {target} twice, whole and in parts: {AGAIN}")
        dtypes = {matrix.blocks.dtype for ones in ordered.values() for matrix in ones}
        # What the loader casts to float32 is not rounded.
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        last = [pattern.split(".")[-2] for pattern in ordered]
        plan[path][projection] = _Projection(last, forms[target].pop(), dtype)
    for path, projections in plan.items():
        if missing := sorted({*PROJECTIONS} - projections.keys()):
            raise CheckpointError(f"the files have no {few(missing)} of {path}: {AGAIN}")
    return plan


class QuantizeFamily(ConversionOps):
    """The conversion of a projection's dense matrices to the bytes of ``PackedExperts``.

    Rows of gate and up then alternate.
    """

    supports_many_to_many = True

    def __init__(
        self,
        names: Sequence[str],
        is_transposed: bool | None,
        scale_rule: str,
        nan_blocks: dict[str, int],
    ) -> None:
        self.names, self.is_transposed, self.scale_rule = list(names), is_transposed, scale_rule
        self._nan_blocks = nan_blocks  # convert() writes the counts of NaN blocks into it

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizeFamily:
        return self  # the loader copies a conversion for each weight; all share `nan_blocks`

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        source_patterns: list[str],
        full_layer_name: str,
        model: Any,
        **_: Any,
    ) -> dict[str, Tensor]:
        parts = [input_dict.pop(pattern) for pattern in source_patterns]
        whole = None if self.is_transposed is None else _only(parts[0])
        one = whole if whole is not None else parts[0][0]
        name = full_layer_name.removesuffix("_blocks")
        path, projection = name.rsplit(".", 1)
        packed = model.get_submodule(path)
        shapes = {part: packed.get_parameter(f"{projection}_{part}").shape for part in _PARTS}
        blocks, scales = (one.new_empty(shapes[part], dtype=torch.uint8) for part in _PARTS)
        count = len(self.names)
        for expert in range(blocks.shape[0]):
            if whole is None:
                matrices = [tensors[expert] for tensors in parts]
                for tensors in parts:
                    tensors[expert] = None  # its memory is not needed any longer
            else:
                values = whole[expert].T if self.is_transposed else whole[expert]
                matrices = list(values.chunk(count))
            for at, matrix in enumerate(matrices):
                rows = slice(at, None, count)
                blocks[expert, rows], scales[expert, rows] = quantize(
                    matrix, scale_rule=self.scale_rule
                )
        set_loading_dtype(packed, projection, torch.uint8)
        if nan := count_nan(scales):
            self._nan_blocks[f"{name}_scales"] = nan
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    @property
    def reverse_op(self) -> ConversionOps:
        return WriteQuantized(self.names)


class WriteQuantized(ConversionOps):
    """What ``save_pretrained`` makes of the bytes: compressed-tensors' matrices of each expert."""

    supports_many_to_many = True

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, **_: Any
    ) -> dict[str, Tensor]:
        experts = full_layer_name.rpartition(".experts")[0] + ".experts"
        found: dict[str, Tensor] = {}
        form = COMPRESSED_TENSORS
        for source, tensors in input_dict.items():
            stacked = _only(tensors).detach()
            is_blocks = source.endswith("_blocks")
            stacked = stacked.flatten(2) if is_blocks else stacked
            parts = stacked.unflatten(1, (-1, len(self.names))).unbind(2)
            last = form.blocks if is_blocks else form.scales
            for name, part in zip(self.names, parts, strict=True):
                for expert in range(stacked.shape[0]):
                    found[f"{experts}.{expert}.{name}.{last}"] = part[expert].contiguous()
        return found


def _opened(files: Sequence[str]) -> Checkpoint:
    """Return the checkpoint of these files, with the ``config.json`` beside them.

    Raises:
        CheckpointError: it has no dense experts of another family than GPT-OSS.
    """
    beside = Path(files[0]).with_name(CONFIG) if files else Path(CONFIG)
    checkpoint = Checkpoint(files, read_json(beside))
    checkpoint.config_name = str(beside)
    if not single_experts.is_of_another_family(checkpoint):
        raise CheckpointError(
            f"the files beside {beside} hold no experts of another family than GPT-OSS that could "
            "be quantized: load the checkpoint with transformers itself"
        )
    return checkpoint
