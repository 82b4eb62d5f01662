"""The meaning of the ops around the experts, in plain PyTorch: linears and attention.

As ``reference.py`` is for the experts, it is what all kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxfp4_fx.core import mxfp8
from mxfp4_fx.ops.operands_around import Attention, check_linears, check_linears_mxfp8


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
