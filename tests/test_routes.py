"""Routes of a model's own router: when the graph checks ids, and what ids of no expert mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import Graphs, compile_with, hidden, mlp
from near_miss import swap_methods
from torch import Tensor, nn

import mxfp4_fx

pytestmark = pytest.mark.usefixtures("no_gradients")

E, A = 6, 3


def sigmoid_top_k(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(logits.sigmoid(), A, dim=-1)
    return weights, ids


def as_int32(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = sigmoid_top_k(logits)
    return weights, ids.to(torch.int32)


def in_another_shape(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(logits.sigmoid().view(1, -1, E), A, dim=-1)
    return weights.view(-1, A), ids.view(-1, A)


def written_to(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = sigmoid_top_k(logits)
    ids.fmod_(E - 1)
    return weights, ids


def written_to_through_a_view(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = sigmoid_top_k(logits)
    ids.view(-1)[0:1].fmod_(E - 1)
    return weights, ids


def of_more_than_there_are(logits: Tensor) -> tuple[Tensor, Tensor]:
    return sigmoid_top_k(torch.cat([logits, logits - 1000], dim=1))


def values_instead(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, _ = sigmoid_top_k(logits)
    return weights, torch.topk(logits.argsort(dim=1), A, dim=-1)[0]


def of_few_ids(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = sigmoid_top_k(logits)
    return weights, ids % 4


def as_bytes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """A cast that may change ids, if there were more of them."""
    weights, ids = sigmoid_top_k(logits)
    return weights, ids.to(torch.int8).to(torch.int64)


def beyond_the_last(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = sigmoid_top_k(logits)
    return weights, ids + 1


Router = Callable[[Tensor], tuple[Tensor, Tensor]]


def with_own_router(choose: Router, form: str = "grouped_mm") -> nn.Module:
    module = mlp(form=form)

    def forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden_states, self.weight, self.bias)
        return (logits, *choose(logits))

    swap_methods(module.router, forward=forward)
    return module


def ops(graphs: Graphs) -> list[str]:
    return [str(node.target) for gm in graphs.seen for node in gm.graph.nodes]


@pytest.mark.parametrize("choose", [sigmoid_top_k, as_int32, in_another_shape])
def test_ids_of_a_top_k_among_the_experts_are_not_checked(choose: Router) -> None:
    graphs = Graphs()
    compiled = compile_with(with_own_router(choose), graphs, options={"strict": True})
    compiled(hidden())
    assert "mxfp4.expert_ids.default" not in ops(graphs)
    assert "mxfp4.routing.routes" in ops(graphs)


OTHERS = (
    *(written_to, written_to_through_a_view, of_more_than_there_are),
    *(values_instead, of_few_ids, as_bytes),
)


@pytest.mark.parametrize("choose", OTHERS)
def test_other_ids_are_checked(choose: Router) -> None:
    """And right, since all of them are those of experts."""
    graphs, module = Graphs(), with_own_router(choose)
    compiled = compile_with(module, graphs, options={"strict": True})
    compiled(hidden())
    assert "mxfp4.expert_ids.default" in ops(graphs)
    torch.compiler.reset()
    compile_with(module, options={"strict": True, "verify": True})(hidden())


def test_an_id_of_no_expert_is_an_error_when_it_runs() -> None:
    compiled = compile_with(with_own_router(beyond_the_last), options={"strict": True})
    with pytest.raises(IndexError, match="expert 6 is out of range: there are 6 experts"):
        compiled(hidden())


@pytest.mark.parametrize(
    ("choose", "words"),
    [
        (sigmoid_top_k, "routes of the model's own router"),
        (
            of_few_ids,
            "routes of the model's own router; ids of no expert are an error when it runs",
        ),
    ],
)
def test_the_user_hears_where_routes_come_from(choose: Router, words: str) -> None:
    (rewrite,) = mxfp4_fx.explain(with_own_router(choose), hidden()).rewrites
    assert rewrite.router == words
