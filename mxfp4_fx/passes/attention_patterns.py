"""Attention with sinks as transformers writes it ("eager"), as expressions; see ``expressions.py``.

A sink is a learned logit of a head that has no value: it takes weight from the keys. Eager
attention appends the sinks to the logits as one more key, and drops its weights after the softmax.

Shape letters: B batch, H heads of queries, KV heads of keys and values, G = H / KV, Q queries, T
keys, D head dim.
"""

from __future__ import annotations

import dataclasses

import torch

from mxfp4_fx.passes.expressions import Expr, Leaf, Letter, Op, Rounded, Scalar
from mxfp4_fx.passes.patterns import Shapes, view

B, H, KV, G, Q, T, D = (Letter(name) for name in ("B", "H", "KV", "G", "Q", "T", "D"))
SCALE = Letter("scale")

QUERY, KEY, VALUE = Leaf("query"), Leaf("key"), Leaf("value")
MASK, SINKS = Leaf("mask"), Leaf("sinks")


@dataclasses.dataclass(frozen=True)
class AttentionForm:
    """A way to write attention with sinks.

    Attributes:
        result: the result [B, Q, H, D] as an expression.
        weights: the softmax over keys and sink in it, by which it is recognized.
        shapes: the shapes of the leaves. A mask may have any that broadcasts to the logits.
    """

    result: Op
    weights: Op
    shapes: Shapes


def form(is_grouped: bool, is_masked: bool) -> AttentionForm:
    """Build attention with sinks.

    Args:
        is_grouped: several heads of queries share a head of keys and values, which is repeated.
        is_masked: a mask is added to the logits.
    """
    key, value = (repeated(KEY), repeated(VALUE)) if is_grouped else (KEY, VALUE)
    logits = matmul(QUERY, transpose(key, 2, 3)) * SCALE
    if is_masked:
        logits = logits + MASK
    logits = cat(logits, expand(view(SINKS, 1, H, 1, 1), B, H, Q, 1))
    weights = softmax(logits - maximum(logits))
    without_sink = Rounded(dropout(weights[..., slice(None, -1, None)]))
    result = contiguous(transpose(matmul(without_sink, value), 1, 2))
    heads = KV if is_grouped else H
    shapes: Shapes = {
        "sinks": (H,),
        "query": (B, H, Q, D),
        "key": (B, heads, T, D),
        "value": (B, heads, T, D),
    }
    return AttentionForm(result, weights, shapes)


def repeated(x: Expr) -> Expr:
    """Repeat each head G times: [B, KV, T, D] -> [B, H, T, D]."""
    every = slice(None, None, None)
    return view(expand(x[every, every, None, every, every], B, KV, G, T, D), B, H, T, D)


def matmul(x: Expr, other: Expr) -> Expr:
    return Op("matmul", {"input": x, "other": other})


def transpose(x: Expr, dim0: int, dim1: int) -> Expr:
    return Op("transpose", {"input": x, "dim0": dim0, "dim1": dim1})


def expand(x: Expr, *shape: Scalar | int) -> Expr:
    return Op("expand", {"input": x, "shape": shape})


def contiguous(x: Expr) -> Op:
    return Op("contiguous", {"input": x, "memory_format": torch.contiguous_format})


def cat(x: Expr, other: Expr) -> Expr:
    return Op("cat", {"tensors": (x, other), "dim": 3})


def maximum(x: Expr) -> Expr:
    return Op("max", {"input": x, "dim": 3, "keepdim": True})[0]


def softmax(x: Expr) -> Op:
    return Op("softmax", {"input": x, "dim": 3, "dtype": None})


def dropout(x: Expr) -> Expr:
    """Build a dropout with any arguments; the pass checks that it drops nothing."""
    return Op("dropout", {"input": x})


ATTENTION_FORMS = tuple(
    form(is_grouped, is_masked) for is_grouped in (True, False) for is_masked in (True, False)
)
