"""GPT-OSS experts whose weights stay packed: what a model from an MXFP4 checkpoint holds.

Uncompiled, it computes by the ops' plain-PyTorch meaning, which dequantizes the experts that are
hit, one at a time. Dynamo captures these ops whole, and ``passes/patterns.py`` knows them as the
form ``packed``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import mxfp4_fx.ops.schemas  # noqa: F401  (defines torch.ops.mxfp4)
from mxfp4_fx.errors import SlowKernelsWarning
from mxfp4_fx.formats import BLOCK, BYTES_PER_BLOCK
from mxfp4_fx.freed import DeferredTensor, is_freed
from mxfp4_fx.gpt_oss import PROJECTIONS
from mxfp4_fx.weights import STORE


class PackedExperts(nn.Module):
    """Stands where transformers has ``GptOssExperts``, with the names and bytes of a checkpoint.

    Shape letters: T tokens, E experts, A experts per token, H hidden, I intermediate.

    Attributes:
        gate_up_proj_blocks, gate_up_proj_scales: uint8 [E, 2I, H/32, 16] and [E, 2I, H/32]; gate in
            the even rows, up in the odd.
        down_proj_blocks, down_proj_scales: uint8 [E, H, I/32, 16] and [E, H, I/32].
        gate_up_proj_bias, down_proj_bias: [E, 2I] and [E, H].
        alpha, limit: SwiGLU's constants.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.alpha = alpha
        self.limit = limit
        sizes = ((2 * intermediate_size, hidden_size), (hidden_size, intermediate_size))
        for name, (n, k) in zip(PROJECTIONS, sizes, strict=True):
            shape = (num_experts, n, k // BLOCK)
            self.register_parameter(f"{name}_blocks", _bytes(*shape, BYTES_PER_BLOCK))
            self.register_parameter(f"{name}_scales", _bytes(*shape))
            bias = nn.Parameter(torch.empty(num_experts, n), requires_grad=False)
            self.register_parameter(f"{name}_bias", bias)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """As every module's; freed weights are read when, and if, their values are asked for."""
        for name, parameter in self._parameters.items():
            if keep_vars or parameter is None:
                destination[prefix + name] = parameter
            elif is_freed(parameter):
                read = functools.partial(STORE.values, parameter)
                destination[prefix + name] = DeferredTensor.of(parameter, read)
            else:
                destination[prefix + name] = parameter.detach()

    def forward(
        self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor
    ) -> Tensor:
        """The experts' weighted sum [T, H] for tokens [T, H] with routes [T, A] chosen already.

        Ids from E on mark routes to experts that are held elsewhere: they count nothing.
        """
        gammas, gather_index, scatter_index, offsets = torch.ops.mxfp4.routing.routes(
            router_indices, routing_weights, self.num_experts
        )
        inner = torch.ops.mxfp4.matmul_ogs(
            hidden_states,
            self.gate_up_proj_blocks,
            self.gate_up_proj_scales,
            self.gate_up_proj_bias,
            offsets,
            gather_index=gather_index,
            activation="swiglu",
            alpha=self.alpha,
            limit=self.limit,
        )
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            _warn_of_export()
        out: Tensor = torch.ops.mxfp4.matmul_ogs(
            inner,
            self.down_proj_blocks,
            self.down_proj_scales,
            self.down_proj_bias,
            offsets,
            scatter_index=scatter_index,
            gammas=gammas,
            experts_per_token=router_indices.shape[1],
        )
        return out


# Strict export runs this as it is, instead of tracing it.
@torch.compiler.assume_constant_result
def _warn_of_export() -> None:
    warnings.warn(
        "packed experts are exported with the reference kernels, which are slow everywhere: "
        "backend='mxfp4' chooses kernels when it compiles a model, and an exported program is not "
        "compiled by it. torch.compile(model, backend='mxfp4') runs them in MXFP4",
        SlowKernelsWarning,
        stacklevel=2,
    )


def _bytes(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)
