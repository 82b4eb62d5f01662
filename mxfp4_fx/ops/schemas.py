"""The ops' definitions for torch: schema, dispatch, autograd; ``fakes.py`` has the fake impls.

Schemas are strings (``define`` and ``impl``), because a call of such an op costs a quarter of a
``custom_op``'s. All ops are functional. Kernels are imported on first use. Shape letters as in
``reference.py``.

``matmul_ogs`` has a flat schema. ``operands.operands_of`` makes its operands from the flat
arguments and checks them, once a call.

To add kernels: write ``matmul_ogs`` (and ``routing``) with the reference's signature in a module of
their own, enter them in :data:`KERNELS`, and let ``target.choose`` return their name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mxfp4_fx.core import profiling, torch_private, torch_private_dynamo
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER
from mxfp4_fx.ops import (
    adapters,
    autograd,
    backward,
    fakes,
    flops,
    operands,
    operands_around,
    reference,
)
from mxfp4_fx.ops.operands import ALPHA, LIMIT, UP_OFFSET, operands_of

_REFERENCE = {
    "matmul_ogs": "mxfp4_fx.ops.reference:matmul_ogs",
    "routing": "mxfp4_fx.ops.reference:routing",
    "routing.routes": "mxfp4_fx.ops.reference:routing_from_routes",
    "linears": "mxfp4_fx.ops.reference_around:linears",
    "linears_mxfp8": "mxfp4_fx.ops.reference_around:linears_mxfp8",
    "linears_mxfp8_backward": "mxfp4_fx.ops.backward:linears_mxfp8_backward",
    "attention_with_sinks": "mxfp4_fx.ops.reference_around:attention_with_sinks",
}
# kernels -> op -> "module:function".
KERNELS: dict[str, dict[str, str]] = {
    "reference": _REFERENCE,
    "pytorch": {**_REFERENCE, "matmul_ogs": "mxfp4_fx.ops.pytorch:matmul_ogs"},
    "cpu": {
        "attention_with_sinks": "mxfp4_fx.ops.cpu_attention:attention_with_sinks",
        "linears": "mxfp4_fx.ops.cpu_linear:linears",
        "linears_mxfp8": "mxfp4_fx.ops.cpu_mxfp8:linears",
        "linears_mxfp8_backward": _REFERENCE["linears_mxfp8_backward"],
        "matmul_ogs": "mxfp4_fx.ops.cpu:matmul_ogs",
        "routing": "mxfp4_fx.ops.cpu:routing",
        "routing.routes": "mxfp4_fx.ops.cpu:routing_from_routes",
    },
    "triton": {
        **_REFERENCE,
        "linears_mxfp8": "mxfp4_fx.ops.triton_mxfp8:linears",
        "linears_mxfp8_backward": "mxfp4_fx.ops.triton_mxfp8:backward",
        "matmul_ogs": "mxfp4_fx.ops.triton:matmul_ogs",
        "routing": "mxfp4_fx.ops.triton:routing",
        "routing.routes": "mxfp4_fx.ops.triton:routing_from_routes",
    },
    "hub": {**_REFERENCE, "matmul_ogs": "mxfp4_fx.ops.hub:matmul_ogs"},
}

_WEIGHTS = "Tensor gate_up, Tensor? gate_up_bias, Tensor down, Tensor? down_bias"
# Packed weights are blocks with these scales, in the layout in which the model holds them.
_SCALES = f"Tensor? gate_up_scales=None, Tensor? down_scales=None, str layout='{CHECKPOINT_ORDER}'"
# Their defaults are those of GPT-OSS.
_FAMILY = (
    f"str activation='swiglu', float up_offset={UP_OFFSET}, bool is_transposed=True, "
    "bool is_concatenated=False"
)
_ROUTES = "(Tensor gammas, Tensor gather_index, Tensor scatter_index, Tensor expert_offsets)"
_OPERANDS = (
    "Tensor x, Tensor blocks, Tensor scales, Tensor? bias, int n, Tensor expert_offsets, "
    "Tensor? gather_index=None, Tensor? scatter_index=None, Tensor? gammas=None, "
    f"int experts_per_token=1, str activation='none', float alpha={ALPHA}, float limit={LIMIT}, "
    f"float up_offset={UP_OFFSET}, str layout='{CHECKPOINT_ORDER}'"
)

SCHEMAS = {
    "moe": f"(Tensor hidden, Tensor router_logits, {_WEIGHTS}, int top_k, float alpha, "
    f"float limit, {_SCALES}, int first_expert=0, {_FAMILY}) -> Tensor",
    "moe.routes": f"(Tensor hidden, Tensor indices, Tensor weights, {_WEIGHTS}, float alpha, "
    f"float limit, {_SCALES}, int first_expert=0, {_FAMILY}) -> Tensor",
    "moe.adapted": f"(Tensor hidden, Tensor indices, Tensor weights, {_WEIGHTS}, int intermediate, "
    "float alpha, float limit, Tensor gate_up_scales, Tensor down_scales, "
    "Tensor[] gate_up_factors, float[] gate_up_scalings, Tensor[] down_factors, "
    f"float[] down_scalings, str activation='swiglu', float up_offset={UP_OFFSET}, "
    f"str layout='{CHECKPOINT_ORDER}', str kernels='reference') -> Tensor",
    "grouped_linear": "(Tensor x, Tensor weight, Tensor expert_offsets) -> Tensor",
    "grouped_outer": "(Tensor grad, Tensor x, Tensor expert_offsets) -> Tensor",
    "expert_ids": "(Tensor indices, int num_experts, str below, str above) -> Tensor",
    "routing": "(Tensor logits, int top_k, int first_expert=0, int? num_experts=None, "
    f"str kernels='reference') -> {_ROUTES}",
    "routing.routes": "(Tensor indices, Tensor weights, int num_experts, int first_expert=0, "
    f"str kernels='reference') -> {_ROUTES}",
    "matmul_ogs": f"({_OPERANDS}, str kernels='reference') -> Tensor",
    "matmul_ogs_backward": f"(Tensor grad, {_OPERANDS}) -> (Tensor, Tensor)",
    "linears": "(Tensor x, Tensor[] weights, Tensor?[] biases, str kernels='reference') -> "
    "Tensor[]",
    "linears_mxfp8": "(Tensor x, Tensor[] codes, Tensor[] scales, Tensor?[] biases, "
    "str kernels='reference') -> Tensor[]",
    "linears_mxfp8_backward": "(Tensor[] grads, Tensor[] codes, Tensor[] scales, "
    "str kernels='reference') -> Tensor",
    "attention_with_sinks": "(Tensor query, Tensor key, Tensor value, Tensor sinks, Tensor? mask, "
    "float scale, str kernels='reference') -> Tensor",
}


@functools.cache
def kernel(kernels: str, op: str) -> Callable[..., Any]:
    """Return the function that computes ``op`` for ``kernels``; import it on first use.

    Raises:
        ValueError: ``kernels`` is not a key of :data:`KERNELS`.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r} is not one of {', '.join(KERNELS)}")
    module, name = KERNELS[kernels][op].split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _routing(
    logits: Tensor,
    top_k: int,
    first_expert: int = 0,
    num_experts: int | None = None,
    kernels: str = "reference",
) -> Any:
    held = operands.check_routing(logits, top_k, num_experts)
    return kernel(kernels, "routing")(logits, top_k, first_expert, held)


def _routing_routes(
    indices: Tensor,
    weights: Tensor,
    num_experts: int,
    first_expert: int = 0,
    kernels: str = "reference",
) -> Any:
    operands.check_routes(indices, weights, num_experts)
    return kernel(kernels, "routing.routes")(indices, weights, num_experts, first_expert)


def _matmul_ogs(*flat: Any) -> Tensor:
    x, weight, rows, activation, kernels = operands_of(*flat)
    multiply = kernel(kernels, "matmul_ogs")
    if profiling.is_on():
        multiply = profiling.within(profiling.shown(weight.blocks), multiply)
    y: Tensor = multiply(x, weight, rows, activation)
    return y


def _matmul_ogs_backward(grad: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    x, weight, rows, activation, _ = operands_of(*flat)
    multiply = backward.matmul_ogs_backward
    if profiling.is_on():
        multiply = profiling.within(profiling.shown(weight.blocks), multiply)
    return multiply(grad, x, weight, rows, activation)


def _linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kernels: str = "reference",
) -> list[Tensor]:
    multiply = kernel(kernels, "linears")
    if profiling.is_on():
        multiply = profiling.within(profiling.shown_linears(weights), multiply)
    results: list[Tensor] = multiply(x, weights, biases)
    return results


def _linears_mxfp8(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kernels: str = "reference",
) -> list[Tensor]:
    multiply = kernel(kernels, "linears_mxfp8")
    if profiling.is_on():
        multiply = profiling.within(profiling.shown_linears(codes), multiply)
    results: list[Tensor] = multiply(x, codes, scales, biases)
    return results


def _linears_mxfp8_backward(
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    kernels: str = "reference",
) -> Tensor:
    operands_around.check_linears_mxfp8_backward(grads, codes, scales)
    multiply = kernel(kernels, "linears_mxfp8_backward")
    if profiling.is_on():
        multiply = profiling.within(profiling.shown_linears(codes), multiply)
    result: Tensor = multiply(grads, codes, scales)
    return result


def _attention_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    mask: Tensor | None,
    scale: float,
    kernels: str = "reference",
) -> Tensor:
    given = operands_around.Attention(query, key, value, sinks, mask, scale)
    attend = kernel(kernels, "attention_with_sinks")
    if profiling.is_on():
        attend = profiling.within(profiling.shown(sinks, "attention"), attend)
    result: Tensor = attend(given)
    return result


_LIBRARY = torch.library.Library("mxfp4", "DEF")

_IMPLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "moe": (reference.moe, fakes.moe),
    "moe.routes": (reference.moe_from_routes, fakes.moe),
    "grouped_linear": (adapters.grouped_linear, fakes.grouped_linear),
    "grouped_outer": (adapters.grouped_outer, fakes.grouped_outer),
    "expert_ids": (reference.expert_ids, fakes.expert_ids),
    "routing": (_routing, fakes.routing),
    "routing.routes": (_routing_routes, fakes.routing_routes),
    "matmul_ogs": (_matmul_ogs, fakes.matmul_ogs),
    "matmul_ogs_backward": (_matmul_ogs_backward, fakes.matmul_ogs_backward),
    "linears": (_linears, fakes.linears),
    "linears_mxfp8": (_linears_mxfp8, fakes.linears_mxfp8),
    "linears_mxfp8_backward": (_linears_mxfp8_backward, fakes.linears_mxfp8_backward),
    "attention_with_sinks": (_attention_with_sinks, fakes.attention_with_sinks),
}
_GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "routing": (backward.routing_gradients, backward.save_routing),
    "routing.routes": (
        backward.routing_from_routes_gradients,
        backward.save_routing_from_routes,
    ),
    "matmul_ogs": (backward.matmul_ogs_gradients, backward.save_matmul_ogs),
    "grouped_linear": (adapters.grouped_linear_gradients, adapters.save_grouped_linear),
    "linears_mxfp8": (backward.linears_mxfp8_gradients, backward.save_linears_mxfp8),
}


def _outside_autocast(impl: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an op so that autocast around it does not change its float32 arithmetic."""

    @functools.wraps(impl)
    def run(*args: Any) -> Any:
        with torch_private.without_keys(torch_private.AUTOCAST):
            return impl(*args)

    torch_private_dynamo.untraced(run)
    return run


for _name, (_impl, _fake) in _IMPLS.items():
    _LIBRARY.define(_name + SCHEMAS[_name])
    _LIBRARY.impl(_name, _outside_autocast(_impl), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mxfp4::{_name}", _fake, lib=_LIBRARY)
# Made of the other ops, whose fake impls and gradients are its own.
_LIBRARY.define("moe.adapted" + SCHEMAS["moe.adapted"])
_LIBRARY.impl("moe.adapted", _outside_autocast(adapters.moe_adapted), "CompositeImplicitAutograd")
for _name, (_backward, _save) in _GRADIENTS.items():
    _packet, _, _overload = _name.partition(".")
    _op = getattr(getattr(torch.ops.mxfp4, _packet), _overload or "default")
    autograd.register(_LIBRARY, _op, _backward, _save)
flops.register()
