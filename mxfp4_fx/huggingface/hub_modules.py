"""Capture of transformers' own MXFP4 modules, which hold their weights for the hub's kernels.

On a GPU, transformers loads an MXFP4 checkpoint into ``Mxfp4GptOssMLP`` (before 5.22 into a
``GptOssMLP`` with another ``forward``) with ``Mxfp4GptOssExperts``. Their kernels break every
graph. While this backend captures, Dynamo sees this package's ops on the same tensors instead, as
``PackedExperts`` has them; ``passes/patterns.py`` knows the form as ``transformers_mxfp4``. The
model, its uncompiled calls, other backends and saving stay transformers'.

Nothing is captured that would then run slower than transformers' own kernels: :func:`why_not`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mxfp4_fx.ops.schemas  # noqa: F401  (defines torch.ops.mxfp4)
from mxfp4_fx.core import compilation
from mxfp4_fx.core.errors import KernelsUnavailableError, OptionError
from mxfp4_fx.core.layouts import LAYOUTS
from mxfp4_fx.core.options import Options
from mxfp4_fx.core.skip import KEEP_DENSE, SKIPPED
from mxfp4_fx.ops import target

# The names of triton_kernels' layouts in its versions -> ours.
_LAYOUTS = {
    None: "hub_strided",
    "STRIDED": "hub_strided",
    "HOPPER_VALUE": "hub_hopper",
    "HOPPER_MX_VALUE": "hub_hopper",
    "BLACKWELL_VALUE": "hub_blackwell",
    "BLACKWELL_MX_VALUE": "hub_blackwell",
}
_REMEDY = "load the model with mxfp4_fx.from_pretrained(...) instead"


def why_not(module: nn.Module, options: Options) -> str | None:
    """Return why transformers' own MXFP4 modules are not captured, or None.

    Args:
        module: any experts; for those of other classes the result is None.
        options: the options of ``torch.compile``.
    """
    experts: Any = getattr(module, "experts", module)
    if type(experts).__name__ != "Mxfp4GptOssExperts":
        return None
    why = _why_not_these(experts)
    if why is None:
        why = _why_not_on(experts.gate_up_proj.storage.data.device, options.kernels)
    return why


def prepare(integration: types.ModuleType) -> None:
    """Replace the forwards in ``transformers.integrations.mxfp4``; to be called once."""
    mlp = getattr(integration, "Mxfp4GptOssMLP", None)
    if mlp is not None:
        mlp.forward = _replaced(mlp.forward, _mlp_forward)
    elif hasattr(integration, "mlp_forward"):  # bound to modules of another class
        _replaced(integration.mlp_forward, _mlp_forward)
    experts = integration.Mxfp4GptOssExperts
    experts.forward = _replaced(experts.forward, _experts_forward)


def unsubstituted(function: types.FunctionType) -> types.FunctionType:
    """Return a copy of a function that Dynamo does not substitute: it goes by identity."""
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _replaced(original: types.FunctionType, make: Callable[..., Any]) -> Any:
    """Return the function for the place of ``original``, and let Dynamo substitute it, too.

    It takes both. Dynamo goes from a module to its class's forward without asking for substitutes;
    instances may hold the original (accelerate's hooks, transformers before 5.22).
    """
    new = make(unsubstituted(original))
    torch.compiler.substitute_in_graph(original, skip_signature_check=True)(new)
    return new


def _mlp_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """Make the forward of transformers' MXFP4 MLP, whose own is ``own``."""

    @functools.wraps(own, updated=())
    def forward(self: Any, hidden_states: Tensor) -> Any:
        if not (torch.compiler.is_dynamo_compiling() and compilation.compiling_for()):
            return own(self, hidden_states)
        experts, router = self.experts, self.router
        if _is_left(self) or _is_left(experts):
            return own(self, hidden_states)
        if _why_not_these(experts) or not _is_served(hidden_states.device):
            return own(self, hidden_states)
        if _is_spread(experts):  # its call takes the routes, and leads to the experts' own forward
            return own(self, hidden_states)
        batch_size = hidden_states.shape[0]
        rows = hidden_states.reshape(-1, router.hidden_dim)
        router_logits = nn.functional.linear(rows, router.weight, router.bias)
        chosen, indices = torch.topk(router_logits, router.top_k, dim=-1)
        # Not a call of the module `experts`, whose hooks would break the graph.
        routed = _captured(experts, rows, indices, torch.softmax(chosen, dim=1))
        return routed.reshape(batch_size, -1, router.hidden_dim), router_logits

    return forward


def _experts_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """Make the forward of transformers' MXFP4 experts, which takes routes from 5.23 on."""

    @functools.wraps(own, updated=())
    def forward(self: Any, hidden_states: Tensor, *routes: Any, **named: Any) -> Any:
        if not (torch.compiler.is_dynamo_compiling() and compilation.compiling_for()):
            return own(self, hidden_states, *routes, **named)
        if (
            len(routes) != 2  # before 5.23 the hub's own objects, three of them
            or named
            or _is_left(self)
            or _why_not_these(self)
            or not _is_served(hidden_states.device)
        ):
            return own(self, hidden_states, *routes, **named)
        return _captured(self, hidden_states, *routes)

    return forward


def _captured(experts: Any, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Compute the experts with this package's ops, as ``PackedExperts.forward`` does.

    Not by a function of both: the near misses of ``packed`` are edits of that forward's source.
    The biases get no gradient: the hub's kernels give them none.
    """
    gammas, gather_index, scatter_index, offsets = torch.ops.mxfp4.routing.routes(
        indices, weights, experts.num_experts
    )
    gate_up = experts.gate_up_proj.storage
    inner = torch.ops.mxfp4.matmul_ogs(
        hidden_states,
        gate_up.data,
        experts.gate_up_proj_precision_config.weight_scale.storage.data,
        experts.gate_up_proj_bias.detach(),
        2 * experts.intermediate_size,
        offsets,
        gather_index=gather_index,
        activation="swiglu",
        alpha=experts.alpha,
        limit=experts.limit,
        layout=_LAYOUTS[gate_up.layout.name],
    )
    down = experts.down_proj.storage
    out: Tensor = torch.ops.mxfp4.matmul_ogs(
        inner,
        down.data,
        experts.down_proj_precision_config.weight_scale.storage.data,
        experts.down_proj_bias.detach(),
        experts.hidden_size,
        offsets,
        scatter_index=scatter_index,
        gammas=gammas,
        experts_per_token=indices.shape[1],
        layout=_LAYOUTS[down.layout.name],
    )
    return out


def _is_left(module: Any) -> bool:
    """Return whether the user wants these experts left; Dynamo guards the marks it reads."""
    return bool(getattr(module, KEEP_DENSE, False)) or bool(getattr(module, SKIPPED, False))


def _is_spread(experts: Any) -> bool:
    """Return whether transformers spreads the experts over processes, by a forward of its own."""
    return bool(getattr(experts, "_is_hooked", False))


def _why_not_these(experts: Any) -> str | None:
    """Return why the weights cannot be captured, or None. Dynamo traces and guards this."""
    if _is_spread(experts) and not hasattr(experts, "forward_routed"):  # before 5.23
        return f"transformers spreads its experts over processes: {_REMEDY}"
    e, h, i = experts.num_experts, experts.hidden_size, experts.intermediate_size
    for weight, precision, k, n in (
        (experts.gate_up_proj, experts.gate_up_proj_precision_config, h, 2 * i),
        (experts.down_proj, experts.down_proj_precision_config, i, h),
    ):
        if isinstance(weight, Tensor) or precision is None:
            return "its weights are not loaded"
        scale = precision.weight_scale
        if not (hasattr(weight, "storage") and hasattr(scale, "storage")):
            return f"its weights are of another package than triton_kernels: {_REMEDY}"
        name, scale_name = weight.storage.layout.name, scale.storage.layout.name
        if name not in _LAYOUTS or _LAYOUTS.get(scale_name) != "hub_strided":
            return f"its weights are in layout {name} with scales in {scale_name}: {_REMEDY}"
        layout = _LAYOUTS[name]
        if layout == "hub_hopper" and getattr(weight.storage.layout, "mma_version", 3) != 3:
            return f"its weights are in layout {name} for another matrix instruction: {_REMEDY}"
        # transformers quantizes a dense checkpoint along the wrong axis; and MegaBlocks' kernels
        # for the CPU repack the bytes and leave the layout's name.
        (rows, columns), (groups, width) = LAYOUTS[layout].shapes(n, k)
        if not (
            list(weight.shape) == [e, k, n]
            and _is_column_major(weight.storage.data, e, rows, columns)
            and _is_column_major(scale.storage.data, e, groups, width)
        ):
            return (
                f"its weights do not lie as its layout says (transformers quantized a dense "
                f"checkpoint, or other kernels repacked them): {_REMEDY}"
            )
    return None


def _is_column_major(data: Tensor, e: int, rows: int, columns: int) -> bool:
    return (
        data.dtype == torch.uint8
        and tuple(data.shape) == (e, rows, columns)
        and data.stride() == (rows * columns, 1, rows)
    )


@torch.compiler.assume_constant_result
def _is_served(device: torch.device) -> bool:
    """Return whether kernels of ours serve this compilation on a device."""
    try:
        options = Options.parse(**compilation.keywords())
    except OptionError:
        return True  # the backend raises it
    return _why_not_on(device, options.kernels) is None


def _why_not_on(device: torch.device, kernels: str) -> str | None:
    try:
        target.choose(device, kernels)
    except KernelsUnavailableError as error:
        return str(error)
    return None
