"""The quantization method "mxfp4_fx" of transformers, which loads and saves packed experts.

transformers has its own method "mxfp4", and loads a checkpoint of that method with no config whose
class has another name than its ``Mxfp4Config``. So this file registers "mxfp4_fx" beside it, and
:class:`Mxfp4Config`, a subclass of that name, switches to it. The config of a saved model says
"mxfp4", because its files have the format that other programs know by that name.

Parameters of :class:`PackedExperts` have the names and bytes of the checkpoint, so the loader
converts nothing. There are two exceptions, with a conversion each: experts that the files hold
dense are quantized, one tensor at a time; packed experts that the user skips are dequantized.
"""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from mxfp4_fx.checkpoints import consistency, gpt_oss
from mxfp4_fx.checkpoints.checkpoint import Checkpoint, warn_of_nan_blocks
from mxfp4_fx.checkpoints.files import CONFIG, read_json
from mxfp4_fx.core import background
from mxfp4_fx.core.errors import CheckpointError, NoExpertsWarning, OptionError
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.core.skip import KEEP_DENSE, Skip
from mxfp4_fx.huggingface import parallel
from mxfp4_fx.huggingface.arguments import check_scale_rule, refuse
from mxfp4_fx.huggingface.conversions import (
    BYTES,
    OURS,
    DequantizeExperts,
    QuantizeExperts,
    bytes_of,
    exactly,
    nan_blocks,
    set_loading_dtype,
)
from mxfp4_fx.huggingface.meeting import Meeting, identity
from mxfp4_fx.huggingface.packed import PROJECTIONS, PackedExperts
from mxfp4_fx.huggingface.packed_quantizer import PackedQuantizer
from mxfp4_fx.huggingface.shards import gathered_state_dict
from mxfp4_fx.weights import mapped

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
class Mxfp4Config(transformers.Mxfp4Config):
    """The ``quantization_config`` with which transformers loads a GPT-OSS with packed experts.

    Every ``from_pretrained`` of transformers takes it, of Auto classes and of model classes, and so
    do a pipeline's ``model_kwargs`` and a trainer's ``model_init_kwargs``. The files are checked
    and the experts loaded as by :func:`mxfp4_fx.from_pretrained`. Dense experts are quantized.

    Args:
        modules_to_not_convert: names as in transformers' ``Mxfp4Config``, in addition to those of
            the checkpoint: experts that these name become dense.
        dequantize: False; transformers' own ``Mxfp4Config`` loads dense experts.
        skip: names of modules, or patterns (`core/skip.py`), whose experts become dense as well.
        scale_rule: for ``formats.quantize``, if the checkpoint has dense experts.
        quant_method: "mxfp4_fx", if the arguments are those of a dict.

    Attributes:
        given: in the config of a loaded model, the one that the user gave.
        key_mapping: patterns of names in the files -> replacements, as in transformers.
        ignore_sizes: accept tensors of other sizes than the config's, except the experts';
            transformers then initializes new ones.
        meeting: of the processes that load the model, if ``from_pretrained`` began it.

    Raises:
        OptionError: an argument has no meaning here.
    """

    given: Mxfp4Config

    def __init__(
        self,
        modules_to_not_convert: Sequence[str] | None = None,
        dequantize: bool = False,
        *,
        skip: str | Sequence[str] = (),
        scale_rule: str = "max",
        quant_method: str = OUR_METHOD,
    ) -> None:
        if dequantize:
            raise OptionError(
                "mxfp4_fx.Mxfp4Config keeps experts packed: for dense ones, pass "
                "transformers.Mxfp4Config(dequantize=True)"
            )
        if quant_method != OUR_METHOD:
            raise OptionError(f"quant_method is {quant_method!r}: it must be {OUR_METHOD!r}")
        check_scale_rule(scale_rule, "Mxfp4Config")
        super().__init__(None if modules_to_not_convert is None else list(modules_to_not_convert))
        self.quant_method = OUR_METHOD
        self.scale_rule = scale_rule
        self.skip = Skip.of(skip)
        self.key_mapping: Mapping[str, str] = {}
        self.ignore_sizes = False
        self.meeting: Meeting | None = None

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what transformers sets on the config that it makes of a packed checkpoint's.

        With this ``quant_method``, that config selects our quantizer, which takes the rest from
        `given`.
        """
        return {"quant_method": OUR_METHOD, "given": self}

    @classmethod
    def merged(cls, config: Any) -> Mxfp4Config:
        """Return a config of our own for the one that transformers passes to the quantizer.

        Args:
            config: what the user gave, if the checkpoint has no ``quantization_config``; else
                transformers' config of that, or the merged one of a loaded model, with our loading
                attributes.
        """
        given: Mxfp4Config = getattr(config, "given", config)
        merged = copy.copy(given)  # the user may load another model with the one given
        merged.given = given
        stored = None if config is given else config.modules_to_not_convert
        if stored is None:
            stored = gpt_oss.not_converted_by_default()
        entries = [*stored, *(given.modules_to_not_convert or ())]
        merged.modules_to_not_convert = list(dict.fromkeys(entries))
        return merged

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry as a dict does: transformers asks a model's config so if it is reused."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """Return ``quantization_config`` of a saved model, with the method that others know."""
        return gpt_oss.quantized_config(self.modules_to_not_convert or ())


@register_quantizer(OUR_METHOD)
class PackedMxfp4Quantizer(PackedQuantizer):
    """The quantizer that puts :class:`PackedExperts` into a model before its weights are loaded."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(Mxfp4Config.merged(quantization_config), **kwargs)

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: Sequence[str] | None = None,
        use_kernels: bool = False,
        **_: Any,
    ) -> None:
        if use_kernels:
            refuse("use_kernels")
        distributed = parallel.config_of(model)
        parallel.refuse_older(distributed)
        meeting = self.quantization_config.meeting or Meeting(parallel.is_spread(distributed))
        # Nothing here sees what fails between the two methods, but then this quantizer dies.
        weakref.finalize(self, meeting.fail)
        self._meeting = meeting
        with meeting:
            self._replace_experts(model, checkpoint_files or ())

    def _replace_experts(self, model: Any, checkpoint_files: Sequence[str]) -> None:
        settings, distributed = self.quantization_config, parallel.config_of(model)
        is_spread = parallel.is_spread(distributed)
        is_split = parallel.is_expert_parallel(distributed)
        checkpoint = _opened(checkpoint_files, model.config, renaming(settings.key_mapping))
        check(checkpoint, ignore_sizes=settings.ignore_sizes)
        if is_spread:
            self._meeting.compare(identity(checkpoint, model.config, settings))
        consistency.warn_of_strays(checkpoint)
        entries = settings.modules_to_not_convert
        skipped = {layer for entry in entries for layer in checkpoint.matching(entry)}
        more = checkpoint.skipped(settings.skip) - skipped
        # Counted while the loader works. Processes that share the experts read no more than their
        # own, and count these later.
        self._counted = dict if is_spread else background.begin(checkpoint.nan_blocks, self)
        self._nan_blocks: dict[str, int] = {}
        self._to_quantize: list[str] = []
        self._to_dequantize: list[str] = []
        dense: list[str] = []
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
                dense.append(name)
                continue
            found = True
            with torch.device("meta"):
                packed = packed_like(experts, name)
            if not is_packed:
                self._to_quantize += weights
                for projection, weight in zip(PROJECTIONS, weights, strict=True):
                    dtype = checkpoint.tensors[checkpoint.prefix + weight].dtype
                    set_loading_dtype(packed, projection, dtype, is_split=is_split)
            parent, child = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), child, packed)
        parallel.refuse_quantizing(distributed, self._to_quantize)
        if is_split:
            parallel.plan_packed(model)
            parallel.refuse_eager(model.config, dense)
        self._cutting = parallel.cut_packed(model, dense, self._to_quantize)
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
        with self._meeting:
            self._finish(model)
            self._meeting.end()
        return model

    def _finish(self, model: Any) -> None:
        distributed = parallel.config_of(model)
        for name, module in model.named_modules():
            if isinstance(module, PackedExperts):
                module.requires_grad_(False)  # the loader makes every float a trainable parameter
                if not parallel.is_data_parallel(distributed):  # FSDP knows the parameters it wraps
                    module.keep_shards()
                if parallel.is_spread(distributed):
                    self._nan_blocks |= nan_blocks(module, name)
            elif isinstance(module, GptOssExperts):
                setattr(module, KEEP_DENSE, True)  # skipped: the backend leaves it dense, too
        warn_of_nan_blocks(self._counted() | self._nan_blocks)
        del self._counted  # threads cannot be copied, and models are, with their quantizers
        # The disk works while the caller goes on, until a weight is used.
        mapped.read_model_ahead(model, (m for m in model.modules() if isinstance(m, PackedExperts)))
        _correct_offload_index(model)
        # With these conversions, save_pretrained would undo them. It has to save packed experts as
        # they are, and all tensors under the model's names.
        mapping = self.quantization_config.key_mapping
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(isinstance(step, OURS) for step in getattr(conversion, "operations", ()))
            and not (isinstance(conversion, WeightRenaming) and mapping)
        ]

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return what is saved: None, for transformers' own, unless processes share the experts.

        Raises:
            CheckpointError: this process has some layers only.
        """
        parallel.refuse_to_save_a_part(parallel.config_of(model))
        return gathered_state_dict(model), {}

    def get_weight_conversions(self) -> list[Any]:
        """Return a conversion for each weight whose form differs between files and model."""
        conversions = [*self._cutting]
        for weight in self._to_quantize:
            quantize_it = QuantizeExperts(self.quantization_config.scale_rule, self._nan_blocks)
            conversions.append(WeightConverter(exactly(weight), bytes_of(weight), [quantize_it]))
        for weight in self._to_dequantize:
            sources = [exactly(name) for name in bytes_of(weight)]
            conversions.append(WeightConverter(sources, weight, [DequantizeExperts()]))
        return conversions


def _opened(files: Sequence[str], config: Any, rename: Callable[[str], str] = str) -> Checkpoint:
    """Return the checkpoint of these files, with the ``config.json`` beside them.

    If there is none, as with a config that the user passes and a model on the Hub, the model's
    config takes its place.
    """
    beside = Path(files[0]).with_name(CONFIG) if files else Path(CONFIG)
    if files and beside.is_file():
        checkpoint = Checkpoint(files, read_json(beside), rename)
        checkpoint.config_name = str(beside)
        return checkpoint
    # What this config says of the experts is not the files' own word: either form will do.
    quantization = {"quantization_config": gpt_oss.quantized_config(())}
    return Checkpoint(files, {**config.to_dict(), **quantization}, rename)


def _correct_offload_index(model: nn.Module) -> None:
    """Record uint8 for bytes offloaded to disk: older versions record the model's dtype."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            prefixed = getattr(part, "weights_map", None)
            index = getattr(getattr(prefixed, "dataset", None), "index", None) or {}
            for name, entry in index.items():
                if name.endswith(BYTES):
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
