"""What private parts of Dynamo are trusted to do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import mxfp4_fx
from mxfp4_fx import calls
from mxfp4_fx.core import torch_private

entered: list[str] = []


@contextlib.contextmanager
def their_context() -> Iterator[None]:
    entered.append("theirs")
    yield


def their_backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
    return gm.forward


their_backend.backend_ctx_ctor = their_context  # type: ignore[attr-defined]


def add_one(x: Tensor) -> Tensor:
    call = calls.current()
    entered.append("none" if call is None else str(call.options.inner))
    return x + 1


@pytest.fixture(autouse=True)
def nothing_entered() -> None:
    entered.clear()


@pytest.mark.filterwarnings("ignore::mxfp4_fx.errors.NoExpertsWarning")
def test_a_context_surrounds_each_call_of_ours_compiled_or_not() -> None:
    options = {"inner": "eager"}
    partial = functools.partial(mxfp4_fx.mxfp4, options=options)
    for run in (
        torch.compile(torch.compiler.disable(add_one), backend="mxfp4", options=options),
        torch.compile(add_one, backend=partial),
        torch._dynamo.optimize(partial)(add_one),
    ):
        run(torch.ones(2))
        run(torch.ones(2))
    assert entered == ["eager"] * 6
    assert calls.current() is None


def test_other_backends_keep_a_context_of_their_own() -> None:
    torch._dynamo.optimize(their_backend)(add_one)(torch.ones(2))
    torch.compile(add_one, backend="eager")(torch.ones(2))
    assert entered == ["theirs", "none", "none"]


def test_what_is_never_compiled_by_itself_is_inlined_elsewhere() -> None:
    seen: list[bool] = []

    @torch_private.never_compiled
    def inner(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x * 2

    @torch._dynamo.disable(recursive=False)
    def between(x: Tensor) -> Tensor:
        return inner(x)

    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(lambda x: between(x), backend=keep)(torch.ones(2))
    assert (seen, graphs) == ([False], [])
    torch.compile(lambda x: inner(x + 1), backend=keep, fullgraph=True)(torch.ones(2))
    assert (seen, len(graphs)) == ([False, True], 1)
