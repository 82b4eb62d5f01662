"""How transformers loads and saves GPT-OSS with packed experts: a quantization method of our own.

transformers owns the method "mxfp4", and refuses a config of another class for it. So we register
"mxfp4_fx" beside it, and ``loading.from_pretrained`` asks for that. A saved model says "mxfp4"
again: its files are what every other program knows by that name.

Parameters of :class:`PackedExperts` have the names and bytes of the checkpoint, so the loader needs
no conversion for them. Experts that the files hold dense are quantized by a conversion, one tensor
at a time; experts that the user skips are dequantized by another if the files hold them packed.
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

from mxfp4_fx.checkpoints import gpt_oss
from mxfp4_fx.checkpoints.checkpoint import Checkpoint, warn_of_nan_blocks, warn_of_strays
from mxfp4_fx.core.errors import CheckpointError, NoExpertsWarning, OptionError
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, E8M0_NAN, quantize
from mxfp4_fx.core.skip import KEEP_DENSE, Skip
from mxfp4_fx.huggingface.packed import PROJECTIONS, PackedExperts
from mxfp4_fx.huggingface.unpacking import dense_weight, unpack_experts

OUR_METHOD = "mxfp4_fx"


def check(checkpoint: Checkpoint, *, ignore_sizes: bool = False) -> None:
    """`Checkpoint.check`, to which dense experts are welcome: they become what the config says.

    Raises:
        CheckpointError: something else is wrong with the checkpoint.
    """
    method, patterns = checkpoint.quantization()
    if method:
        dense = [checkpoint.experts(n) for n, form in checkpoint.forms.items() if form == "dense"]
        settings = {**gpt_oss.quantized_config([*patterns, *dense]), "quant_method": method}
        checkpoint.config = {**checkpoint.config, "quantization_config": settings}
    checkpoint.check(ignore_sizes=ignore_sizes)


def renaming(key_mapping: Mapping[str, str]) -> Callable[[str], str]:
    """A name in the files -> the name that transformers gives that tensor for a ``key_mapping``.

    Raises:
        OptionError: it is none.
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
    """Asks for packed experts.

    Attributes:
        modules_to_not_convert: entries that name modules whose experts become dense, as
            transformers understands them. Experts that ``skip`` names are added, by their names.
        scale_rule: how blocks get their scale where a dense checkpoint is quantized.
        skip: what else the user wants dense.
        key_mapping: patterns of names in the files -> what is to stand there, as in transformers.
        ignore_sizes: take tensors of other sizes than the config's; transformers then makes new
            ones. The experts' must fit.
        stored_config: the content of the checkpoint's ``config.json``, with which its files are
            compared; the model's config if None.
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
        """What a checkpoint's own config says (None, a mapping or a config), and more to skip."""
        stored = stored if isinstance(stored, dict | None) else stored.to_dict()
        config = cls((stored or {}).get("modules_to_not_convert"))
        config.skip = Skip.of(skip)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of a saved model: the method that everybody knows."""
        return gpt_oss.quantized_config(self.modules_to_not_convert)


@register_quantizer(OUR_METHOD)
class PackedMxfp4Quantizer(HfQuantizer):
    """Puts :class:`PackedExperts` where a model is to have them, before its weights are loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        settings = self.quantization_config
        config = settings.stored_config or model.config.to_dict()
        rename = renaming(settings.key_mapping)
        checkpoint = Checkpoint(checkpoint_files or (), config, rename)
        check(checkpoint, ignore_sizes=settings.ignore_sizes)
        warn_of_strays(checkpoint)
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
            # Conversions match the end of a name: models and files may have a prefix or not.
            short = name[name.index("layers.") :]
            layer = int(short.split(".")[1])
            weights = [f"{short}.{projection}" for projection in PROJECTIONS]
            is_packed = checkpoint.forms[layer] == "packed"
            if layer in more:  # named in full: other programs that read the config know no skip
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
        # A loader that quantizes reads one tensor after the other instead of many ahead, which
        # bounds the memory.
        self.pre_quantized = not self._to_quantize

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, PackedExperts):
                module.requires_grad_(False)  # the loader makes every float a trainable parameter
            elif isinstance(module, GptOssExperts):
                setattr(module, KEEP_DENSE, True)  # skipped, which the backend is to respect
        warn_of_nan_blocks(self._nan_blocks)
        _correct_offload_index(model)
        # Saving would undo the conversions; packed experts are saved as they are, and all under
        # the names that the model has.
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
        """For each weight that the files hold in another form than the model."""
        conversions = []
        for weight in self._to_quantize:
            quantize_it = QuantizeExperts(self.quantization_config.scale_rule, self._nan_blocks)
            conversions.append(WeightConverter(_exactly(weight), _bytes_of(weight), [quantize_it]))
        for weight in self._to_dequantize:
            sources = [_exactly(name) for name in _bytes_of(weight)]
            conversions.append(WeightConverter(sources, weight, [DequantizeExperts()]))
        return conversions

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of an element once it is loaded, by which a device map is planned."""
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
    """A dense weight [E, K, N] -> its blocks and scales, on its device, expert by expert."""

    def __init__(self, scale_rule: str, nan_blocks: dict[str, int]) -> None:
        self.scale_rule = scale_rule
        self._nan_blocks = nan_blocks  # is told of the blocks that become NaN

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizeExperts:
        return self  # the loader copies a conversion for each weight

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
    """Blocks and scales -> the dense weight [E, K, N] of experts that stay as they are."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **_: Any
    ) -> dict[str, Tensor]:
        # Bytes may come as floats, the dtype of the weight; all of those hold 0 to 255 exactly.
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
    """A pattern for the end of a key; without $, older versions find a weight in its bias."""
    return name.replace(".", r"\.") + "$"


def _only(tensors: Any) -> Tensor:
    """The loader hands a tensor over in a list of one, or by itself."""
    return tensors[0] if isinstance(tensors, list) else tensors


def _correct_offload_index(model: nn.Module) -> None:
    """Bytes on disk stay bytes; older versions note the model's dtype for all that is there."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            prefixed = getattr(part, "weights_map", None)
            index = getattr(getattr(prefixed, "dataset", None), "index", None) or {}
            for name, entry in index.items():
                if name.endswith(_BYTES):
                    entry["dtype"] = "uint8"


def packed_like(experts: Any, name: str) -> PackedExperts:
    """Packed experts, of no values, for the place ``name`` of transformers' own.

    Raises:
        CheckpointError: their sizes do not divide into blocks.
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
    """Declare blocks and scales, still on meta, as what the loader is to read for them.

    It casts what it reads to the dtype of the parameter that it is for: a dense weight must come in
    the dtype that it is stored in, and what was quantized must stay bytes.
    """
    for name in (f"{projection}_blocks", f"{projection}_scales"):
        empty = torch.empty_like(module.get_parameter(name), dtype=dtype, device="meta")
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
