"""``mxfp4_fx.from_pretrained``: a model whose experts stay packed."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mxfp4_fx.checkpoints import gpt_oss
from mxfp4_fx.checkpoints.checkpoint import Checkpoint
from mxfp4_fx.checkpoints.files import CONFIG, directory_of, read_config
from mxfp4_fx.checkpoints.gpt_oss import MODEL_TYPE
from mxfp4_fx.checkpoints.packed_formats import (
    Format,
    format_of,
    packed_weights,
    quantization_config,
)
from mxfp4_fx.checkpoints.single_experts import is_of_another_family, to_quantize
from mxfp4_fx.core import collector
from mxfp4_fx.core.errors import CheckpointError, OptionError
from mxfp4_fx.core.skip import Skip, not_converted
from mxfp4_fx.core.torch_private import FakeTensorMode
from mxfp4_fx.core.version import OLDEST_TRANSFORMERS, too_old_transformers
from mxfp4_fx.huggingface.arguments import (
    REFUSED,
    check_scale_rule,
    refuse,
    refuse_for_families,
    require_transformers_for_families,
)

_NEEDED = f"transformers {OLDEST_TRANSFORMERS} or newer (pip install --upgrade transformers)"
_HUB_OPTIONS = (
    *("cache_dir", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token"),
)


@collector.young_only()
def from_pretrained(
    path: str | os.PathLike[str],
    *,
    auto_class: Any = None,
    skip: str | Sequence[str] = (),
    scale_rule: str = "max",
    experts_device: torch.device | str | int | None = None,
    requantize: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a model through transformers; its experts keep the bytes of the checkpoint.

    The checkpoint is a GPT-OSS, or a model of another family in one of the formats of
    docs/families.md, or dense. Dense experts (float32, bfloat16, float16) are quantized while they
    are loaded, one tensor or one projection of a layer at a time. What else than experts is MXFP4
    in the files of another family becomes dense.

    Args:
        path: a directory, or a model's name on the Hub.
        auto_class: the transformers class that loads it; None means ``AutoModelForCausalLM``.
        skip: names of modules, or patterns (`core/skip.py`), whose experts become transformers'
            dense ones, in addition to those that ``modules_to_not_convert`` of the checkpoint
            names. In another family's checkpoint, they must be dense in the files.
        scale_rule: for ``formats.quantize``, if the checkpoint has dense experts.
        experts_device: the device on which packed experts stay (``placement.place_experts``), "cpu"
            beside a GPU for example; ``device_map`` then names the one device of the rest. None
            means that they go where the rest goes.
        requantize: whether ``save_pretrained`` rounds again what was MXFP4 or FP8 in the files, is
            no expert's and has changed since; otherwise it raises a CheckpointError.
        kwargs: further arguments of transformers' ``from_pretrained``: dtype, device_map, ...
            With ``distributed_config=DistributedConfig(tp_size=W, ep_size=W)`` all W processes of
            torch.distributed call this, and each loads its own part of the experts.
            A model that is loaded with ``key_mapping`` is saved under its own names, not those of
            the files.

    Returns:
        The model, on the CPU unless ``device_map`` says otherwise. It can be run, compiled
        (``backend="mxfp4"``) and saved (``save_pretrained`` writes an MXFP4 checkpoint).

    Raises:
        CheckpointError: the checkpoint does not exist, is damaged, or is neither a GPT-OSS in MXFP4
            nor in a format of docs/families.md nor has dense experts; or transformers is not
            installed, or too old; or another process that loads the model fails, or loads another
            one.
        OptionError: an argument of transformers is not supported, a pattern of ``skip`` names no
            experts, ``scale_rule`` or ``experts_device`` is unknown, or ``device_map`` names no
            single device beside ``experts_device``.
    Warns:
        CheckpointWarning: the files hold tensors that the model does not have, or the index
            disagrees with the shards.
        NanWeightsWarning: blocks are NaN.
        NoExpertsWarning: all experts are skipped.
    """
    for name in REFUSED:
        if kwargs.get(name) not in (None, False):
            refuse(name)
    if kwargs.get("use_safetensors") is False:
        raise OptionError("from_pretrained(..., use_safetensors=False): pickles are not read")
    check_scale_rule(scale_rule, "from_pretrained")
    _require_transformers()
    try:
        import transformers
        from safetensors import SafetensorError

        from mxfp4_fx.huggingface.meeting import Meeting
        from mxfp4_fx.huggingface.parallel import is_spread
        from mxfp4_fx.huggingface.placement import devices, place_experts
        from mxfp4_fx.huggingface.quantizer import Mxfp4Config, check, renaming
    except ImportError as error:
        raise CheckpointError(f"loading needs {_NEEDED}: {error}") from error

    distributed = kwargs.get("distributed_config")
    if isinstance(distributed, dict):
        from transformers.distributed import DistributedConfig

        kwargs["distributed_config"] = distributed = DistributedConfig.from_dict(distributed)
    rest = None
    if experts_device is not None:  # no map: with one, accelerate's hooks would move the weights
        if is_spread(distributed):
            raise OptionError(
                "from_pretrained(..., experts_device=..., distributed_config=...): pass one of them"
            )
        experts_device, rest = devices(experts_device, kwargs.pop("device_map", None))
    path = os.path.expanduser(os.fspath(path))
    mapping, ignore_sizes = kwargs.get("key_mapping") or {}, kwargs.get("ignore_mismatched_sizes")
    rename = renaming(mapping)
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    form = _format_of(path, hub)
    is_dense_family = form is None and _has_dense_experts(path, hub)
    quantization: Any
    if is_dense_family:
        require_transformers_for_families("dense experts")
        from mxfp4_fx.huggingface.family_quantizing import QuantizeFamilyConfig

        refuse_for_families(ignore_mismatched_sizes=ignore_sizes)
        quantization = QuantizeFamilyConfig(skip=skip, scale_rule=scale_rule)
    elif form is None:
        quantization = Mxfp4Config(skip=skip, scale_rule=scale_rule)
        quantization.ignore_sizes = bool(ignore_sizes)
    else:
        from mxfp4_fx.huggingface.family_quantizer import FamilyConfig

        refuse_for_families(skip=skip, ignore_mismatched_sizes=ignore_sizes)
        quantization = FamilyConfig(requantize=requantize)
    quantization.key_mapping = mapping
    auto_class = auto_class or transformers.AutoModelForCausalLM
    kwargs["use_safetensors"] = True  # None would allow pickles
    with Meeting(is_spread(distributed)) as quantization.meeting:
        is_local = os.path.isdir(path) and kwargs.get("variant") is None
        if form is not None:
            if is_local:
                packed_weights(Checkpoint.open(Path(path, hub.get("subfolder", "")), rename), form)
        elif is_dense_family:
            pass  # the quantizer checks the files
        elif is_local:
            checkpoint = Checkpoint.open(Path(path, hub.get("subfolder", "")), rename)
            check(checkpoint, ignore_sizes=bool(ignore_sizes))
        else:  # the quantizer checks the files after transformers has found or downloaded them
            _check_config(path, hub)
        config, kwargs = _model_config(path, hub, kwargs)
        if (
            form is not None or is_dense_family
        ):  # with it, transformers would insist on its own quantizer
            for part in (config, config.get_text_config()):
                vars(part).pop("quantization_config", None)
        try:
            model = auto_class.from_pretrained(
                path, config=config, quantization_config=quantization, **hub, **kwargs
            )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    if experts_device is not None:
        place_experts(model, experts_device)
    return model if rest is None else model.to(rest)


@contextlib.contextmanager
def empty_model(path: str, dtype: torch.dtype, experts: str | None = None) -> Iterator[Any]:
    """Yield the causal language model of a checkpoint's ``config.json``, with fake tensors.

    Fake tensors have shapes but no memory, so a model of any size can be explained on any machine.
    Inside the context, torch's factory functions make fake tensors, too.

    Which experts are packed, and that the files are the model's, is read from their headers. If
    there are no weights, the config says it.

    Args:
        path: a directory with a ``config.json``.
        dtype: the dtype of the parameters.
        experts: transformers' ``experts_implementation``, for dense experts. None means packed
            experts, as :func:`from_pretrained` loads them.

    Raises:
        CheckpointError: the file is missing or describes neither a GPT-OSS nor a model in a format
            of docs/families.md nor one with dense experts; or the weights are not those of the
            config, or damaged; or transformers is not installed, or too old.
        OptionError: transformers has no implementation of that name.
    """
    _require_transformers()
    try:
        from transformers import AutoModelForCausalLM
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        from mxfp4_fx.huggingface import family_plan
        from mxfp4_fx.huggingface.activations import activation_of
        from mxfp4_fx.huggingface.family_plan import is_family
        from mxfp4_fx.huggingface.quantizer import check, packed_like
    except ImportError as error:
        raise CheckpointError(f"this needs {_NEEDED}: {error}") from error
    directory = directory_of(path)
    content, named = read_config(directory), str(directory / CONFIG)
    form = format_of(content, named)
    is_gpt_oss = form is None and not _is_dense_family(content)
    checkpoint = Checkpoint.open(directory) if any(directory.glob("*.safetensors")) else None
    kept: list[str] = []
    if is_gpt_oss:
        gpt_oss.sizes(content, named)
        method, kept = gpt_oss.quantization(content, named)
        gpt_oss.require_method(method, named)
        if checkpoint is not None:
            check(checkpoint)
    known = ("eager", *ALL_EXPERTS_FUNCTIONS)
    if experts is not None and experts not in known:
        raise OptionError(
            f"transformers has no experts implementation {experts!r}: it has {', '.join(known)}"
        )
    config, _ = _model_config(str(directory), {"local_files_only": True}, {})
    vars(config).pop("quantization_config", None)
    kwargs = {"experts_implementation": experts} if experts else {}
    mode = FakeTensorMode()
    with mode:
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs).eval()
        except Exception as error:  # of any class: transformers uses the config's values unchecked
            raise CheckpointError(
                f"transformers cannot make the model of {named} ({_one_line(error)}): "
                f"{gpt_oss.ITS_CONFIG}"
            ) from error
    if form is not None and form.stacked and not any(map(is_family, model.modules())):
        raise CheckpointError(
            f"model_type is {content.get('model_type')!r} in {named}, a model without experts, and "
            f"{form.name} is a format of experts: {gpt_oss.ITS_CONFIG}"
        )
    stacked = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, GptOssExperts) if is_gpt_oss else is_family(module))
        and experts is None
        and not any(not_converted(entry, name) for entry in kept)
    }
    # Dense files that nobody wants packed may hold experts in any way.
    if checkpoint is not None and not is_gpt_oss and (form is not None or experts is None):
        packed_names = _packed_in(model, checkpoint, form)
        stacked = {name: module for name, module in stacked.items() if name in packed_names}
    # Found by computing it, with numbers that are not fake.
    found = {} if is_gpt_oss else {n: activation_of(m, n) for n, m in stacked.items()}
    with mode:
        for name, module in stacked.items():
            if is_gpt_oss:
                packed = packed_like(module, name)
                packed.gate_up_proj_bias = module.gate_up_proj_bias
                packed.down_proj_bias = module.down_proj_bias
            else:
                packed = family_plan.packed_like(module, name, found[name])
            parent, child = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), child, packed.requires_grad_(False))
        yield model


def _packed_in(model: Any, checkpoint: Checkpoint, form: Format | None) -> set[str]:
    """Return the experts of another family that its files hold packed, or whose loader packs them.

    Raises:
        CheckpointError: the files are not the model's, or have no experts that could be packed.
    """
    from mxfp4_fx.huggingface.family_plan import plan_of
    from mxfp4_fx.huggingface.family_quantizing import dense_plan_of

    if form is not None:
        return {*plan_of(model, checkpoint, packed_weights(checkpoint, form)).experts}
    if not is_of_another_family(checkpoint):
        raise CheckpointError(
            f"the files beside {checkpoint.config_name} hold no experts that could be quantized: "
            "name transformers' own experts (--experts grouped_mm) to explain the dense model"
        )
    return {*dense_plan_of(model, checkpoint, to_quantize(checkpoint, Skip.of(())), {})}


def _format_of(path: str, hub: dict[str, Any]) -> Format | None:
    """Return the format of another family's checkpoint; None for GPT-OSS and for what is none.

    Raises:
        CheckpointError: the format cannot be read.
    """
    from transformers import PretrainedConfig

    try:
        config: dict[str, Any] = PretrainedConfig.get_config_dict(path, **hub)[0]
    except Exception:  # of any class: what is wrong is said by the checks of a GPT-OSS
        return None
    return format_of(config, f"{CONFIG} of {path}")


def _has_dense_experts(path: str, hub: dict[str, Any]) -> bool:
    """Return whether a config is of a model of another family, with experts, and not quantized."""
    from transformers import PretrainedConfig

    try:
        return _is_dense_family(PretrainedConfig.get_config_dict(path, **hub)[0])
    except Exception:  # of any class: what is wrong is said by the checks of a GPT-OSS
        return False


def _is_dense_family(config: dict[str, Any]) -> bool:
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    return (
        config.get("model_type") not in (None, MODEL_TYPE)
        and not quantization_config(config)
        and any(isinstance(text.get(key), int) and text[key] > 0 for key in _COUNTS)
    )


# What families' configs call the number of experts.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _require_transformers() -> None:
    """Raise a CheckpointError if transformers is too old, before it lacks a name to import."""
    version = too_old_transformers()
    if version is not None:
        raise CheckpointError(f"this needs {_NEEDED}: {version} is installed")


def _check_config(path: str, hub: dict[str, Any]) -> None:
    """Check the ``config.json`` of a model on the Hub, or of a directory.

    Raises:
        CheckpointError: it cannot be read, or is not that of a GPT-OSS in MXFP4 or dense.
    """
    from transformers import PretrainedConfig

    is_local = os.path.isabs(path) or path.startswith(".") or path.count("/") > 1
    if not os.path.isdir(path) and (is_local or os.path.exists(path)):
        raise CheckpointError(f"{path} is no directory: name one, or a model on the Hub")
    try:
        config: dict[str, Any] = PretrainedConfig.get_config_dict(path, **hub)[0]
    except OSError as error:
        raise CheckpointError(f"{path} has no {CONFIG} that can be read: {error}") from error
    if not config:
        raise CheckpointError(f"{path} has no {CONFIG}: name a directory, or a model on the Hub")
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path} has a model of type {config.get('model_type')}, and no MXFP4 in a format of "
            f"docs/families.md and no dense experts: only GPT-OSS ({MODEL_TYPE}) is loaded from "
            "other files"
        )
    gpt_oss.require_method(gpt_oss.quantization(config, f"{CONFIG} of {path}")[0], path)


def _model_config(
    path: str, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the model's config, which the caller may change, and the arguments that remain."""
    from transformers import AutoConfig, PretrainedConfig

    given = kwargs.pop("config", None)
    if isinstance(given, PretrainedConfig):
        config = copy.deepcopy(given)
        quantized = vars(config).pop("quantization_config", None)
        if quantized:  # of a model that was loaded, it is no dict, which older versions ask for
            as_dict = quantized if isinstance(quantized, dict) else quantized.to_dict()
            config.quantization_config = as_dict
        return config, kwargs
    # AutoConfig would not give a dtype back, and would take "auto" for a dtype.
    dtypes = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
    try:
        config, unused = AutoConfig.from_pretrained(
            path if given is None else given, return_unused_kwargs=True, **hub, **kwargs
        )
    except Exception as error:  # huggingface_hub's classes differ between versions
        raise CheckpointError(
            f"transformers rejects the {CONFIG} of {path}: {_one_line(error)}"
        ) from error
    return config, unused | dtypes


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
