"""Ids from E on mark routes to experts held elsewhere: every guard against them is recognised.

transformers guards under expert parallelism only since 5.19; from 5.8 to 5.18 it always did, in the
two ways that are written down here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import Graphs, compile_with, hidden, mlp
from one_rank import OneRank, by_fmod
from oracle import assert_as_accurate
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP


def grouped_with_masked_result(self: Any, x: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
    """transformers 5.8 to 5.12: rows are zeroed before the projections and after the scores."""
    top_k, rows = indices.size(-1), indices.numel()
    ids, order = torch.sort(indices.reshape(-1))
    counts = torch.histc(ids.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    foreign = (ids >= self.num_experts).unsqueeze(-1)
    ids.clamp_(max=self.num_experts - 1)
    sorted_x = x[order // top_k]
    sorted_x.masked_fill_(foreign, 0.0)
    y = torch.ops.transformers.grouped_mm_fallback(sorted_x, self.gate_up_proj, offs=offsets)
    y.add_(self.gate_up_proj_bias[ids])
    y = torch.ops.transformers.grouped_mm_fallback(
        self._apply_gate(y), self.down_proj, offs=offsets
    )
    y.add_(self.down_proj_bias[ids])
    y = y * scores.reshape(-1)[order].unsqueeze(-1)
    y.masked_fill_(foreign, 0.0)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(rows)
    return y[inverse].view(-1, top_k, x.size(-1)).sum(dim=1)


def batched_with_clamped_ids(self: Any, x: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
    """transformers 5.8 to 5.18: ids are clamped; scores are believed to be zero already."""
    top_k = indices.size(-1)
    ids = indices.reshape(-1).clamp(0, self.num_experts - 1)
    rows = x.repeat_interleave(top_k, dim=0)
    y = torch.bmm(rows.unsqueeze(1), self.gate_up_proj[ids]).squeeze(1)
    y = self._apply_gate(y.add_(self.gate_up_proj_bias[ids]))
    y = torch.bmm(y.unsqueeze(1), self.down_proj[ids]).squeeze(1)
    y = y.add_(self.down_proj_bias[ids]) * scores.reshape(-1).unsqueeze(-1)
    return y.view(-1, top_k, x.size(-1)).sum(dim=1)


OLDER = {"masked result": grouped_with_masked_result, "clamped ids": batched_with_clamped_ids}


@pytest.fixture(autouse=True)
def older_forms() -> Iterator[None]:
    for name, function in OLDER.items():
        ALL_EXPERTS_FUNCTIONS.register(name, function)
    with torch.no_grad():
        yield
    for name in OLDER:
        del ALL_EXPERTS_FUNCTIONS._global_mapping[name]


def guarded(form: str) -> GptOssMLP:
    module = mlp(form=form)
    module.experts._is_expert_parallel = form not in OLDER
    return module


FORMS = ["grouped_mm", "batched_mm", *OLDER]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_behind_the_router(form: str, dynamic: bool) -> None:
    module, x, graphs = guarded(form), hidden(), Graphs()
    out, _ = compile_with(module, graphs, dynamic=dynamic)(x)
    exact = mlp(form="eager").double()(x.double())[0]
    assert_as_accurate(out, module(x)[0], exact)
    calls = [str(n.target) for n in graphs.seen[0].graph.nodes]
    assert calls.count("mxfp4.matmul_ogs.default") == 2
    assert not {"clamp", "clamp_", "masked_fill", "masked_fill_"} & set(calls)


@pytest.mark.parametrize("form", OLDER)
def test_one_rank_of_an_older_release(form: str) -> None:
    module, x, graphs = OneRank(mlp(form=form), 1, 2, by_fmod), hidden(seed=1), Graphs()
    out = compile_with(module, graphs)(x)
    (routing,) = (n for n in graphs.seen[0].graph.nodes if "routing" in str(n.target))
    assert (str(routing.target), routing.args[1:]) == ("mxfp4.routing.default", (3, 3, 3))
    exact = OneRank(mlp(form="batched_mm"), 1, 2, by_fmod).double()(x.double())
    assert_as_accurate(out, module(x), exact)


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm", "masked result"])
def test_routes_to_other_experts_count_nothing(form: str) -> None:
    experts, x, graphs = guarded(form).experts, hidden()[0], Graphs()
    indices = torch.tensor([[0, 6, 3], [6, 6, 6], [5, 4, 6], [2, 1, 0]] + [[1, 2, 6]] * 3)
    weights = torch.rand(7, 3)
    out = compile_with(experts, graphs)(x, indices, weights)
    assert "mxfp4.routing.routes" in [str(n.target) for n in graphs.seen[0].graph.nodes]
    assert torch.equal(out[1], torch.zeros(64))
    inside = indices < 6
    exact = (
        mlp(form="batched_mm")
        .double()
        .experts(x.double(), indices.where(inside, 0), (weights * inside).double())
    )
    assert_as_accurate(out, experts(x, indices, weights), exact)


def outcome(run: Callable[..., Tensor], *args: Tensor) -> Tensor | None:
    try:
        return run(*args)
    except IndexError:
        return None


@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_ids_out_of_range_are_what_the_form_makes_of_them(form: str, is_parallel: bool) -> None:
    """The same numbers, or an error where eager has one or gives rows to the wrong experts."""
    experts, x = mlp(form=form).experts, hidden()[0]
    experts._is_expert_parallel = is_parallel
    exact = copy.deepcopy(experts).double()
    exact.config._experts_implementation = "batched_mm"
    graphs, weights = Graphs(), torch.rand(7, 3)
    run = compile_with(experts, graphs)
    raised = []
    for odd in (-7, -6, -1, 6, 7):
        indices = torch.tensor([[0, 1, 2]] * 6 + [[3, 4, odd]])
        actual = outcome(run, x, indices, weights)
        if actual is None:
            raised.append(odd)
        elif form == "batched_mm" or odd >= 6:
            ideal = exact(x.double(), indices, weights.double())
            assert_as_accurate(actual, experts(x, indices, weights), ideal)
        if form == "batched_mm" or odd >= 6:
            assert (actual is None) == (outcome(experts, x, indices, weights) is None)
    assert len(graphs.seen) == 1
    wrong = {"grouped_mm": [-7, -6, -1], "batched_mm": [] if is_parallel else [-7]}[form]
    assert raised == (wrong if is_parallel else [*wrong, 6, 7])


def test_an_id_out_of_range_is_named() -> None:
    args = hidden()[0], torch.full((7, 3), -1), torch.rand(7, 3)
    with pytest.raises(IndexError, match="expert -1 is out of range: there are 6 experts"):
        compile_with(mlp().experts)(*args)


def test_clamped_ids_are_the_first_and_the_last_expert() -> None:
    """Whatever their scores are: only a rank's own routes are known to have zeros there."""
    experts, x, graphs = guarded("clamped ids").experts, hidden()[0], Graphs()
    indices = torch.tensor([[-7, 6, 3], [6, 9, -1], [5, 4, 6], [2, 1, 0]] + [[1, 2, 8]] * 3)
    weights = torch.rand(7, 3)
    out = compile_with(experts, graphs)(x, indices, weights)
    assert "mxfp4.routing.routes" in [str(n.target) for n in graphs.seen[0].graph.nodes]
    exact = copy.deepcopy(experts).double()(x.double(), indices, weights.double())
    assert_as_accurate(out, experts(x, indices, weights), exact)
