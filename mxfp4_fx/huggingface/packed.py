"""`PackedExperts`: experts whose weights stay packed, as in an MXFP4 checkpoint.

Uncompiled, the module calls the reference implementation of the ops, which dequantizes the experts
that are hit, one at a time. For freed weights, it calls the kernels in whose layout the store has
them. Dynamo captures the ops whole, and ``passes/patterns.py`` has GPT-OSS's as the form
``packed``. For this backend it captures the logical op of other families' experts, of which nothing
but shapes need be proven.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import mxfp4_fx.ops.schemas  # noqa: F401  (defines torch.ops.mxfp4)
from mxfp4_fx.checkpoints.gpt_oss import PROJECTIONS
from mxfp4_fx.core import compilation
from mxfp4_fx.core.errors import SlowKernelsWarning
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK
from mxfp4_fx.core.orders import GPT_OSS, Order
from mxfp4_fx.huggingface.block_shards import BlockShard
from mxfp4_fx.huggingface.shards import Shard
from mxfp4_fx.ops import adapters as lora
from mxfp4_fx.ops import target
from mxfp4_fx.ops.adapters import LowRank
from mxfp4_fx.ops.operands import ACTIVATIONS, ALPHA, LIMIT, UP_OFFSET, Activation
from mxfp4_fx.weights.freed import is_freed
from mxfp4_fx.weights.source import MXFP4, Parts, Source
from mxfp4_fx.weights.store import STORE


class PackedExperts(nn.Module):
    """The replacement for transformers' experts, with a checkpoint's bytes.

    Shape letters: T tokens, E experts, A experts per token, H hidden, I intermediate. Names and
    order are those of GPT-OSS's checkpoints. Without a gate, ``gate_up_proj`` is up alone, [E, I,
    ...].

    Attributes:
        gate_up_proj_blocks, gate_up_proj_scales: uint8 [E, 2I, H/32, 16] and [E, 2I, H/32]; gate in
            the even rows, up in the odd.
        down_proj_blocks, down_proj_scales: uint8 [E, H, I/32, 16] and [E, H, I/32].
        gate_up_proj_bias, down_proj_bias: [E, 2I] and [E, H], or None.
        alpha, limit, activation, up_offset: see ``operands.Activation``.
        replaced: transformers' own experts on meta, without values, if they are not GPT-OSS's.
        shards: parameter's name -> how the processes share it, for those of which this one holds a
            part. E or I, in the shapes above, is then what this process has of it.
        cuts: the same under tensor parallelism, from before the weights are loaded on.
        stays_on: the device on which the parameters stay when the model is moved, or None: they
            move along. :func:`~mxfp4_fx.huggingface.placement.place_experts` sets it.

    The module may be called with inputs on another device. The inputs then travel to the
    parameters' device, and the result travels back.
    """

    gate_up_proj_blocks: nn.Parameter
    gate_up_proj_scales: nn.Parameter
    down_proj_blocks: nn.Parameter
    down_proj_scales: nn.Parameter
    replaced: tuple[nn.Module, ...] = ()  # in a tuple, it is no submodule

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        alpha: float = ALPHA,
        limit: float = LIMIT,
        *,
        activation: str = "swiglu",
        up_offset: float = UP_OFFSET,
        has_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.alpha = alpha
        self.limit = limit
        self.activation = activation
        self.up_offset = up_offset
        self.stays_on: torch.device | None = None
        self.shards: dict[str, Shard | BlockShard] = {}
        self.cuts: dict[str, BlockShard] = {}
        for name, (n, k) in zip(PROJECTIONS, self.sizes(), strict=True):
            shape = (num_experts, n, k // BLOCK)
            self.register_parameter(f"{name}_blocks", _bytes(*shape, BYTES_PER_BLOCK))
            self.register_parameter(f"{name}_scales", _bytes(*shape))
            bias = torch.empty(num_experts, n) if has_bias else None
            held = None if bias is None else nn.Parameter(bias, requires_grad=False)
            self.register_parameter(f"{name}_bias", held)

    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (N, K) of both projections."""
        h, i = self.hidden_size, self.intermediate_size
        return (2 * i if ACTIVATIONS[self.activation] else i, h), (h, i)

    def forward(
        self,
        hidden_states: Tensor,
        router_indices: Tensor,
        routing_weights: Tensor,
        adapters: Mapping[str, Sequence[LowRank]] | None = None,
    ) -> Tensor:
        """Return the weighted sum [T, H] of the experts' outputs for hidden states [T, H].

        Args:
            hidden_states: [T, H].
            router_indices: expert ids [T, A]; an id of E or more adds nothing to the sum, because
                another process holds that expert.
            routing_weights: [T, A].
            adapters: projection's name -> what is added to its result; see ``peft_layers.py``.
        """
        home, device = hidden_states.device, self.gate_up_proj_blocks.device
        if home != device:
            # All copies wait. A CPU that reads would not wait for one, and a compiled graph may use
            # the memory of the result again.
            hidden_states, router_indices = hidden_states.to(device), router_indices.to(device)
            routing_weights = routing_weights.to(device)
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            _warn_of_export()
        routes = router_indices, routing_weights
        if adapters and any(adapters.values()):
            out = self._adapted(hidden_states, *routes, adapters)
        elif torch.compiler.is_dynamo_compiling() and self._is_logical():
            out = self._logical(hidden_states, *routes)
        else:
            out = self._frozen(hidden_states, *routes)
        return out if home == device else out.to(home)

    def _frozen(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        gammas, gather_index, scatter_index, offsets = torch.ops.mxfp4.routing.routes(
            indices, weights, self.num_experts
        )
        gate_up, by = _readable(self.gate_up_proj_blocks, self.gate_up_proj_scales)
        inner = torch.ops.mxfp4.matmul_ogs(
            hidden_states,
            *gate_up,
            self.gate_up_proj_bias,
            self.sizes()[0][0],
            offsets,
            gather_index=gather_index,
            activation=self.activation,
            alpha=self.alpha,
            limit=self.limit,
            up_offset=self.up_offset,
            **by,
        )
        down, by = _readable(self.down_proj_blocks, self.down_proj_scales)
        out: Tensor = torch.ops.mxfp4.matmul_ogs(
            inner,
            *down,
            self.down_proj_bias,
            self.hidden_size,
            offsets,
            scatter_index=scatter_index,
            gammas=gammas,
            experts_per_token=indices.shape[1],
            **by,
        )
        return out

    def _adapted(
        self,
        hidden_states: Tensor,
        indices: Tensor,
        weights: Tensor,
        adapters: Mapping[str, Sequence[LowRank]],
    ) -> Tensor:
        gate_up, down = (adapters.get(name, ()) for name in PROJECTIONS)
        if self._any_freed():  # each may be in a layout of its own
            return lora.adapted_moe(
                hidden_states,
                indices,
                weights,
                self._projection("gate_up_proj", 2 * self.intermediate_size),
                self._projection("down_proj", self.hidden_size),
                gate_up,
                down,
                self.num_experts,
                Activation(self.activation, self.alpha, self.limit, self.up_offset),
            )
        out: Tensor = torch.ops.mxfp4.moe.adapted(
            hidden_states,
            indices,
            weights,
            self.gate_up_proj_blocks,
            self.gate_up_proj_bias,
            self.down_proj_blocks,
            self.down_proj_bias,
            self.intermediate_size,
            self.alpha,
            self.limit,
            self.gate_up_proj_scales,
            self.down_proj_scales,
            [factor for one in gate_up for factor in (one.a, one.b)],
            [one.scaling for one in gate_up],
            [factor for one in down for factor in (one.a, one.b)],
            [one.scaling for one in down],
            activation=self.activation,
            up_offset=self.up_offset,
        )
        return out

    def _any_freed(self) -> bool:
        if torch.compiler.is_dynamo_compiling():
            return False
        weights = (self.gate_up_proj_blocks, self.gate_up_proj_scales)
        return any(map(is_freed, (*weights, self.down_proj_blocks, self.down_proj_scales)))

    def _projection(self, name: str, n: int) -> Callable[..., Tensor]:
        blocks, scales = self.get_parameter(f"{name}_blocks"), self.get_parameter(f"{name}_scales")
        parts, by = _readable(blocks, scales)
        bias: Tensor | None = getattr(self, f"{name}_bias")
        return lora.projection(*parts, bias, n, by)

    @property
    def dense_order(self) -> Order:
        """The order in which transformers has the dense weights."""
        if not self.replaced:
            return GPT_OSS
        experts: Any = self.replaced[0]
        return Order(experts.is_transposed, experts.is_concatenated)

    @property
    def is_transposed(self) -> bool:  # PEFT asks for it
        return self.dense_order.is_transposed

    @property
    def is_of_gpt_oss(self) -> bool:
        return self.gate_up_proj_bias is not None and self.activation == "swiglu"

    def _is_logical(self) -> bool:
        """Return whether this backend captures the logical op: not for what `patterns.py` has."""
        return not self.is_of_gpt_oss and compilation.compiling_for()

    def _logical(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = torch.ops.mxfp4.moe.routes(
            hidden,
            indices,
            weights,
            self.gate_up_proj_blocks,
            self.gate_up_proj_bias,
            self.down_proj_blocks,
            self.down_proj_bias,
            self.alpha,
            self.limit,
            self.gate_up_proj_scales,
            self.down_proj_scales,
            activation=self.activation,
            up_offset=self.up_offset,
        )
        return out

    @torch.no_grad()
    def keep_shards(self) -> None:
        """Hold this process's parts of DTensor parameters as plain parameters.

        From now on the state dict says what they are parts of.
        """
        self.shards |= self.cuts
        for name, parameter in self._parameters.items():
            shard = Shard.of(parameter)
            if parameter is not None and shard is not None:
                self.shards[name] = shard
                part = nn.Parameter(shard.part_of(parameter), requires_grad=False)
                self.register_parameter(name, part)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name, shard in self.shards.items():
                part = STORE.values_of(self.get_parameter(name)).detach()
                destination[prefix + name] = shard.distributed(part)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        parts = {
            prefix + name: shard.part_of(state_dict[prefix + name])
            for name, shard in self.shards.items()
            if prefix + name in state_dict
        }
        super()._load_from_state_dict({**state_dict, **parts}, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        """Let ``fn`` convert the parameters, as all of ``nn.Module``'s methods do.

        With ``stays_on``, a change of the device is left out. An empty tensor shows what ``fn``
        does, so that no weight is moved for it.
        """
        for experts in self.replaced:  # on meta; their dtype is that of adapters
            shown = fn(torch.empty(0, dtype=cast(Any, experts).down_proj.dtype))
            if shown.is_floating_point():
                experts.to(shown.dtype)
        home = self.stays_on
        if home is None:
            return super()._apply(fn, recurse)

        def stay(tensor: Tensor) -> Tensor:
            shown = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if shown.device in (home, tensor.device):
                return fn(tensor)
            if tensor.is_meta:  # `to_empty`; all else has raised an error
                return torch.empty_like(tensor, dtype=shown.dtype, device=home)
            return tensor.to(shown.dtype)

        return super()._apply(stay, recurse)


# Strict export runs this function instead of tracing it.
@torch.compiler.assume_constant_result
def _warn_of_export() -> None:
    # Torch 2.11 traces the caller's question as true in each compilation; here it is asked.
    if not (torch.compiler.is_exporting() or torch.jit.is_tracing()):
        return
    if compilation.is_exporting():  # by mxfp4_fx.export, which chooses kernels
        return
    warnings.warn(
        "packed experts are exported with the reference kernels, which are slow everywhere: "
        "backend='mxfp4' chooses kernels when it compiles a model, and an exported program is not "
        "compiled by it. mxfp4_fx.export exports them with native kernels",
        SlowKernelsWarning,
        stacklevel=2,
    )


def _readable(blocks: Tensor, scales: Tensor) -> tuple[Parts, dict[str, str]]:
    """Return a weight's blocks and scales, and the arguments that name their kernels and layout.

    If the parameters are freed, these come from the store. While Dynamo compiles, they are always
    the parameters: a compiled graph may have freed ones as inputs.
    """
    if torch.compiler.is_dynamo_compiling() or not (is_freed(blocks) or is_freed(scales)):
        return (blocks, scales), {}
    parts, layout = STORE.held(Source((blocks, scales), MXFP4))
    return parts, {"layout": layout, "kernels": target.kernels_for(layout, parts[0].device)}


def _bytes(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)
