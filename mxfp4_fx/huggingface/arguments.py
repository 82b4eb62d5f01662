"""Arguments of transformers' ``from_pretrained`` with which experts cannot be loaded packed."""

from __future__ import annotations

from typing import Any, NoReturn

from mxfp4_fx.core.errors import CheckpointError, OptionError
from mxfp4_fx.core.formats import SCALE_RULES
from mxfp4_fx.core.version import OLDEST_FOR_FAMILIES, too_old_for_families

REFUSED = {
    "quantization_config": "the checkpoint says how it is quantized; pass skip= or scale_rule=",
    "state_dict": "weights are read from files",
    "gguf_file": "weights are read from safetensors files",
    "use_kernels": "other kernels would replace the packed experts",
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit"),
        "experts are MXFP4 already; the rest of the model stays as it is",
    ),
    **dict.fromkeys(
        ("tp_plan", "tp_size", "device_mesh"),
        "pass distributed_config=DistributedConfig(...)",
    ),
}


def refuse(argument: str) -> NoReturn:
    """Raise the OptionError for an argument in REFUSED."""
    raise OptionError(f"from_pretrained(..., {argument}=...) is not supported: {REFUSED[argument]}")


def check_scale_rule(scale_rule: str, called: str) -> None:
    """Raise OptionError if `formats.quantize` has no such rule.

    Args:
        scale_rule: the name of the rule.
        called: what it is an argument of.
    """
    if scale_rule not in SCALE_RULES:
        known = " or ".join(map(repr, SCALE_RULES))
        raise OptionError(f"{called}(..., scale_rule={scale_rule!r}): it must be {known}")


def require_transformers_for_families(what: str) -> None:
    """Raise CheckpointError if transformers is too old for other families than GPT-OSS.

    Args:
        what: the subject of the message.
    """
    version = too_old_for_families()
    if version is not None:
        raise CheckpointError(
            f"{what} of other families than GPT-OSS need transformers {OLDEST_FOR_FAMILIES} or "
            f"newer (pip install --upgrade transformers): {version} is installed"
        )


_NOT_FOR_FAMILIES = {  # what cannot be had, why, and the remedy
    "skip": "packed checkpoints of other families than GPT-OSS, whose experts stay packed: "
    "quantize the dense original with skip=, or make all experts dense with "
    "mxfp4_fx.dequantize(model)",
    "ignore_mismatched_sizes": "checkpoints of other families than GPT-OSS, whose sizes must be "
    "those of config.json: leave it out",
}


def refuse_for_families(**given: Any) -> None:
    """Raise the OptionError for an argument that only GPT-OSS checkpoints take."""
    if named := next((name for name, value in given.items() if value), None):
        raise OptionError(
            f"from_pretrained(..., {named}=...) is not for {_NOT_FOR_FAMILIES[named]}"
        )
