"""The ways to choose routes that ``mxfp4::moe`` computes, from the router's logits on.

Any other router stays in the graph (``routes.py``). To add the form in which a rank of expert
parallelism takes its own routes: write it as a function, append a :class:`Router` to
:data:`ROUTERS`, and test near misses in ``tests/test_one_rank.py``.

Shape letters as in ``patterns.py``.
"""

from __future__ import annotations

import dataclasses

from mxfp4_fx.passes.expressions import Expr, Leaf, Letter, Op
from mxfp4_fx.passes.patterns import A, E, Shapes, T
from mxfp4_fx.passes.vocabulary import differs, equals, filled

LOGITS = Leaf("router_logits")
# Of expert parallelism: which rank's experts are here, and the number of all ranks' experts.
RANK, ALL = Letter("rank"), Letter("all experts")


@dataclasses.dataclass(frozen=True)
class Router:
    """A way to choose routes.

    Attributes:
        name: the way in words, for reports.
        scores, indices: its results as expressions.
        shapes: the shapes of the leaves.
        experts: how many experts there must be here for it to be right, or None.
        is_part: whether the routes are those of one rank of expert parallelism: ids count from the
            rank's first expert on, and routes to other ranks' experts have the id E and the score
            0. For the forms that take sentinels.
    """

    name: str
    scores: Op
    indices: Op
    shapes: Shapes
    experts: int | None = None
    is_part: bool = False


def router() -> tuple[Op, Op]:
    """Build GPT-OSS's router from its logits on: (scores, indices), softmax over the top-k."""
    top = Op("topk", {"input": LOGITS, "k": A, "dim": 1, "largest": True, "sorted": True})
    return Op("softmax", {"input": top[0], "dim": 1, "dtype": None}), _as_op(top[1])


def part_by_where(scores: Expr, indices: Expr) -> tuple[Op, Op]:
    """Build the routes of one rank from a router's, as transformers does from 5.23 on."""
    elsewhere = differs(indices // E, RANK)
    local = Op("where", {"condition": elsewhere, "input": E, "other": indices % E})
    return filled(scores, elsewhere, 0.0), local


def part_by_fmod(scores: Expr, indices: Expr) -> tuple[Op, Op]:
    """Build the routes of one rank as transformers 5.8 to 5.18 does, in the router's own hook."""
    elsewhere = differs(indices // E, RANK)
    local = Op("fmod", {"input": filled(indices, elsewhere, -1), "other": E})
    return filled(scores, elsewhere, 0.0), filled(local, equals(local, -1), E)


def part_of_one_expert(scores: Expr, indices: Expr) -> tuple[Op, Op]:
    """Build the same where a rank has a single expert: without fmod, as -1 would become 0."""
    elsewhere = differs(indices // E, RANK)
    marked = filled(indices, elsewhere, -1)
    local = filled(marked, Op("gt", {"input": marked, "other": 0}), 0)
    local = filled(local, Op("lt", {"input": marked, "other": 0}), -1)
    return filled(scores, elsewhere, 0.0), filled(local, equals(local, -1), E)


def _as_op(expr: Expr) -> Op:
    assert isinstance(expr, Op)
    return expr


_SOFTMAX = "softmax over the top-k logits"


def _part(way: str, routes: tuple[Op, Op], experts: int | None = None) -> Router:
    name = f"{_SOFTMAX}, then the ids and scores of one rank, {way}"
    return Router(name, *routes, {"router_logits": (T, ALL)}, experts, is_part=True)


_ROUTES = router()
ROUTERS = (
    Router(_SOFTMAX, *_ROUTES, {"router_logits": (T, E)}),
    _part("by where", part_by_where(*_ROUTES)),
    _part("by fmod", part_by_fmod(*_ROUTES)),
    _part("of a single expert", part_of_one_expert(*_ROUTES), experts=1),
)
