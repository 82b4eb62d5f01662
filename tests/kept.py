"""A weight as models may hold it: in every order, as floats and packed."""

from __future__ import annotations

import itertools

from torch import Tensor

from mxfp4_fx.core.formats import quantize
from mxfp4_fx.core.orders import Order
from mxfp4_fx.weights.source import Source, encoding_of

ORDERS = [Order(*order) for order in itertools.product((True, False), repeat=2)]


def in_order(parts: tuple[Tensor, ...], order: Order) -> tuple[Tensor, ...]:
    """Rows [E, N, ...] in the kernels' order -> contiguous tensors in another one."""
    if order.is_concatenated:
        parts = tuple(part.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) for part in parts)
    if order.is_transposed:
        parts = tuple(part.transpose(1, 2) for part in parts)
    return tuple(part.contiguous() for part in parts)


def sources(rows: Tensor) -> list[Source]:
    """The floats [E, N, K] in all four orders, and what they are in MXFP4 in both."""
    held = [Source(in_order((rows,), order), encoding_of(order)) for order in ORDERS]
    for is_concatenated in (False, True):
        order = Order(False, is_concatenated)
        held.append(Source(in_order(quantize(rows), order), encoding_of(order, "row_major")))
    return held
