"""Tensor parallelism of experts: each rank holds a range of the channels of I, of every expert.

``gate_up_proj`` loses columns, gate and up of a channel together; ``down_proj`` loses the rows of
the same channels. So a rank's SwiGLU computes what its part of ``down_proj`` multiplies, and the
ranks' results add up. ``down_proj_bias`` counts once: on the first rank.

Packed experts hold plain tensors, of which `block_shards.py` knows what they are parts of. Dense
experts are DTensors, and can be cut only where all ranges are equal.

transformers has no such plan for GPT-OSS. For the rest of the model its own plan is in force.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    TensorParallelLayer,
    _AllReduceForward,
)

from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.huggingface.block_shards import DENSE, ONCE, PACKED, BlockShard, block_range
from mxfp4_fx.huggingface.packed import PackedExperts

STYLE = "mxfp4_tp"  # of the experts' parameters
EXPERTS_STYLE = "mxfp4_tp_experts"  # of the module


class _CutParameters(TensorParallelLayer):
    """The style that declares, before weights are loaded, what a rank holds of a parameter."""

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        blocks = _blocks_of(module)
        size = mesh.size()
        if size > blocks:
            raise OptionError(
                f"tp_size is {size}: experts with an intermediate size of {blocks * BLOCK} have "
                f"{blocks} blocks of {BLOCK}, so {blocks} ranks can share them at most. Use fewer, "
                f"or ep_size={size}"
            )
        whole = module.get_parameter(param)
        shard = BlockShard.of(param, whole.shape, mesh)
        if isinstance(module, PackedExperts):
            module.cuts[param] = shard
            made = shard.part_of(whole)
            first, end = block_range(blocks, mesh.get_local_rank(), size)
            module.intermediate_size = (end - first) * BLOCK
        elif shard.dim is None:
            return  # the module's style lets it count once
        else:
            if blocks % size:
                raise OptionError(
                    f"tp_size is {size}: dense experts are cut into equal parts, and {blocks} "
                    f"blocks of {BLOCK} have none for {size} ranks. Load them packed "
                    f"(mxfp4_fx.from_pretrained), or take one of {_divisors(blocks)}"
                )
            from torch.distributed.tensor import Shard, distribute_tensor

            made = distribute_tensor(whole, mesh, [Shard(shard.dim)], src_data_rank=None)
        module.register_parameter(param, nn.Parameter(made, requires_grad=whole.requires_grad))


class _SumOfParts(type(ALL_PARALLEL_STYLES["moe_tp_experts"])):  # type: ignore[misc]
    """transformers' style that adds up the ranks' results; dense experts' bias counts once."""

    @contextlib.contextmanager
    def context_around_forward(self, module: nn.Module, mesh: Any) -> Iterator[None]:
        with super().context_around_forward(module, mesh):
            if isinstance(module, PackedExperts) or mesh.get_local_rank() == 0:
                yield  # packed experts hold zeros on the other ranks
                return
            bias = module._parameters[ONCE]
            assert bias is not None
            module._parameters[ONCE] = torch.zeros_like(bias)  # type: ignore[assignment]
            try:
                yield
            finally:
                module._parameters[ONCE] = bias

    def transform_output_post_forward(
        self, module: nn.Module, output: Any, mesh: Any, source: Any = None
    ) -> Any:
        # Older versions add up only if they see DTensors, which packed experts do not hold.
        return _AllReduceForward.apply(output, mesh.get_group())


ALL_PARALLEL_STYLES.register(STYLE, _CutParameters())
ALL_PARALLEL_STYLES.register(EXPERTS_STYLE, _SumOfParts())


def plan(prefix: str = "model.") -> dict[str, str]:
    """Return the plan for dense experts: ``DistributedConfig(tp_size=.., tp_plan=plan())``.

    Args:
        prefix: of the layers' names; "" for a model without a head.
    """
    experts = f"{prefix}layers.*.mlp.experts"
    return {f"{experts}.{name}": STYLE for name in (*DENSE, ONCE)} | {experts: EXPERTS_STYLE}


def plan_packed(model: Any) -> list[str]:
    """Add the plan for packed experts to a model's own, before its weights are loaded.

    Returns:
        The names of the parameters that the plan cuts.
    """
    experts = {n: m for n, m in model.named_modules() if isinstance(m, PackedExperts)}
    names = [f"{name}.{parameter}" for name in experts for parameter in (*PACKED, ONCE)]
    planned = dict.fromkeys(names, STYLE) | dict.fromkeys(experts, EXPERTS_STYLE)
    model.tp_plan |= {re.sub(r"\.\d+\.", ".*.", name): style for name, style in planned.items()}
    return names


def _blocks_of(module: nn.Module) -> int:
    """Return the blocks of I of whole experts."""
    for shard in getattr(module, "cuts", {}).values():
        if shard.dim is not None:  # the module's own sizes are those of a part
            return int(shard.shape[shard.dim] // shard.unit)
    size: int = module.intermediate_size  # type: ignore[assignment]
    if size % BLOCK:
        raise OptionError(
            f"experts with an intermediate size of {size}, which is no multiple of {BLOCK}, have "
            f"no blocks that ranks could share: use ep_size="
        )
    return size // BLOCK


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(2, number + 1) if number % d == 0)
