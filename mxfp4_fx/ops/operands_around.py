"""The operands of the ops around the experts, and their checks: linears and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mxfp4_fx.core.formats import BLOCK
from mxfp4_fx.core.hardware import DTYPES


def check_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    """Check the operands of ``linears``; see ``reference_around.linears``.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.ndim == 0 or len(weights) != len(biases):
        raise ValueError(
            f"mxfp4::linears: x must be [..., K], with a bias or None for each weight; x is "
            f"{tuple(x.shape)}, with {len(weights)} weights and {len(biases)} biases"
        )
    k = x.shape[-1]
    for weight, bias in zip(weights, biases, strict=True):
        if weight.ndim != 2 or weight.shape[1] != k:
            raise ValueError(
                f"mxfp4::linears: a weight must be [N, {k}], as x is {tuple(x.shape)}; one is "
                f"{tuple(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"mxfp4::linears: the bias of a weight {tuple(weight.shape)} must be "
                f"[{weight.shape[0]}]; one is {tuple(bias.shape)}"
            )


def check_linears_mxfp8(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> None:
    """Check the operands of ``linears_mxfp8``; see ``reference_around.linears_mxfp8``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if x.ndim == 0 or not len(codes) == len(scales) == len(biases):
        raise ValueError(
            f"mxfp4::linears_mxfp8: x must be [..., K], with scales and a bias or None for each "
            f"codes; x is {tuple(x.shape)}, with {len(codes)} codes, {len(scales)} scales and "
            f"{len(biases)} biases"
        )
    name = "mxfp4::linears_mxfp8"
    _check_mxfp8(name, codes, scales, x.shape[-1], f"x is {tuple(x.shape)}")
    for code, bias in zip(codes, biases, strict=True):
        if bias is not None and bias.shape != (code.shape[1],):
            raise ValueError(
                f"{name}: the bias of codes {tuple(code.shape)} must be [{code.shape[1]}]; one is "
                f"{tuple(bias.shape)}"
            )


def check_linears_mxfp8_backward(
    grads: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]
) -> None:
    """Check the operands of ``linears_mxfp8_backward``; see ``ops.backward``'s.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    name = "mxfp4::linears_mxfp8_backward"
    if not grads or not len(grads) == len(codes) == len(scales):
        raise ValueError(
            f"{name}: there must be codes and scales for each of one or more gradients; there are "
            f"{len(grads)} gradients, {len(codes)} codes and {len(scales)} scales"
        )
    first = codes[0]
    k = first.shape[2] if first.ndim == 3 else 0
    _check_mxfp8(name, codes, scales, k, f"the first ones are {tuple(first.shape)}")
    leading, dtype = grads[0].shape[:-1], grads[0].dtype
    for grad, code in zip(grads, codes, strict=True):
        if grad.shape != (*leading, code.shape[1]) or grad.dtype != dtype:
            raise ValueError(
                f"{name}: the gradient of codes {tuple(code.shape)} must be {dtype} "
                f"{(*leading, code.shape[1])}, as the first one is {tuple(grads[0].shape)}; one is "
                f"{grad.dtype} {tuple(grad.shape)}"
            )


def _check_mxfp8(
    name: str, codes: Sequence[Tensor], scales: Sequence[Tensor], k: int, why: str
) -> None:
    for code, scale in zip(codes, scales, strict=True):
        shape = tuple(code.shape)
        fits = len(shape) == 3 and shape[0] == 1 and shape[2] == k and k % BLOCK == 0
        if not fits or scale.shape != (1, shape[1], k // BLOCK):
            raise ValueError(
                f"{name}: codes must be [1, N, {k}], as {why}, and scales [1, N, {k} / {BLOCK}]; "
                f"some are {shape} and {tuple(scale.shape)}"
            )
        if code.dtype != torch.uint8 or scale.dtype != torch.uint8:
            raise ValueError(
                f"{name}: codes and scales must be uint8; some are {code.dtype} and {scale.dtype}"
            )


class Attention(NamedTuple):
    """The operands of ``attention_with_sinks``; see ``reference_around.attention_with_sinks``."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor
    mask: Tensor | None
    scale: float

    def check(self) -> None:
        """Check the operands.

        Raises:
            TypeError: dtypes are not one of ``hardware.DTYPES``, the same for all.
            ValueError: shapes do not fit.
        """
        query, key, value, sinks, mask, _ = self
        name = "mxfp4::attention_with_sinks"
        given = [query, key, value, sinks, *([] if mask is None else [mask])]
        if query.dtype not in DTYPES or any(tensor.dtype != query.dtype for tensor in given):
            raise TypeError(
                f"{name}: all tensors must be float32, bfloat16 or float16, and of one dtype; they "
                f"are {', '.join(str(tensor.dtype) for tensor in given)}"
            )
        if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
            raise ValueError(
                f"{name}: query must be [B, H, Q, D], key and value [B, KV, T, D]; they are "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        batch, heads, queries, size = query.shape
        if (
            key.shape[0] != batch
            or key.shape[3] != size
            or not key.shape[1]
            or heads % key.shape[1]
        ):
            raise ValueError(
                f"{name}: key and value must be [{batch}, KV, T, {size}], where KV divides "
                f"{heads}, as query is {tuple(query.shape)}; they are {tuple(key.shape)}"
            )
        if sinks.ndim != 1 or sinks.shape[0] != heads:
            raise ValueError(f"{name}: sinks must be [{heads}]; they are {tuple(sinks.shape)}")
        if mask is None:
            return
        logits = (batch, heads, queries, key.shape[2])
        sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        if mask.ndim > 4 or any(a != b and a != 1 for a, b in zip(sizes, logits, strict=True)):
            raise ValueError(f"{name}: mask must broadcast to {logits}; it is {tuple(mask.shape)}")
