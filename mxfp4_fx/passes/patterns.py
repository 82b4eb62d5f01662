"""The forms of GPT-OSS experts, each written as the computation that it is.

To add one: write a function from the leaves to the experts' result in the vocabulary below and
append it to :data:`FORMS`. Its tests are a captured model in ``tests/test_forms.py`` and a near
miss for each of its constants in ``tests/test_near_misses.py``.

Shape letters: T tokens, E experts, A experts per token, H hidden, I intermediate.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import torch

from mxfp4_fx.core.layouts import CHECKPOINT_ORDER, HUB_LAYOUTS, LAYOUTS
from mxfp4_fx.passes.matcher import Expr, Leaf, Letter, Op, Rounded, Scalar

T, A, E, H, I = (Letter(name) for name in "TAEHI")  # noqa: E741
ALPHA, LIMIT = Letter("alpha"), Letter("limit")
# Of expert parallelism: which rank's experts are here, and the number of all ranks' experts.
RANK, ALL = Letter("rank"), Letter("all experts")

HIDDEN, LOGITS = Leaf("hidden"), Leaf("router_logits")
INDICES, SCORES = Leaf("indices"), Leaf("scores")
GATE_UP, GATE_UP_BIAS = Leaf("gate_up"), Leaf("gate_up_bias")
DOWN, DOWN_BIAS = Leaf("down"), Leaf("down_bias")

GATE_UP_SCALES, DOWN_SCALES = Leaf("gate_up_scales"), Leaf("down_scales")

OUTPUTS = "outputs"  # the role of the experts' outputs

Shapes = dict[str, tuple[Scalar | int, ...]]

# Weights come first and bind the letters: their sizes are fixed, an input's may be symbolic.
EXPERT_SHAPES: Shapes = {
    "down": (E, I, H),
    "down_bias": (E, H),
    "gate_up": (E, H, I * 2),
    "gate_up_bias": (E, I * 2),
    "hidden": (T, H),
    "indices": (T, A),
    "scores": (T, A),
}


def packed_shapes(layout: str) -> Shapes:
    """Return the shapes of the leaves of packed experts, whose weights are held in a layout."""
    (gate_up, gate_up_scales), (down, down_scales) = (
        LAYOUTS[layout].shapes(n, k)  # type: ignore[arg-type]  # letters, and arithmetic on them
        for n, k in ((I * 2, H), (H, I))
    )
    return {
        "down_bias": (E, H),
        "gate_up_bias": (E, I * 2),
        "down": (E, *down),
        "down_scales": (E, *down_scales),
        "gate_up": (E, *gate_up),
        "gate_up_scales": (E, *gate_up_scales),
        "hidden": (T, H),
        "indices": (T, A),
        "scores": (T, A),
    }


class Sentinels(enum.Enum):
    """The treatment of sentinels: ids from E on, which mark routes to experts held elsewhere.

    transformers 5.8 to 5.18 always guards against them, later versions under expert parallelism
    only. Ids from the router's top-k are never sentinels; a rank's own ids may be (``Router``).
    """

    NONE = "nothing"
    ROWS = "input rows and the results of both projections are zeroed"
    RESULT = "input rows and weighted results are zeroed"
    SCORES = "ids are clamped, their scores zeroed"
    CLAMP = "ids are clamped, and their scores are left as they are"


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to write the experts.

    Attributes:
        name: the name in reports.
        result: the experts' result as an expression.
        below, above: the form's treatment of ids below 0 and of ids from E on, as ``expert_ids`` in
            ``ops/reference.py`` defines it. The router chooses no such ids.
        shapes: the shapes of the leaves.
        layout: the layout in which the model holds packed weights.
    """

    name: str
    result: Op
    below: str = "error"
    above: str = "error"
    shapes: Shapes = dataclasses.field(default_factory=lambda: EXPERT_SHAPES)
    layout: str = CHECKPOINT_ORDER

    @property
    def takes_sentinels(self) -> bool:
        """Whether ids from E on have a meaning. If they have, all routes do, whoever made them."""
        return self.above != "error"


@dataclasses.dataclass(frozen=True)
class Router:
    """A way to choose routes.

    Attributes:
        name: the way in words, for reports.
        scores, indices: its results as expressions.
        shapes: the shapes of the leaves.
        is_part: whether the routes are those of one rank of expert parallelism: ids count from the
            rank's first expert on, and routes to other ranks' experts have the id E and the score
            0. For the forms that take sentinels.
    """

    name: str
    scores: Op
    indices: Op
    shapes: Shapes
    is_part: bool = False


def grouped_mm(histogram_dtype: torch.dtype, sentinels: Sentinels) -> Op:
    """Build transformers 5's default: rows sorted by expert, one grouped matmul for a projection.

    transformers takes the histogram of float32 ids on a CPU and of int32 ids elsewhere.
    """
    by_expert = sort(view(INDICES, T * A))
    ids, order = by_expert[0], by_expert[1]
    counts = histc(cast(ids, histogram_dtype), bins=E, low=0, high=E - 1)
    offsets = cumsum(counts, torch.int32)
    x = HIDDEN[order // A]

    guarded = sentinels is not Sentinels.NONE
    foreign = view(at_least(ids, E), T * A, 1)
    if guarded:
        ids, x = clamp(ids, low=None, high=E - 1), zeroed(x, foreign)
    gate_up: Expr = Rounded(grouped(Rounded(x), GATE_UP, offsets) + GATE_UP_BIAS[ids])
    if sentinels is Sentinels.ROWS:
        gate_up = zeroed(gate_up, foreign)
    y = outputs(grouped(Rounded(swiglu(gate_up)), DOWN, offsets) + DOWN_BIAS[ids])
    if sentinels is Sentinels.ROWS:
        y = zeroed(y, foreign)
    weighted = y * view(view(SCORES, T * A)[order], T * A, 1)
    if sentinels is Sentinels.RESULT:
        weighted = zeroed(weighted, foreign)

    inverse = index_put(empty_like(order), order, arange(T * A))
    return sum_over_choices(weighted[inverse])


def batched_mm(sentinels: Sentinels) -> Op:
    """Build transformers 5's other form, in which each route gathers its own expert's weights."""
    ids, scores = view(INDICES, T * A), view(SCORES, T * A)
    if sentinels is Sentinels.SCORES:
        scores = zeroed(scores, at_least(ids, E))
    if sentinels is not Sentinels.NONE:
        ids = clamp(ids, low=0, high=E - 1)
    x = repeat_rows(HIDDEN, A)
    gate_up = Rounded(routed(x, H, GATE_UP[ids], I * 2) + GATE_UP_BIAS[ids])
    y = outputs(routed(swiglu(gate_up), I, DOWN[ids], H) + DOWN_BIAS[ids])
    return sum_over_choices(y * view(scores, T * A, 1))


def packed(layout: str) -> Op:
    """Build experts that hold a checkpoint's bytes, in this package's own ops.

    ``gate_up`` and ``down`` are blocks. ``huggingface/packed.py`` holds them in checkpoint order,
    transformers' own MXFP4 modules (``huggingface/hub_modules.py``) in a layout of triton_kernels.
    The routing op skips ids from E on, as always.
    """
    args = {"indices": INDICES, "weights": SCORES, "num_experts": E, "first_expert": 0}
    routes = Op("mxfp4.routing.routes", {**args, "kernels": "reference"})
    gammas, gather_index, scatter_index, offsets = (routes[i] for i in range(4))
    inner = {"gather_index": gather_index, "activation": "swiglu", "alpha": ALPHA, "limit": LIMIT}
    outer = {"scatter_index": scatter_index, "gammas": gammas, "experts_per_token": A}
    inner["layout"] = outer["layout"] = layout
    x = matmul_ogs(HIDDEN, GATE_UP, GATE_UP_SCALES, GATE_UP_BIAS, I * 2, offsets, **inner)
    return matmul_ogs(x, DOWN, DOWN_SCALES, DOWN_BIAS, H, offsets, **outer)


def swiglu(gate_up: Expr) -> Expr:
    """Build SwiGLU: gate in the even columns, clamped above; up in the odd, clamped both ways."""
    gate = clamp(gate_up[..., slice(None, None, 2)], low=None, high=LIMIT)
    up = clamp(gate_up[..., slice(1, None, 2)], low=-LIMIT, high=LIMIT)
    return (up + 1) * (gate * sigmoid(gate * ALPHA))


def sum_over_choices(weighted: Expr) -> Op:
    """Sum the rows of each token: [T*A, H] -> [T, H]."""
    args = {"input": view(weighted, T, A, H), "dim": 1, "keepdim": False, "dtype": None}
    return Op("sum", args)


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


# The vocabulary: canonical calls (graph.Call) with every argument that matters.


def matmul_ogs(
    x: Expr, blocks: Expr, scales: Expr, bias: Expr, n: Scalar, offsets: Expr, **changes: Any
) -> Op:
    """Build the op with its defaults for what is not given; constants without effect may be any."""
    args = {"blocks": blocks, "scales": scales, "bias": bias, "n": n, "expert_offsets": offsets}
    defaults: dict[str, Any] = {"gather_index": None, "scatter_index": None, "gammas": None}
    defaults |= {"experts_per_token": 1, "activation": "none"}
    defaults |= {"layout": CHECKPOINT_ORDER, "kernels": "reference"}
    # x comes last: the attempt that matches most before it fails explains a miss, so the op's own
    # arguments are matched before the calls that compute x.
    return Op("mxfp4.matmul_ogs", {**args, **defaults, **changes, "x": x})


def outputs(y: Expr) -> Expr:
    """Mark the experts' outputs, which are weighted and summed next."""
    return Rounded(y, OUTPUTS)


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


def grouped(x: Expr, weight: Expr, offsets: Expr) -> Expr:
    args = {"input": x, "mat2": weight, "offs": offsets, "bias": None, "out_dtype": None}
    return Op("grouped_mm", args)


def routed(x: Expr, k: Scalar, weights: Expr, n: Scalar) -> Expr:
    """Multiply each row by a matrix of its own: [R, K] and [R, K, N] -> [R, N]."""
    return view(Op("bmm", {"input": view(x, T * A, 1, k), "mat2": weights}), T * A, n)


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


FORMS = (
    *(
        # Rows of negative ids sort first but are not in the offsets, so all others would get the
        # wrong experts.
        Form("grouped_mm", grouped_mm(histogram_dtype, sentinels), below="error", above=above)
        for sentinels, above in (
            (Sentinels.NONE, "error"),
            (Sentinels.ROWS, "skip"),
            (Sentinels.RESULT, "skip"),
        )
        for histogram_dtype in (torch.float32, torch.int32)
    ),
    Form("batched_mm", batched_mm(Sentinels.NONE), below="wrap", above="error"),
    Form("batched_mm", batched_mm(Sentinels.SCORES), below="first", above="skip"),
    Form("batched_mm", batched_mm(Sentinels.CLAMP), below="first", above="last"),
    *(
        Form(
            "packed" if layout == CHECKPOINT_ORDER else "transformers_mxfp4",
            packed(layout),
            below="skip",
            above="skip",
            shapes=packed_shapes(layout),
            layout=layout,
        )
        for layout in (CHECKPOINT_ORDER, *HUB_LAYOUTS)
    ),
)

_SOFTMAX = "softmax over the top-k logits"


def _part(way: str, routes: tuple[Op, Op], **shapes: tuple[Scalar | int, ...]) -> Router:
    name = f"{_SOFTMAX}, then the ids and scores of one rank, {way}"
    return Router(name, *routes, {"router_logits": (T, ALL), **shapes}, is_part=True)


_ROUTES = router()
ROUTERS = (
    Router(_SOFTMAX, *_ROUTES, {"router_logits": (T, E)}),
    _part("by where", part_by_where(*_ROUTES)),
    _part("by fmod", part_by_fmod(*_ROUTES)),
    _part("of a single expert", part_of_one_expert(*_ROUTES), down_bias=(1, H)),
)
