"""Attention with sinks on the CPU, in memory that is linear in the number of queries and of keys.

With m the largest logit, s the sum of exp(logit - m) over the keys, and lse = m + log(s), the
weights beside a sink are those without it, times s / (s + exp(sink - m)) = sigmoid(lse - sink). So
torch's flash attention for CPUs computes what is left, and gives lse.

Shape letters as in ``reference.py``.
"""

from __future__ import annotations

import errno
import math

import torch
from torch import Tensor

from mxfp4_fx.core import torch_private
from mxfp4_fx.core.errors import KernelsUnavailableError, NativeBuildError
from mxfp4_fx.ops import reference_around
from mxfp4_fx.ops.cpu_library import check, library
from mxfp4_fx.ops.cpu_structs import ATTENTION, DTYPES
from mxfp4_fx.ops.operands_around import Attention

# Queries that are computed at a time. Each block reads the keys that its part of the mask lets it
# see: with fewer queries these are fewer, with more the matmuls are larger.
_BLOCK = 128
# A key whose logit is this far below another has no weight in any float: exp(-200) = 1e-87.
_NO_WEIGHT = 200.0


def attention_with_sinks(operands: Attention) -> Tensor:
    """Compute ``ops.reference_around.attention_with_sinks``.

    Logits and sums are float32. What a key's mask leaves without weight is not computed.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    operands.check()
    query, key, value, sinks, mask, scale = operands
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    result = query.new_empty((batch, queries, heads, size))
    if not result.numel() or not keys:
        return result.zero_()
    query, key, value = map(_with_dense_rows, (query, key, value))
    if mask is not None:
        mask = mask.expand(*(1,) * (4 - mask.ndim), *mask.shape[:-1], keys)
    whole = Attention(query, key, value, sinks, mask, scale)
    if queries == 1 and _natively(whole, result):
        return result
    if not sinks.isfinite().all():
        # The product with sigmoid(lse - sink) would hide that softmax makes NaN of such a row.
        return reference_around.attention_with_sinks(whole)
    floor = None if mask is None or queries == 1 else _floor(whole)
    for start in range(0, queries, _BLOCK):
        rows = slice(start, min(start + _BLOCK, queries))
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        seen = slice(0, keys) if part is None or floor is None else _seen(part, floor)
        if seen.start == seen.stop:
            result[:, rows] = 0
            continue
        part = None if part is None else part[..., seen]
        block = Attention(query[:, :, rows], key[:, :, seen], value[:, :, seen], sinks, part, scale)
        _block(block, result[:, rows])
    return result


def _natively(operands: Attention, result: Tensor) -> bool:
    """Compute one query a head into ``result`` [B, 1, H, D]; False if the kernel does not do it.

    ``cpu_kernels/attention.h`` reads keys and values once, as they are.
    """
    try:
        kernel = library().mxfp4_attention_with_sinks
    except (KernelsUnavailableError, NativeBuildError):
        return False
    query, key, value, sinks, mask, scale = operands
    if mask is not None:
        mask = _with_dense_rows(mask)
    batch, heads, _, size = query.shape
    mask_strides = (0, 0) if mask is None else _strides(mask)[:2]
    arguments = ATTENTION.pack(
        *(tensor.data_ptr() for tensor in (query, key, value, sinks)),
        0 if mask is None else mask.data_ptr(),
        result.data_ptr(),
        *(batch, heads, key.shape[1], key.shape[2], size),
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        sinks.stride(0),
        *mask_strides,
        *(DTYPES[query.dtype], torch.get_num_threads()),
        scale,
    )
    status = kernel(arguments)
    if status == errno.ENOTSUP:
        return False
    check(status, "attention_with_sinks")
    return True


def _strides(x: Tensor) -> list[int]:
    """Return the strides of x, 0 where one element stands for all."""
    return [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]


def _with_dense_rows(x: Tensor) -> Tensor:
    """Return x with a last stride of 1; flash attention reads past the end of others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _floor(operands: Attention) -> float | None:
    """Return the value of a mask from which down a key has no weight beside the sink.

    None if there is no such value: a number is infinite or NaN, and reaches the result by any
    weight, zero too.
    """
    query, key, value, sinks, _, scale = operands
    largest = [max(-low.item(), high.item()) for low, high in map(torch.aminmax, (query, key))]
    logit = math.prod(largest) * query.shape[3] * abs(scale)
    floor = float(sinks.min()) - 2 * logit - _NO_WEIGHT  # twice: logits are rounded
    low, high = torch.aminmax(value)
    is_finite = math.isfinite(floor) and math.isfinite(low.item()) and math.isfinite(high.item())
    return floor if is_finite else None


def _seen(mask: Tensor, floor: float) -> slice:
    """Return the range of the keys that some query of a block may see, by its mask [.., Q, T]."""
    seen = ~(mask.amax(dim=(0, 1, 2)) <= floor)  # NaN is seen
    found = seen.nonzero()
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def _block(operands: Attention, out: Tensor) -> None:
    """Compute some queries [B, H, Q, D] into ``out`` [B, Q, H, D]; the mask is [.., Q or 1, T]."""
    query, key, value, sinks, mask, scale = operands
    flash = torch_private.flash_attention_for_cpu
    assert flash is not None  # the pass has asked
    heads, queries = query.shape[1:3]
    groups = heads // key.shape[1]
    if groups > 1:  # as queries of one head: each pass over its keys serves all of them
        query = query.unflatten(1, (-1, groups)).flatten(2, 3)
        mask = None if mask is None else _for_groups(mask, groups, queries)
    y, lse = flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
    if groups > 1:
        y, lse = (x.unflatten(2, (groups, queries)).flatten(1, 2) for x in (y, lse))
    kept = torch.sigmoid(lse - sinks.float()[:, None])[..., None]
    torch.mul(y.transpose(1, 2), kept.transpose(1, 2), out=out)


def _for_groups(mask: Tensor, groups: int, queries: int) -> Tensor:
    """Return a mask [.., H or 1, Q or 1, T] for the queries of each group as those of one head."""
    mask = mask.expand(-1, -1, queries, -1)
    if mask.shape[1] == 1:
        return mask.repeat(1, 1, groups, 1)
    return mask.unflatten(1, (-1, groups)).flatten(2, 3)
