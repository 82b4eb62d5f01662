"""``experts_implementation="mxfp4_fx"``: experts for transformers' experts interface.

It computes what transformers' own implementations compute, of whatever family, with gradients. The
code is this package's own, so the patterns prove it under every version of transformers, also one
that writes its own forms in another way.

Shape letters as in ``ops/reference.py``.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

NAME = "mxfp4_fx"


def register(interface: types.ModuleType) -> None:
    """Register the implementation with ``transformers.integrations.moe``."""
    interface.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the weighted sum [T, H] of the chosen experts' outputs.

    Args:
        self: experts of a class with transformers' ``@use_experts_implementation``.
        hidden_states: [T, H].
        top_k_index: expert ids [T, A]. Under expert parallelism, ids from E on are those of experts
            that other processes hold; they add nothing.
        top_k_weights: [T, A]; it may have a wider dtype than the hidden states.
    """
    experts, (tokens, top_k) = self.num_experts, top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1))
    # A CPU counts floats only.
    counted = ids.float() if ids.device.type in ("cpu", "mps") else ids.int()
    counts = torch.histc(counted, bins=experts, min=0, max=experts - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    rows = hidden_states[order // top_k]
    foreign = None
    if getattr(self, "_is_expert_parallel", False):
        foreign = (ids >= experts).unsqueeze(-1)
        rows = rows.masked_fill(foreign, 0.0)
        if self.has_bias:
            ids = ids.clamp(max=experts - 1)

    has_gate = getattr(self, "has_gate", True)
    rows = _projected(self, rows, "gate_up_proj" if has_gate else "up_proj", ids, offsets, foreign)
    rows = self._apply_gate(rows) if has_gate else self.act_fn(rows)
    rows = _projected(self, rows, "down_proj", ids, offsets, foreign)
    if getattr(self, "has_post_expert_norm", False):
        rows = self.post_expert_norm(rows)

    weighted = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.size(0), device=order.device)
    result = weighted[inverse].view(tokens, top_k, rows.size(-1)).sum(dim=1)
    return result.to(hidden_states.dtype)


def _projected(
    self: Any, rows: Tensor, name: str, ids: Tensor, offsets: Tensor, foreign: Tensor | None
) -> Tensor:
    """Multiply rows [R, K], sorted by expert, with their experts' matrices: [R, N].

    The results of rows of other processes' experts, where ``foreign`` [R, 1] is true, are zero.
    """
    weight = getattr(self, name)
    if not self.is_transposed:
        weight = weight.transpose(1, 2)
    rows = _grouped_mm(rows.to(weight.dtype), weight, offsets)
    if self.has_bias:
        rows = rows + getattr(self, f"{name}_bias")[ids]
    # torch leaves them as they were in memory.
    return rows if foreign is None else rows.masked_fill(foreign, 0.0)


def _grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply [R, K] with [E, K, N], where the rows ``offsets[e-1]:offsets[e]`` are expert e's."""
    from transformers.integrations.moe import _grouped_mm as grouped_mm

    product: Tensor = grouped_mm(rows, weight, offs=offsets)
    return product
