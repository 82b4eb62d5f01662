"""A rank of expert parallelism: its routes are proven, or else taken as they are.

Both give the numbers of the uncompiled rank. ``Rewrite.router`` says which it was, and why.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from combinations import exhaustive
from models import Graphs, compile_with, hidden, mlp, pack
from one_rank import OneRank, Ways, by_fmod, by_where
from oracle import assert_as_accurate
from torch import Tensor, nn

from mxfp4_fx.calls import observed
from mxfp4_fx.passes.report import Rewrite

EXPERTS, TOP_K = 8, 3
FORMS = ("grouped_mm", "batched_mm", "eager", "packed")
FEW = [
    ("grouped_mm", by_where, 4),
    ("grouped_mm", by_fmod, 2),
    ("grouped_mm", by_fmod, 8),
    ("batched_mm", by_where, 1),
    ("batched_mm", by_fmod, 2),
    ("packed", by_where, 2),
]
ALL = itertools.product(FORMS, (by_where, by_fmod), (1, 2, 4, 8))
LOCAL = {"ne", "eq", "gt", "lt", "mod", "remainder", "fmod", "where", "masked_fill", "floordiv"}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def whole(form: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> Any:
    packed, form = form == "packed", "grouped_mm" if form == "packed" else form
    module = mlp(dtype, form, num_local_experts=EXPERTS)
    return pack(module) if packed else module


def exactly(module: OneRank, x: Tensor) -> Tensor:
    """The result of a rank in float64, which the form batched_mm has."""
    exact = copy.deepcopy(module)
    exact.experts.config._experts_implementation = "batched_mm"
    result: Tensor = exact.double()(x.double())
    return result


def calls(graphs: Graphs) -> list[str]:
    (gm,) = graphs.seen
    return [getattr(n.target, "__name__", str(n.target)) for n in gm.graph.nodes]


def rewritten(module: nn.Module, graphs: Graphs, x: Tensor, **kwargs: Any) -> tuple[Any, Rewrite]:
    """The compiled module's result, and the report on its only layer."""
    torch.compiler.reset()
    with observed() as found:
        result = compile_with(module, graphs, **kwargs)(x)
    (report,) = found.graphs
    assert not report.misses
    (rewrite,) = report.rewrites
    return result, rewrite


# ---- routes that are proven


@pytest.mark.parametrize(
    ("form", "way", "ranks"),
    [*FEW, *(exhaustive(*case) for case in ALL if case not in FEW)],
)
def test_the_parts_of_all_ranks_add_up(form: str, way: Ways, ranks: int) -> None:
    module, x = whole(form), hidden(35)
    total, own = torch.zeros(35, 64), torch.zeros(35, 64)
    for rank in range(ranks):
        part, graphs = OneRank(module, rank, ranks, way), Graphs()
        y, rewrite = rewritten(part, graphs, x)
        total += y
        if form != "eager":  # the loop itself fails at ids of experts elsewhere
            own += part(x)
        experts = EXPERTS // ranks
        assert (rewrite.first_expert, rewrite.experts) == (rank * experts, experts)
        assert rewrite.router.startswith(f"{experts} of 8 experts, from {rank * experts} on")
        (routing,) = (n for n in graphs.seen[0].graph.nodes if "routing" in str(n.target))
        here = () if ranks == 1 else (rank * experts, experts)
        assert routing.args[1:] == (TOP_K, *here)
        assert not LOCAL & set(calls(graphs))
    exact = mlp(form="batched_mm", num_local_experts=EXPERTS).double()(x.double())[0][0]
    uncompiled = whole()(x)[0][0] if form == "eager" else own
    assert_as_accurate(total, uncompiled, exact)
