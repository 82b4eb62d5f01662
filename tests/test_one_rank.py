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
import torch.distributed as dist
from combinations import covering, exhaustive
from models import Graphs, compile_with, hidden, mlp, pack
from near_miss import edited, missed, swap_methods
from one_rank import OneRank, Ways, by_fmod, by_where
from oracle import assert_as_accurate
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

import mxfp4_fx
from mxfp4_fx.calls import observed
from mxfp4_fx.passes.report import Rewrite

TOP_K = 3
FORMS = ("grouped_mm", "batched_mm", "eager", "packed")
FEW = [
    # Form, way, ranks, and the experts of all of them.
    ("grouped_mm", by_where, 2, 8),
    ("grouped_mm", by_fmod, 2, 8),
    ("grouped_mm", by_fmod, 4, 4),
    ("batched_mm", by_where, 1, 8),
    ("batched_mm", by_fmod, 2, 8),
    ("packed", by_where, 2, 8),
]
ALL = itertools.product(FORMS, (by_where, by_fmod), (1, 2, 4, 8), (8,))
LOCAL = {"ne", "eq", "gt", "lt", "mod", "remainder", "fmod", "where", "masked_fill", "floordiv"}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def whole(form: str = "grouped_mm", dtype: torch.dtype = torch.float32, experts: int = 8) -> Any:
    packed, form = form == "packed", "grouped_mm" if form == "packed" else form
    # Another seed than that of the activations, or each token would have one expert of its own.
    module = mlp(dtype, form, seed=1, num_local_experts=experts)
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
    ("form", "way", "ranks", "every"),
    [*FEW, *(exhaustive(*case) for case in ALL if case not in FEW)],
)
def test_the_parts_of_all_ranks_add_up(form: str, way: Ways, ranks: int, every: int) -> None:
    module, x, experts = whole(form, experts=every), hidden(35), every // ranks
    total, own = torch.zeros(35, 64), torch.zeros(35, 64)
    for rank in range(ranks):
        part, graphs = OneRank(module, rank, ranks, way), Graphs()
        y, rewrite = rewritten(part, graphs, x)
        total += y
        if form != "eager":  # the loop itself fails at ids of experts elsewhere
            own += part(x)
        assert (rewrite.first_expert, rewrite.experts) == (rank * experts, experts)
        assert rewrite.router.startswith(f"{experts} of {every} experts, from {rank * experts} on")
        (routing,) = (n for n in graphs.seen[0].graph.nodes if "routing" in str(n.target))
        here = () if ranks == 1 else (rank * experts, experts)
        assert routing.args[1:] == (TOP_K, *here)
        assert not LOCAL & set(calls(graphs))
    exact = whole("batched_mm", experts=every).double()(x.double())[0][0]
    uncompiled = whole()(x)[0][0] if form == "eager" else own
    assert_as_accurate(total, uncompiled, exact)


def test_other_readers_of_a_ranks_routes_get_them() -> None:
    """A router's hook hands them on: the MLP returns masked scores."""

    class Returning(OneRank):
        def forward(self, x: Tensor) -> Any:
            _, scores, ids = self.router(x[0])
            scores, local = self.way(scores, ids, self.number, self.rank)
            return self.experts(x[0], local, scores), scores, local, ids

    for way in (by_where, by_fmod):
        module, x = Returning(whole(), 1, 2, way), hidden(35)
        (y, *routes), rewrite = rewritten(module, Graphs(), x)
        assert rewrite.first_expert == 4
        (expected, *own) = module(x)
        for actual, one in zip(routes, own, strict=True):
            assert torch.equal(actual, one)
        assert_as_accurate(y, expected, exactly(OneRank(whole(), 1, 2, way), x))


@pytest.mark.parametrize(
    ("form", "dtype"),
    covering(["grouped_mm", "batched_mm"], [torch.bfloat16, torch.float16]),
)
def test_one_graph_for_any_number_of_tokens(form: str, dtype: torch.dtype) -> None:
    module, graphs = OneRank(whole(form, dtype), 1, 2), Graphs()
    run = compile_with(module, graphs, dynamic=True)
    for tokens in (7, 5, 12):
        x = hidden(tokens, dtype=dtype)
        assert_as_accurate(run(x), module(x), exactly(module, x))
    assert "routing.default" in calls(graphs)


@pytest.mark.parametrize("way", [by_where, exhaustive(by_fmod)])
def test_a_token_none_of_whose_experts_are_here(way: Ways) -> None:
    module, x = OneRank(whole(), 1, 8, way), hidden(35)
    elsewhere = (module.router(x[0])[2] != 1).all(dim=1)
    assert elsewhere.any()
    y, _ = rewritten(module, Graphs(), x)
    assert not y[elsewhere].any()
    assert (y[~elsewhere] != 0).all()


@pytest.mark.parametrize("form", ["grouped_mm", exhaustive("batched_mm")])
def test_verify(form: str) -> None:
    module, x = OneRank(whole(form), 1, 2), hidden()
    y = compile_with(module, options={"verify": True})(x)
    assert_as_accurate(y, module(x), exactly(module, x))


def test_explain_says_which_experts_are_here() -> None:
    text = str(mxfp4_fx.explain(OneRank(whole(), 1, 2), hidden()))
    assert "\n4 of 8 experts, from 4 on: routes to others count nothing here" in text


def test_the_collective_behind_it_stays_as_it_is() -> None:
    """With a group of one process that plays all: the sum over ranks is left to Inductor."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:

        class Summed(OneRank):
            def forward(self, x: Tensor) -> Any:
                y = super().forward(x)
                dist.all_reduce(y)
                return y

        module, graphs, x = Summed(whole(), 1, 2), Graphs(), hidden()
        y, _ = rewritten(module, graphs, x)
        assert_as_accurate(y, module(x), exactly(OneRank(whole(), 1, 2), x))
        (summed, *wait) = (n for n in graphs.seen[0].graph.nodes if "_c10d" in str(n.target))
        assert [str(n.target) for n in wait] == ["_c10d_functional.wait_tensor"]
        assert str(summed.target) == "_c10d_functional.all_reduce"
        assert str(summed.args[0].args[0].target) == "mxfp4.matmul_ogs.default"  # behind a cast
    finally:
        dist.destroy_process_group()


class Identity(torch.autograd.Function):
    """What transformers' ``_AllReduceBackward`` is on one rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2  # two ranks of the same gradient


class Trained(OneRank):
    """Whose gradients are summed over the ranks, as ``AllReduceEP`` does it."""

    def forward(self, x: Tensor) -> Any:
        x = x.reshape(-1, x.shape[-1])
        _, scores, ids = self.router(x)
        x, scores = Identity.apply(x), Identity.apply(scores)
        scores, ids = self.way(scores, ids, self.number, self.rank)
        return self.experts(x, ids, scores)


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        *(("grouped_mm", OneRank), ("batched_mm", Trained)),
        *(exhaustive("grouped_mm", Trained), exhaustive("batched_mm", OneRank)),
    ],
)
def test_gradients(form: str, kind: type[OneRank]) -> None:
    """Between scores and mask is the sum of gradients: such routes are taken as they are."""

    def gradients(module: OneRank, run: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            wanted = [x, *module.router.parameters()]
            return torch.autograd.grad(run(x).square().sum(), wanted)

    module, x = kind(whole(form), 1, 2), hidden(35)
    exact = copy.deepcopy(module).double()
    exact.experts.config._experts_implementation = "batched_mm"
    with observed() as found:
        actual = gradients(module, compile_with(module), x)
    (report,) = found.graphs
    is_taken = report.rewrites[0].router.startswith("routes of the model's own router")
    assert is_taken == (kind is Trained)
    own, ideal = gradients(module, module, x), gradients(exact, exact, x.double())
    for a, e, i in zip(actual, own, ideal, strict=True):
        assert_as_accurate(a, e, i)


# ---- near misses: the routes are taken as they are


MASK, LOCAL_IDS = "(ids // experts) != rank", "torch.where(elsewhere, experts, ids % experts)"
MARKED, SCORES = "ids.masked_fill(elsewhere, -1)", "scores.masked_fill(elsewhere, 0.0)"
# What is changed: in which way, what, into what, and the reason.
NEAR = {
    "before": (by_where, MASK, "(ids // experts) < rank", "other=rank), found lt("),
    "equal": (by_where, MASK, "(ids // experts) == rank", "other=rank), found eq("),
    "divisor": (by_where, MASK, "(ids // (experts + 1)) != rank", "E = 4 but found 5"),
    "shifted": (by_where, MASK, "((ids + 1) // experts) != rank", "index=1), found add("),
    "modulo": (by_where, MASK, "(ids % experts) != rank", "other=E), found mod("),
    "tensor": (by_where, MASK, "(ids // experts) != ids[:1]", "with rank but found"),
    "half": (by_where, MASK, "(ids // experts) != rank / 2", "rank 0.5 is no whole number"),
    "float": (by_where, MASK, "(ids // experts) != float(rank)", "rank 1.0 is no whole number"),
    "beyond": (by_where, MASK, "(ids // experts) != rank + 1", "no 4 experts from 8 on among 8"),
    "below": (by_where, MASK, "(ids // experts) != rank - 2", "no 4 experts from -4 on among 8"),
    "modulus": (by_where, LOCAL_IDS, LOCAL_IDS.replace("% experts", "% 5"), "E = 4 but found 5"),
    "no modulus": (by_where, LOCAL_IDS, LOCAL_IDS.replace("ids % experts", "ids"), "mod("),
    "sentinel": (by_where, LOCAL_IDS, LOCAL_IDS.replace(", experts,", ", 3,"), "E = 4 but found 3"),
    "greater sentinel": (by_where, LOCAL_IDS, LOCAL_IDS.replace(", experts,", ", 9,"), "found 9"),
    "swapped": (by_where, LOCAL_IDS, "torch.where(elsewhere, ids % experts, experts)", "E but"),
    "method": (by_where, LOCAL_IDS, "(ids % experts).where(~elsewhere, experts)", "found where"),
    "added": (by_where, LOCAL_IDS, f"{LOCAL_IDS} + (ids < 2)", "found add("),
    "another rank's scores": (
        *(by_where, SCORES, "scores.masked_fill((ids // experts) != rank - 1, 0.0)"),
        "should be used again",
    ),
    "the same mask again": (
        *(by_where, SCORES, f"scores.masked_fill({MASK}, 0.0)"),
        "should be used again",
    ),
    "the others' scores": (by_where, SCORES, SCORES.replace("else", "~else"), "found invert"),
    "half a score": (by_where, SCORES, SCORES.replace("0.0", "0.5"), "but found 0.5"),
    "scores": (by_where, SCORES, "scores", "index=1), found where("),
    "scaled": (by_where, SCORES, f"{SCORES} * 2", "found mul("),
    "reversed": (by_where, SCORES, SCORES.replace("scores.", "scores.flip(1)."), "found flip("),
    "remainder": (by_fmod, "torch.fmod(ids", "torch.remainder(ids", "fmod("),
    "fmod": (by_fmod, "fmod(ids, experts)", "fmod(ids, experts + 1)", "E = 4 but found 5"),
    "last sentinel": (by_fmod, "ids == -1, experts)", "ids == -1, 3)", "E = 4 but found 3"),
    "another mark": (by_fmod, MARKED, MARKED.replace("-1", "-5"), "-1 = -1 but found -5"),
    "not marked": (by_fmod, MARKED, "ids", "expected masked_fill("),
    "several as one": (by_fmod, "experts > 1", "experts > 4", "it is for 1 expert, of 4"),
}
# What others show as well.
RARE = {"shifted", "modulo", "float", "no modulus", "greater sentinel", "method", "added"}
RARE |= {"scaled", "reversed", "fmod", "last sentinel", "equal", "tensor", "not marked"}
RARE |= {"below", "before", "another mark", "the same mask again", "the others' scores"}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        case if name not in RARE and at % 2 == (case[1] == "batched_mm") else exhaustive(*case)
        for at, name in enumerate(NEAR)
        for case in ((name, "grouped_mm"), (name, "batched_mm"))
    ],
)
def test_a_near_miss_is_taken_as_it_is(name: str, form: str) -> None:
    way, old, new, reason = NEAR[name]
    module, graphs, x = OneRank(whole(form), 1, 2, edited(way, {old: new})), Graphs(), hidden(35)
    y, rewrite = rewritten(module, graphs, x)
    assert rewrite.router.startswith("routes of the model's own router; ids ")
    assert reason in rewrite.why_own_router
    assert "routing.routes" in calls(graphs)
    assert rewrite.first_expert == 0
    assert_as_accurate(y, module(x), exactly(module, x))


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm", "packed"])
def test_ids_below_0_are_what_the_form_makes_of_them(form: str) -> None:
    """batched_mm takes expert 0, grouped_mm gives rows to the wrong experts: an error."""
    way = edited(by_fmod, {"ids == -1": "ids == 0"})  # what is elsewhere keeps -1
    module, x = OneRank(whole(form), 1, 2, way), hidden(35)
    if form == "grouped_mm":
        with pytest.raises(IndexError, match="expert -1 is out of range: there are 4 experts"):
            compile_with(module)(x)
        return
    y, rewrite = rewritten(module, Graphs(), x)
    assert "-1 = -1 but found 0" in rewrite.why_own_router
    dense = OneRank(whole("batched_mm"), 1, 2, way)
    assert_as_accurate(y, dense(x), exactly(dense, x))


def test_ids_and_scores_of_two_routers() -> None:
    change = "router_indices = torch.topk(-router_logits, self.top_k, dim=-1)[1]\n    return r"
    router = edited(GptOssTopKRouter.forward, {"return r": change})
    module, x = OneRank(whole(), 1, 2), hidden(35)
    swap_methods(module.router, forward=router)
    y, rewrite = rewritten(module, Graphs(), x)
    assert "should be used again" in rewrite.why_own_router
    assert_as_accurate(y, module(x), exactly(module, x))


def test_a_rank_that_data_tells() -> None:
    way = edited(by_where, {"!= rank": "!= (ids.min() * 0 + rank).item()"})
    module, x = OneRank(whole(), 1, 2, way), hidden(35)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        y, rewrite = rewritten(module, Graphs(), x)
    assert "is no whole number that is known" in rewrite.why_own_router
    assert_as_accurate(y, module(x), exactly(module, x))


@pytest.mark.parametrize("form", ["grouped_mm", exhaustive("batched_mm")])
def test_a_form_without_sentinels_has_none(form: str) -> None:
    """It fails at ids of experts elsewhere, rewritten or not."""
    module = OneRank(whole(form), 1, 2)
    module.experts._is_expert_parallel = False
    with pytest.raises(IndexError, match="expert 4 is out of range: there are 4 experts"):
        compile_with(module, options={"strict": True})(hidden(35))


@pytest.mark.parametrize("form", ["grouped_mm", exhaustive("batched_mm")])
def test_a_routers_scores_that_are_written_to(form: str) -> None:
    changes = {"local = ": f"scores = {SCORES}\n    local = "}
    changes["return scores.masked_fill(elsewhere, 0.0)"] = "scores.mul_(1.5)\n    return scores"
    way = edited(by_where, changes)
    assert "is written to in the graph" in missed(OneRank(whole(form), 1, 2, way), hidden(35))


def test_a_router_that_is_not_proven_leaves_nothing_behind() -> None:
    """Not even that its logits are read, which are written to between its top-k and the experts."""
    router = edited(GptOssTopKRouter.forward, {"return r": "router_logits.zero_()\n    return r"})
    module, x = OneRank(whole(), 1, 2, edited(by_where, {SCORES: "scores"})), hidden(35)
    swap_methods(module.router, forward=router)
    y, rewrite = rewritten(module, Graphs(), x)
    assert rewrite.router.startswith("routes of the model's own router")
    assert_as_accurate(y, module(x), exactly(module, x))


def test_ids_that_are_no_integers_are_refused() -> None:
    """Packed experts take them, and kernels round them in ways of their own."""
    way = edited(by_where, {f"{SCORES}, local": f"{SCORES}, local + scores"})
    reason = "expert ids are torch.float32, not whole numbers"
    assert reason in missed(OneRank(whole("packed"), 1, 2, way), hidden(35))
