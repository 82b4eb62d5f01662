"""What packed experts need of transformers to be spread over processes."""

from __future__ import annotations

from typing import Any

from mxfp4_fx.core.errors import CheckpointError, OptionError
from mxfp4_fx.core.version import OLDEST_TO_SPREAD, can_spread
from mxfp4_fx.huggingface.packed import PROJECTIONS, PackedExperts

_TOO_OLD = (
    "from_pretrained(..., distributed_config=...) with packed experts needs transformers "
    f"{OLDEST_TO_SPREAD} or newer (pip install --upgrade transformers)"
)
_DATA_PARALLEL = ("fsdp_size", "dp_replicate_size")


def config_of(model: Any) -> Any:
    """Return transformers' ``DistributedConfig`` of a model, or None."""
    return getattr(model.config, "distributed_config", None)


def is_spread(distributed: Any) -> bool:
    """Return whether transformers spreads a model over processes.

    Args:
        distributed: the ``distributed_config`` of its config, or None.
    """
    return any(_size(distributed, size) > 1 for size in ("tp_size", "pp_size", *_DATA_PARALLEL))


def is_expert_parallel(distributed: Any) -> bool:
    """Return whether each process has experts of its own."""
    # The newer `ep_size` sets this, too.
    return is_spread(distributed) and bool(distributed.enable_expert_parallel)


def is_data_parallel(distributed: Any) -> bool:
    """Return whether FSDP holds a model's parameters, and fills them for each call."""
    return any(_size(distributed, size) > 1 for size in _DATA_PARALLEL)


def _size(distributed: Any, name: str) -> int:
    return getattr(distributed, name, 1) or 1


def refuse_older(distributed: Any) -> None:
    """Raise OptionError if this transformers spreads models in a way that we do not know."""
    if not can_spread() and distributed is not None:
        raise OptionError(_TOO_OLD)


def refuse_quantizing(distributed: Any, weights: list[str]) -> None:
    """Raise OptionError if FSDP is to spread weights that are quantized while they are loaded."""
    if weights and is_data_parallel(distributed):  # it knows their sizes from before
        raise OptionError(
            f"{weights[0]} is dense, and FSDP cannot spread what is quantized while it is loaded: "
            "write an MXFP4 checkpoint first, with mxfp4_fx.quantize_checkpoint(...)"
        )


def refuse_eager(config: Any, dense: list[str]) -> None:
    """Raise OptionError for experts that transformers itself cannot run once they are spread.

    Args:
        config: of the model.
        dense: the names of experts that do not become packed.
    """
    distributed = config.distributed_config
    # Its loop gives ids of other processes' experts to `one_hot`, which has no class for them.
    is_all_reduce = getattr(distributed, "ep_implementation", "auto") in ("auto", "all_reduce")
    if dense and is_all_reduce and config._experts_implementation == "eager":
        raise OptionError(
            f"{dense[0]} is to stay dense, and transformers' eager experts crash where they are "
            "spread over processes: pass experts_implementation='grouped_mm'"
        )


def refuse_to_save_a_part(distributed: Any) -> None:
    """Raise CheckpointError if transformers would write one process's layers as the model."""
    if _size(distributed, "pp_size") > 1:
        raise CheckpointError(
            "a model in pipeline stages cannot be saved, for each process has some layers only: "
            "load it without pp_size to save it"
        )


def plan_packed(model: Any) -> None:
    """Let blocks and scales be split among processes as the weight is that they stand for.

    transformers' plan names the weights of ``GptOssExperts``; it stays for those that are dense.

    Raises:
        OptionError: the plan is that of a transformers which would not add up what they compute.
    """
    plan: dict[str, str] = model.ep_plan if hasattr(model, "ep_plan") else model.tp_plan
    if "ep_dispatch_experts" not in plan.values():
        # Before, the sum over processes depended on DTensors that are no longer there at a call.
        raise OptionError(_TOO_OLD)
    is_any_dense = any(
        hasattr(module, PROJECTIONS[0]) and not isinstance(module, PackedExperts)
        for module in model.modules()
    )
    for name, style in list(plan.items()):
        if name.endswith(tuple(f".experts.{projection}" for projection in PROJECTIONS)):
            plan |= {f"{name}_blocks": style, f"{name}_scales": style}
            if not is_any_dense:
                del plan[name]
