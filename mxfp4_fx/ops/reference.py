"""The meaning of every op, in plain PyTorch. All kernels are tested against this file.

Shape letters: T tokens, E experts, A experts per token (top-k), R = T*A routed rows, H hidden,
I intermediate, K contraction, N output. A *slot* t*A + a is token t's a-th choice.

Every sum is accumulated in float32. It is rounded to the activations' dtype once, at an op's end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mxfp4_fx.core import mxfp8
from mxfp4_fx.core.formats import BLOCK, dequantize
from mxfp4_fx.core.layouts import CHECKPOINT_ORDER, LAYOUTS
from mxfp4_fx.core.orders import Order, alternate
from mxfp4_fx.core.torch_private import assert_async
from mxfp4_fx.ops.operands import (
    UP_OFFSET,
    Activation,
    Attention,
    Rows,
    Weight,
    check_linears,
    check_linears_mxfp8,
    columns,
    make_weight,
)

Routes = tuple[Tensor, Tensor, Tensor, Tensor]


def routing(
    logits: Tensor, top_k: int, first_expert: int = 0, num_experts: int | None = None
) -> Routes:
    """Choose ``top_k`` experts per token and weigh them by a softmax over the chosen logits.

    Args:
        logits: [T, all experts] float. Equal logits are chosen in ``torch.topk``'s own order.
        top_k: A.
        first_expert: the id of the first expert that is held here.
        num_experts: E, how many are held here; None for as many as there are logits.

    Returns:
        The same four tensors as :func:`routing_from_routes`.
    """
    chosen, indices = torch.topk(logits, top_k, dim=-1)
    held = logits.shape[1] if num_experts is None else num_experts
    weights = torch.softmax(chosen.float(), dim=-1)
    return routing_from_routes(indices, weights, held, first_expert)


def routing_from_routes(
    indices: Tensor, weights: Tensor, num_experts: int, first_expert: int = 0
) -> Routes:
    """Sort given routes by expert; the sort is stable.

    Args:
        indices: [T, A] integer expert ids. Ids outside ``[first_expert, first_expert +
            num_experts)`` are of experts that are not held here. Their rows go last and have
            gamma 0.
        weights: [T, A] float, the factor of each route.
        num_experts: E, the number of experts held here.
        first_expert: the id of the first of them.

    Returns:
        gammas [R] float32 (0 for rows of experts not held here), gather_index [R] int32 (the token
        of a sorted row), scatter_index [R] int32 (its slot), expert_offsets [E+1] int32 (the rows
        of expert e are ``expert_offsets[e]:expert_offsets[e+1]``).
    """
    expert = indices.reshape(-1) - first_expert
    expert = torch.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    sorted_expert, slot = torch.sort(expert, stable=True)
    bounds = torch.arange(num_experts + 1, device=indices.device, dtype=sorted_expert.dtype)
    gammas = weights.reshape(-1).float()[slot].masked_fill(sorted_expert == num_experts, 0.0)
    return (
        gammas,
        (slot // max(indices.shape[1], 1)).int(),
        slot.int(),
        torch.searchsorted(sorted_expert, bounds).int(),
    )


def expert_ids(indices: Tensor, num_experts: int, below: str, above: str) -> Tensor:
    """Map given ids to expert ids, as one of transformers' forms of the experts reads them.

    Args:
        indices: [T, A] integers.
        num_experts: E.
        below: the meaning of ids below 0: ``"wrap"`` (counted from the end, down to -E),
            ``"first"`` (expert 0), ``"skip"`` (an expert that is not held here) or ``"error"``.
        above: the meaning of ids from E on: ``"last"`` (expert E-1), ``"skip"`` or ``"error"``.

    Returns:
        [T, A] in the same dtype; ids to skip stay outside of [0, E).

    Raises:
        IndexError: an id is an error. On a GPU a device assertion fails instead.
    """
    low = {"wrap": -num_experts, "error": 0}.get(below, -math.inf)
    high = {"error": num_experts - 1}.get(above, math.inf)
    if indices.device.type != "cpu":
        within = (indices >= low) & (indices <= high)
        assert_async(within.all(), f"an expert's id is out of range: {num_experts} experts")
    elif indices.numel():
        least, most = (int(bound) for bound in torch.aminmax(indices))
        if least < low or most > high:
            wrong = least if least < low else most
            raise IndexError(f"expert {wrong} is out of range: there are {num_experts} experts")
    if above == "last":
        indices = indices.clamp(max=num_experts - 1)
    if below == "wrap":
        return torch.where(indices < 0, indices + num_experts, indices)
    return indices.clamp(min=0) if below == "first" else indices.clone()


def activate(y: Tensor, activation: Activation | None) -> Tensor:
    """Apply the activation to sums with biases: [.., N] -> [.., N'].

    ``"swiglu"`` is GPT-OSS's clamped SwiGLU, ``gate * sigmoid(alpha * gate) * (up + up_offset)``
    with the gate clamped above and up both ways; SiLU experts have alpha 1, no limit and offset 0.
    ``"geglu_tanh"`` has GELU, in its tanh form, of the gate instead. ``"relu2"`` is ``relu(y)^2``.
    """
    if activation is None:
        return y
    kind, alpha, limit, up_offset = activation
    if kind == "relu2":
        return torch.relu(y).square()
    gate = y[..., 0::2].clamp(max=limit)
    up = y[..., 1::2].clamp(min=-limit, max=limit)
    if kind == "geglu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * (up + up_offset)
    return gate * torch.sigmoid(alpha * gate) * (up + up_offset)


def matmul_ogs(x: Tensor, weight: Weight, rows: Rows, activation: Activation | None) -> Tensor:
    """Multiply rows with their experts' weights: a grouped matmul with outer gather and scatter.

    ``y = act(x[gather] @ W_e^T + b_e) * gammas``, where the offsets give the expert e of each row.
    With a scatter, the rows of y are then put into slots, and each token's slots are summed in
    order.

    Args:
        x: [T, K] with a gather, else [R, K]; float32, bfloat16 or float16.
        weight, rows, activation: see ``operands.py``. The weight may have any layout here.

    Returns:
        [T, N'] with a scatter, else [R, N']; N' = N, or N/2 if the activation is gated; in x's
        dtype.
    """
    y = grouped_linear(
        x if rows.gather is None else x[rows.gather],
        functools.partial(matrix, weight),
        weight.bias,
        weight.n,
        rows.offsets,
        activation,
    )
    if rows.gammas is not None:
        y = y * rows.gammas[:, None]
    if rows.scatter is not None:
        y = combine(y, rows.scatter, rows.per_token)
    return y.to(x.dtype)


def matrix(weight: Weight, expert: int) -> Tensor:
    """Dequantize one expert of a weight in any layout to a matrix [N, K] float32."""
    part = weight.blocks[expert], weight.scales[expert]
    order = LAYOUTS[weight.layout].unswizzle(*part, weight.n, weight.k)
    return dequantize(*order, torch.float32)


def grouped_linear(
    rows: Tensor,
    weight: Callable[[int], Tensor],
    bias: Tensor | None,
    n: int,
    expert_offsets: Tensor,
    activation: Activation | None = None,
) -> Tensor:
    """Return ``act(rows @ weight(e)^T + bias[e])`` in float32, for rows [R, K] sorted by expert.

    ``weight(e)`` returns [N, K] float32. It is called only for experts that have rows.
    """
    y = rows.new_zeros((rows.shape[0], columns(n, activation)), dtype=torch.float32)
    for expert, (start, stop) in enumerate(pairwise(expert_offsets.tolist())):
        if start < stop:
            part = rows[start:stop].float() @ weight(expert).T
            if bias is not None:
                part = part + bias[expert].float()
            y[start:stop] = activate(part, activation)
    return y


def combine(y: Tensor, scatter_index: Tensor, experts_per_token: int) -> Tensor:
    """Put sorted rows [R, N] into their slots and sum each token's slots in order: [T, N]."""
    slots = torch.empty_like(y)
    slots[scatter_index] = y
    return slots.view(-1, experts_per_token, y.shape[1]).sum(dim=1)


def moe(
    hidden: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    top_k: int,
    alpha: float,
    limit: float,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    layout: str = CHECKPOINT_ORDER,
    first_expert: int = 0,
    activation: str = "swiglu",
    up_offset: float = UP_OFFSET,
    is_transposed: bool = True,
    is_concatenated: bool = False,
) -> Tensor:
    """Compute a MoE MLP from its router logits on: the logical op, without a layout.

    The weights are as the model holds them. Their order (``core/orders.py``) is GPT-OSS's if the
    last two arguments do not say otherwise.

    Args:
        hidden: [T, H] float.
        router_logits: [T, E], or of all experts if E of them are held here.
        gate_up: [E, H, N], where N is 2I, or I if the activation is not gated; [E, N, H] if not
            transposed.
        gate_up_bias: [E, N] in the order of the weight's N, or None.
        down: [E, I, H]; [E, H, I] if not transposed.
        down_bias: [E, H], or None.
        top_k: A.
        alpha, limit: see ``operands.Activation``.
        gate_up_scales, down_scales: for packed weights; ``gate_up`` and ``down`` are then blocks.
        layout: the layout of packed weights, as the model holds them. In checkpoint order, scales
            are uint8 [E, N, H/32] and [E, H, I/32], and blocks have an axis of 16 bytes more.
        first_expert: the id of the first expert held here. What a token's other experts would add
            is missing in the result.
        activation, up_offset: see ``operands.Activation``.
        is_transposed, is_concatenated: see ``orders.Order``; only ``gate_up`` is concatenated.

    Returns:
        [T, H] in hidden's dtype. Floats are not quantized here, but when the op is lowered.
    """
    routes = routing(router_logits, top_k, first_expert, gate_up.shape[0])
    mlp = _mlp(gate_up, gate_up_bias, down, down_bias, gate_up_scales, down_scales, layout,
               Order(is_transposed, is_concatenated), hidden.shape[1])  # fmt: skip
    return _experts(hidden, routes, mlp, top_k, Activation(activation, alpha, limit, up_offset))


def moe_from_routes(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    alpha: float,
    limit: float,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    layout: str = CHECKPOINT_ORDER,
    first_expert: int = 0,
    activation: str = "swiglu",
    up_offset: float = UP_OFFSET,
    is_transposed: bool = True,
    is_concatenated: bool = False,
) -> Tensor:
    """Compute :func:`moe` with given routes: ``indices`` [T, A] and ``weights`` [T, A]."""
    routes = routing_from_routes(indices, weights, gate_up.shape[0], first_expert)
    mlp = _mlp(gate_up, gate_up_bias, down, down_bias, gate_up_scales, down_scales, layout,
               Order(is_transposed, is_concatenated), hidden.shape[1])  # fmt: skip
    act = Activation(activation, alpha, limit, up_offset)
    return _experts(hidden, routes, mlp, indices.shape[1], act)


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Compute torch's ``linear`` for several weights and one input.

    Args:
        x: [..., K].
        weights: [N, K] each, where N may differ; of x's dtype.
        biases: [N] each, or None for no bias.

    Returns:
        [..., N] of x's dtype for each weight, contiguous.

    Raises:
        ValueError: shapes do not fit.
    """
    check_linears(x, weights, biases)
    given = zip(weights, biases, strict=True)
    return [torch.nn.functional.linear(x, w, b).contiguous() for w, b in given]


def linears_mxfp8(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Compute :func:`linears` with weights in MXFP8, whose values are made in x's dtype.

    Args:
        x: [..., K]; float32, bfloat16 or float16.
        codes, scales: uint8 [1, N, K] and [1, N, K/32] each (``core/mxfp8.py``), where N may
            differ. Codes that are NaN, which ``mxfp8.quantize`` never makes, must not come to
            ``kernels="triton"``.
        biases: [N] each, or None for no bias.

    Returns:
        [..., N] of x's dtype for each weight, contiguous.

    Raises:
        ValueError: shapes do not fit.
    """
    check_linears_mxfp8(x, codes, scales, biases)
    given = zip(codes, scales, strict=True)
    return linears(x, [mxfp8.dequantize(c[0], s[0], x.dtype) for c, s in given], biases)


def attention_with_sinks(operands: Attention) -> Tensor:
    """Compute attention in which each head has a sink: a logit that takes weight and has no value.

    The weights of keys and sink together are ``softmax([query . key * scale + mask, sink])``.
    B batch, H heads of queries, KV heads of keys and values (KV divides H, and H / KV neighbours
    share one), Q queries, T keys, D head dim.

    Args:
        operands:
            query: [B, H, Q, D]; float32, bfloat16 or float16, as all others.
            key, value: [B, KV, T, D].
            sinks: [H].
            mask: what is added to the logits; broadcasts to [B, H, Q, T]. None for no mask.
            scale: the factor of the logits.

    Returns:
        [B, Q, H, D] of query's dtype, contiguous. A query all of whose keys have the weight zero
        gets zeros.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    operands.check()
    query, key, value, sinks, mask, scale = operands
    batch, heads, queries, _ = query.shape
    k, v = (x.float().repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    logits = query.float() @ k.transpose(2, 3) * scale
    if mask is not None:
        logits = logits + mask.float()
    column = sinks.float().reshape(1, heads, 1, 1).expand(batch, heads, queries, 1)
    weights = torch.softmax(torch.cat([logits, column], dim=3), dim=3)[..., :-1]
    return (weights @ v).to(query.dtype).transpose(1, 2).contiguous()


class Linear(NamedTuple):
    """The matrices and biases of one projection, in the order of the kernels.

    Attributes:
        matrix: from an expert to its matrix [N, K] float32.
        bias: [E, N], or None.
        n: N.
    """

    matrix: Callable[[int], Tensor]
    bias: Tensor | None
    n: int


def _mlp(
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    gate_up_scales: Tensor | None,
    down_scales: Tensor | None,
    layout: str,
    order: Order,
    hidden_size: int,
) -> tuple[Linear, Linear]:
    """Return both projections of a model's weights, which are floats or packed."""
    if gate_up_bias is not None and order.is_concatenated:
        gate_up_bias = alternate(gate_up_bias)
    down_order = order._replace(is_concatenated=False)
    if gate_up_scales is None or down_scales is None:
        n = gate_up.shape[2 if order.is_transposed else 1]
        return (
            Linear(lambda e: _rows(order.rows_of(gate_up[e])), gate_up_bias, n),
            Linear(lambda e: _rows(down_order.rows_of(down[e])), down_bias, hidden_size),
        )
    in_order = layout == CHECKPOINT_ORDER
    n = gate_up_scales.shape[1 if in_order else 2]
    i = down_scales.shape[2 if in_order else 1] * BLOCK
    first = make_weight(gate_up, gate_up_scales, None, n, hidden_size, layout)
    second = make_weight(down, down_scales, None, hidden_size, i, layout)
    return (
        Linear(lambda e: _rows(order.alternating(matrix(first, e))), gate_up_bias, n),
        Linear(functools.partial(matrix, second), down_bias, hidden_size),
    )


def _rows(rows: Tensor) -> Tensor:
    """Return rows [N, K], or pairs of rows [N/2, 2, K], as a matrix [N, K] float32."""
    return rows.reshape(-1, rows.shape[-1]).float()


def _experts(
    hidden: Tensor,
    routes: Routes,
    mlp: tuple[Linear, Linear],
    top_k: int,
    activation: Activation,
) -> Tensor:
    gammas, gather_index, scatter_index, offsets = routes
    gate_up, down = mlp
    inner = grouped_linear(hidden[gather_index], *gate_up, offsets, activation)
    y = grouped_linear(inner, *down, offsets)
    return combine(y * gammas[:, None], scatter_index, top_k).to(hidden.dtype)
