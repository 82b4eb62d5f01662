"""One computation, spelled in many ways, is one canonical call; another computation is not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mxfp4_fx.passes.graph import Call, read_call

X = torch.arange(6.0).view(2, 3)


def last_call(f: Callable[[Tensor], Any]) -> Call | None:
    """The canonical call of the node that computes ``f``'s result."""
    found: list[Call | None] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        calls = [node for node in gm.graph.nodes if node.op.startswith("call_")]
        calls = [node for node in calls if node.target is not operator.getitem]  # of a tuple
        found.append(read_call(calls[-1]))
        return gm.forward

    torch.compiler.reset()
    torch.compile(f, backend=backend, fullgraph=True)(X)
    return found[0]


def spelled(call: Call | None) -> tuple[str, dict[str, str]]:
    assert call is not None
    return call.op, {name: str(value) for name, value in call.args.items()}


SAME: dict[str, list[Callable[[Tensor], Any]]] = {
    "softmax": [
        lambda x: torch.softmax(x, 1),
        lambda x: torch.softmax(x, -1, torch.float32),
        lambda x: F.softmax(x, dim=1),
        lambda x: F.softmax(x, -1, dtype=torch.float32),
        lambda x: x.softmax(-1),
    ],
    "clamp": [lambda x: x.clamp(max=2), lambda x: torch.clamp(x, None, 2), lambda x: x.clip(max=2)],
    "sum": [lambda x: x.sum(1), lambda x: torch.sum(x, dim=-1), lambda x: x.sum((1,))],
    "topk": [lambda x: torch.topk(x, 2), lambda x: x.topk(k=2, dim=1, sorted=True)],
    "mul": [lambda x: x * 3, lambda x: x.mul(3), lambda x: torch.mul(x, 3)],
    "cast": [lambda x: x.half(), lambda x: x.to(torch.float16), lambda x: x.to(dtype=torch.half)],
    "view": [
        lambda x: x.view(3, 2),
        lambda x: x.reshape((3, -1)),
        lambda x: torch.reshape(x, (3, 2)),
    ],
    "sub": [lambda x: x - 3, lambda x: x.sub(3), lambda x: torch.sub(x, 3)],
    "transpose": [lambda x: x.transpose(0, 1), lambda x: torch.transpose(x, -1, -2)],
    "max": [lambda x: x.max(1), lambda x: torch.max(x, dim=-1)],
    "dropout": [lambda x: F.dropout(x, 0.0), lambda x: F.dropout(x, p=0.0, training=True)],
    "sort": [lambda x: torch.sort(x), lambda x: x.sort(dim=-1, stable=True)],
    "mod": [
        lambda x: x % 2,
        lambda x: x.remainder(2),
        lambda x: torch.remainder(x, other=2),
    ],
    "fmod": [lambda x: torch.fmod(x, 2), lambda x: x.fmod(2)],
    "ne": [lambda x: x != 2, lambda x: x.ne(2), lambda x: torch.ne(x, 2)],
    "eq": [lambda x: x == 2, lambda x: x.eq(2), lambda x: torch.eq(x, 2)],
    "gt": [lambda x: x > 2, lambda x: x.gt(2), lambda x: torch.gt(x, 2)],
    "lt": [lambda x: x < 2, lambda x: x.lt(2), lambda x: torch.lt(x, 2)],
    "where": [
        lambda x: torch.where(x > 1, x, 0),
        lambda x: torch.where(condition=x > 1, input=x, other=0),
    ],
}


@pytest.mark.parametrize("op", SAME)
def test_spellings_of_one_computation(op: str) -> None:
    calls = [spelled(last_call(f)) for f in SAME[op]]
    assert calls[0][0] == op
    assert all(call == calls[0] for call in calls)


DIFFERENT: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "dim": (lambda x: torch.softmax(x, 1), lambda x: torch.softmax(x, 0)),
    "dtype": (lambda x: torch.softmax(x, 1), lambda x: torch.softmax(x, 1, torch.float64)),
    "side": (lambda x: x.clamp(max=2), lambda x: x.clamp(2)),
    "keepdim": (lambda x: x.sum(1), lambda x: x.sum(1, True)),
    "largest": (lambda x: x.topk(2), lambda x: x.topk(2, largest=False)),
    "alpha": (lambda x: x + x, lambda x: torch.add(x, x, alpha=2)),
    "cast": (lambda x: x.half(), lambda x: x.bfloat16()),
    "descending": (lambda x: torch.sort(x), lambda x: torch.sort(x, 1, True)),
    "sign of the remainder": (lambda x: x % 2, lambda x: x.fmod(2)),
    "branch": (lambda x: torch.where(x > 1, x, 0), lambda x: torch.where(x > 1, 0, x)),
}


@pytest.mark.parametrize("by", DIFFERENT)
def test_different_computations(by: str) -> None:
    f, other = DIFFERENT[by]
    assert spelled(last_call(f)) != spelled(last_call(other))


UNREAD: dict[str, Callable[[Tensor], Any]] = {
    "bits read anew": lambda x: x.view(torch.int32),
    "out": lambda x: torch.mul(x, 3, out=torch.empty(2, 3)),
    "copy": lambda x: x.to(torch.float16, copy=True),
    "another op": lambda x: torch.cumprod(x, 0),
    "arguments in another order": lambda x: x.where(x > 1, 0),
}


@pytest.mark.parametrize("what", UNREAD)
def test_what_no_pattern_speaks_of(what: str) -> None:
    assert last_call(UNREAD[what]) is None
