"""The quantization method "mxfp4_fx" of transformers, which loads and saves packed experts.

transformers has its own method "mxfp4", and rejects a config of another class for it. So this file
registers "mxfp4_fx" beside it, and ``loading.from_pretrained`` selects that. The config of a saved
model says "mxfp4", because its files have the format that other programs know by that name.

Parameters of :class:`PackedExperts` have the names and bytes of the checkpoint, so the loader
converts nothing. There are two exceptions, with a conversion each: experts that the files hold
dense are quantized, one tensor at a time; packed experts that the user skips are dequantized.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mxfp4_fx.checkpoints import consistency, gpt_oss
from mxfp4_fx.checkpoints.checkpoint import Checkpoint, warn_of_nan_blocks
from mxfp4_fx.core.errors import CheckpointError, NoExpertsWarning, OptionError
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, E8M0_NAN, quantize
from mxfp4_fx.core.skip import KEEP_DENSE, Skip
from mxfp4_fx.huggingface.packed import PROJECTIONS, PackedExperts
from mxfp4_fx.huggingface.unpacking import dense_weight, unpack_experts

OUR_METHOD = "mxfp4_fx"


def check(checkpoint: Checkpoint, *, ignore_sizes: bool = False) -> None:
    """Run `consistency.check`, but accept dense experts, which the loader can quantize.

    Raises:
        CheckpointError: the checkpoint has another fault.
    """
    method, patterns = checkpoint.quantization()
    if method:
        dense = [checkpoint.experts(n) for n, form in checkpoint.forms.items() if form == "dense"]
        settings = {**gpt_oss.quantized_config([*patterns, *dense]), "quant_method": method}
        checkpoint.config = {**checkpoint.config, "quantization_config": settings}
    consistency.check(checkpoint, ignore_sizes=ignore_sizes)


def renaming(key_mapping: Mapping[str, str]) -> Callable[[str], str]:
    """Return the function by which transformers renames the tensors of files for a `key_mapping`.

    Raises:
        OptionError: `key_mapping` does not map regular expressions to replacements.
    """
    try:
        steps = [WeightRenaming(source, target) for source, target in key_mapping.items()]
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise OptionError(
            "from_pretrained(..., key_mapping=...) takes regular expressions for parts of names "
            rf'and what is to stand there, {{r"^module\.": ""}} for example: {error}'
        ) from error

    def rename(name: str) -> str:
        for step in steps:
            name, _ = step.rename_source_key(name)
        return name

    return rename


@register_quantization_config(OUR_METHOD)
class PackedMxfp4Config(QuantizationConfigMixin):
    """The config that selects packed experts.

    Attributes:
        modules_to_not_convert: entries, as transformers defines them, for modules whose experts
            become dense. The quantizer adds the full names of the experts that ``skip`` names.
        scale_rule: for ``formats.quantize``, where the checkpoint has dense experts.
        skip: patterns for further experts that become dense.
        key_mapping: patterns of names in the files -> replacements, as in transformers.
        ignore_sizes: accept tensors of other sizes than the config's, except the experts';
            transformers then initializes new ones.
        stored_config: the content of the checkpoint's ``config.json``, which its files are compared
            with; None means the model's config.
    """

    def __init__(
        self,
        modules_to_not_convert: Sequence[str] | None = None,
        scale_rule: str = "max",
        **_: Any,
    ) -> None:
        self.quant_method = OUR_METHOD
        if modules_to_not_convert is None:
            modules_to_not_convert = gpt_oss.not_converted_by_default()
        self.modules_to_not_convert = list(modules_to_not_convert)
        self.scale_rule = scale_rule
        self.skip = Skip()
        self.key_mapping: Mapping[str, str] = {}
        self.ignore_sizes = False
        self.stored_config: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, stored: Any, skip: str | Sequence[str] = ()) -> PackedMxfp4Config:
        """Make the config for a checkpoint's ``quantization_config``: None, a dict or a config."""
        stored = stored if isinstance(stored, dict | None) else stored.to_dict()
        config = cls((stored or {}).get("modules_to_not_convert"))
        config.skip = Skip.of(skip)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return ``quantization_config`` of a saved model, with the method that others know."""
        return gpt_oss.quantized_config(self.modules_to_not_convert)


@register_quantizer(OUR_METHOD)
class PackedMxfp4Quantizer(HfQuantizer):
    """The quantizer that puts :class:`PackedExperts` into a model before its weights are loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        settings = self.quantization_config
        config = settings.stored_config or model.config.to_dict()
        rename = renaming(settings.key_mapping)
        checkpoint = Checkpoint(checkpoint_files or (), config, rename)
        check(checkpoint, ignore_sizes=settings.ignore_sizes)
        consistency.warn_of_strays(checkpoint)
        entries = settings.modules_to_not_convert
        skipped = {layer for entry in entries for layer in checkpoint.matching(entry)}
        more = checkpoint.skipped(settings.skip) - skipped
        self._nan_blocks = checkpoint.nan_blocks()
        self._to_quantize: list[str] = []
        self._to_dequantize: list[str] = []
        found = False
        for name, experts in list(model.named_modules()):
            if not isinstance(experts, GptOssExperts):
                continue
            # Conversions match the end of a name, because models and files may lack the prefix.
            short = name[name.index("layers.") :]
            layer = int(short.split(".")[1])
            weights = [f"{short}.{projection}" for projection in PROJECTIONS]
            is_packed = checkpoint.forms[layer] == "packed"
            if layer in more:  # by its full name: other programs read the config and know no skip
                entries.append(name)
            if layer in skipped | more:
                self._to_dequantize += weights if is_packed else []
                continue
            found = True
            with torch.device("meta"):
                packed = packed_like(experts, name)
            if not is_packed:
                self._to_quantize += weights
                for projection, weight in zip(PROJECTIONS, weights, strict=True):
                    dtype = checkpoint.tensors[checkpoint.prefix + weight].dtype
                    _set_loading_dtype(packed, projection, dtype)
            parent, child = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), child, packed)
        if not found:
            warnings.warn(
                f"no experts of this {type(model).__name__} will be MXFP4: all are skipped by "
                f"{entries}",
                NoExpertsWarning,
                stacklevel=2,
            )
        # If this is false, the loader reads one tensor after the other, not many ahead, which
        # bounds the memory.
        self.pre_quantized = not self._to_quantize

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, PackedExperts):
                module.requires_grad_(False)  # the loader makes every float a trainable parameter
            elif isinstance(module, GptOssExperts):
                setattr(module, KEEP_DENSE, True)  # skipped: the backend leaves it dense, too
        warn_of_nan_blocks(self._nan_blocks)
        _correct_offload_index(model)
        # With these conversions, save_pretrained would undo them. It has to save packed experts as
        # they are, and all tensors under the model's names.
        mapping = self.quantization_config.key_mapping
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(
                isinstance(operation, QuantizeExperts | DequantizeExperts)
                for operation in getattr(conversion, "operations", ())
            )
            and not (isinstance(conversion, WeightRenaming) and mapping)
        ]
        return model

    def get_weight_conversions(self) -> list[Any]:
        """Return a conversion for each weight whose form differs between files and model."""
        conversions = []
        for weight in self._to_quantize:
            quantize_it = QuantizeExperts(self.quantization_config.scale_rule, self._nan_blocks)
            conversions.append(WeightConverter(_exactly(weight), _bytes_of(weight), [quantize_it]))
        for weight in self._to_dequantize:
            sources = [_exactly(name) for name in _bytes_of(weight)]
            conversions.append(WeightConverter(sources, weight, [DequantizeExperts()]))
        return conversions

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Return the bytes of a loaded element, from which transformers plans a device map."""
        return 1 if param_name.endswith(_BYTES) else param.element_size()

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        unpack_experts(model, dtype)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        super().remove_quantization_config(model)
        for module in model.modules():
            vars(getattr(module, "config", self)).pop("_is_quantized", None)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained. The experts are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class QuantizeExperts(ConversionOps):
    """The conversion of a dense weight [E, K, N] to blocks and scales, expert by expert."""

    def __init__(self, scale_rule: str, nan_blocks: dict[str, int]) -> None:
        self.scale_rule = scale_rule
        self._nan_blocks = nan_blocks  # convert() writes the counts of NaN blocks into it

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizeExperts:
        return self  # the loader copies a conversion for each weight; all share `nan_blocks`

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **_: Any
    ) -> dict[str, Tensor]:
        (weight,) = (_only(tensors) for tensors in input_dict.values())
        name = full_layer_name.removesuffix("_blocks")
        e, k, n = weight.shape
        blocks = weight.new_empty((e, n, k // BLOCK, BYTES_PER_BLOCK), dtype=torch.uint8)
        scales = weight.new_empty((e, n, k // BLOCK), dtype=torch.uint8)
        for expert in range(e):
            blocks[expert], scales[expert] = quantize(weight[expert].T, scale_rule=self.scale_rule)
        module, projection = name.rsplit(".", 1)
        _set_loading_dtype(model.get_submodule(module), projection, torch.uint8)
        if count := int((scales == E8M0_NAN).sum()):
            self._nan_blocks[f"{name}_scales"] = count
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}


class DequantizeExperts(ConversionOps):
    """The conversion of blocks and scales to a dense weight [E, K, N], for skipped experts."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **_: Any
    ) -> dict[str, Tensor]:
        # The loader casts bytes to the weight's dtype; every float dtype holds 0 to 255 exactly.
        blocks, scales = (
            _only(tensors).to(torch.uint8) for _, tensors in sorted(input_dict.items())
        )
        weight = model.get_parameter(full_layer_name)
        return {full_layer_name: dense_weight(blocks, scales, weight.dtype)}


_BYTES = tuple(
    f"{projection}_{part}" for projection in PROJECTIONS for part in ("blocks", "scales")
)


def _bytes_of(weight: str) -> list[str]:
    return [f"{weight}_blocks", f"{weight}_scales"]


def _exactly(name: str) -> str:
    """Return a pattern for the end of a key.

    Without $, older versions of transformers find a weight's name in that of its bias.
    """
    return name.replace(".", r"\.") + "$"


def _only(tensors: Any) -> Tensor:
    """Return the tensor, which the loader passes alone or in a list."""
    return tensors[0] if isinstance(tensors, list) else tensors


def _correct_offload_index(model: nn.Module) -> None:
    """Record uint8 for bytes offloaded to disk: older versions record the model's dtype."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            prefixed = getattr(part, "weights_map", None)
            index = getattr(getattr(prefixed, "dataset", None), "index", None) or {}
            for name, entry in index.items():
                if name.endswith(_BYTES):
                    entry["dtype"] = "uint8"


def packed_like(experts: Any, name: str) -> PackedExperts:
    """Return packed experts with the sizes and constants of `experts`, but without values.

    Args:
        experts: transformers' experts.
        name: their name, for messages.

    Raises:
        CheckpointError: a size is not a multiple of 32.
    """
    for size in (experts.hidden_size, experts.intermediate_size):
        if size % BLOCK:
            raise CheckpointError(
                f"{name} cannot be MXFP4: its size {size} is no multiple of {BLOCK}; skip it"
            )
    return PackedExperts(
        experts.num_experts,
        experts.hidden_size,
        experts.intermediate_size,
        alpha=experts.alpha,
        limit=experts.limit,
    )


def _set_loading_dtype(module: nn.Module, projection: str, dtype: torch.dtype) -> None:
    """Give blocks and scales, still on meta, the dtype to which the loader casts what it reads.

    This must be the stored dtype of a dense weight until the weight is quantized, and uint8
    afterwards.
    """
    for name in (f"{projection}_blocks", f"{projection}_scales"):
        empty = torch.empty_like(module.get_parameter(name), dtype=dtype, device="meta")
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
