"""What packed experts need of transformers to be spread over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.huggingface.conversions import bytes_of
from mxfp4_fx.huggingface.packed import PROJECTIONS, PackedExperts


def is_spread(config: Any) -> bool:
    """Return whether transformers spreads a model over processes, given the model's config."""
    distributed = getattr(config, "distributed_config", None)
    sizes = ("tp_size", "pp_size", "fsdp_size", "dp_replicate_size")
    return any((getattr(distributed, size, 1) or 1) > 1 for size in sizes)


def is_expert_parallel(config: Any) -> bool:
    """Return whether each process has experts of its own."""
    # The newer `ep_size` sets it, too.
    return is_spread(config) and config.distributed_config.enable_expert_parallel


def is_tensor_parallel(config: Any) -> bool:
    """Return whether each process has a part of every expert."""
    distributed = getattr(config, "distributed_config", None)
    return (getattr(distributed, "tp_size", 1) or 1) > 1 and not is_expert_parallel(config)


def is_data_parallel(config: Any) -> bool:
    """Return whether FSDP holds a model's parameters, and fills them for each call."""
    distributed = getattr(config, "distributed_config", None)
    sizes = ("fsdp_size", "dp_replicate_size")
    return any((getattr(distributed, size, 1) or 1) > 1 for size in sizes)


def is_split(config: Any) -> bool:
    """Return whether a process loads less than the whole of the experts' parameters."""
    return is_expert_parallel(config) or is_data_parallel(config)


def plan_packed(model: Any) -> None:
    """Let blocks and scales be split among processes as the weight is that they stand for.

    transformers' plan names the weights of ``GptOssExperts``; it stays for those that are dense.
    """
    plan: dict[str, str] = model.ep_plan if hasattr(model, "ep_plan") else model.tp_plan
    is_any_dense = any(
        hasattr(module, PROJECTIONS[0]) and not isinstance(module, PackedExperts)
        for module in model.modules()
    )
    for name, style in list(plan.items()):
        if name.endswith(tuple(f".experts.{projection}" for projection in PROJECTIONS)):
            plan |= {f"{name}_blocks": style, f"{name}_scales": style}
            if not is_any_dense:
                del plan[name]


def cut_packed(model: Any, dense: Sequence[int], quantized: Sequence[str]) -> list[str]:
    """Plan that each rank has a part of every expert; return the tensors of files that are cut.

    Args:
        model: the model, not loaded yet, whose packed experts are there already.
        dense: layers whose experts the user or the checkpoint wants dense.
        quantized: weights that are dense in the files; they are cut before they are quantized.

    Raises:
        OptionError: there are such layers, FSDP is to share the parts, or transformers is too old.
    """
    if is_data_parallel(model.config):
        raise OptionError(
            "FSDP cannot share the parts of experts that tensor parallelism makes: pass ep_size= "
            "as well, which gives each rank whole experts"
        )
    if dense:
        raise OptionError(
            f"the experts of layers {', '.join(map(str, dense))} stay dense, and tensor "
            f"parallelism cuts packed ones only: skip none, or pass ep_size= as well"
        )
    try:
        from mxfp4_fx.huggingface import tensor_parallel
    except ImportError as error:
        raise OptionError(
            f"tensor parallelism of experts needs a newer transformers, with transformers."
            f"distributed.tensor_parallel: {error}. Upgrade it, or pass ep_size= as well"
        ) from error
    converted = {name for weight in quantized for name in bytes_of(weight)}
    names = tensor_parallel.plan_packed(model)
    short = (name[name.index("layers.") :] for name in names)
    return [name for name in short if name not in converted]
