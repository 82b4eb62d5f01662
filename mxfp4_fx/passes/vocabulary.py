"""The vocabulary of patterns: canonical calls (``graph.Call``) with every argument that matters."""

from __future__ import annotations

import torch

from mxfp4_fx.passes.expressions import Expr, Op, Scalar


def view(x: Expr, *shape: Scalar | int) -> Expr:
    return Op("view", {"input": x, "shape": shape})


def cast(x: Expr, dtype: torch.dtype) -> Expr:
    return Op("cast", {"input": x, "dtype": dtype})


def sort(x: Expr) -> Expr:
    return Op("sort", {"input": x, "dim": 0, "descending": False})


def histc(x: Expr, bins: Scalar, low: int, high: Scalar) -> Expr:
    return Op("histc", {"input": x, "bins": bins, "min": low, "max": high})


def cumsum(x: Expr, dtype: torch.dtype) -> Expr:
    return Op("cumsum", {"input": x, "dim": 0, "dtype": dtype})


def transpose(x: Expr) -> Expr:
    """Swap the last two of three axes."""
    return Op("transpose", {"input": x, "dim0": 1, "dim1": 2})


def chunk(x: Expr, chunks: int, dim: int) -> Expr:
    return Op("chunk", {"input": x, "chunks": chunks, "dim": dim})


def repeat_rows(x: Expr, times: Scalar) -> Expr:
    return Op("repeat_interleave", {"input": x, "repeats": times, "dim": 0})


def clamp(x: Expr, low: Scalar | int | None, high: Scalar | None) -> Expr:
    return Op("clamp", {"input": x, "min": low, "max": high})


def at_least(x: Expr, low: Scalar) -> Expr:
    return Op("ge", {"input": x, "other": low})


def equals(x: Expr, other: Scalar | int) -> Expr:
    return Op("eq", {"input": x, "other": other})


def differs(x: Expr, other: Scalar | int) -> Expr:
    return Op("ne", {"input": x, "other": other})


def zeroed(x: Expr, mask: Expr) -> Expr:
    return filled(x, mask, 0.0)


def filled(x: Expr, mask: Expr, value: Scalar | float) -> Op:
    return Op("masked_fill", {"input": x, "mask": mask, "value": value})


def sigmoid(x: Expr) -> Expr:
    return Op("sigmoid", {"input": x})


def empty_like(x: Expr) -> Expr:
    return Op("empty_like", {"input": x})


def arange(end: Scalar) -> Expr:
    return Op("arange", {"end": end})


def index_put(x: Expr, index: Expr, values: Expr) -> Expr:
    args = {"input": x, "indices": (index,), "values": values, "accumulate": False}
    return Op("index_put", args)
