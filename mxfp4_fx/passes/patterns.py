"""The forms of a mixture of experts, each written as the computation that it is.

A form is what is around the experts' own arithmetic: the sort by expert, the two grouped matmuls,
the weighted sum. Families of models differ within it: in the activation (:func:`activated`), in how
they hold weights, and in whether they have biases. Each difference is one :class:`OneOf`.

To add a form: write a function from the leaves to the experts' result in the words of
``vocabulary.py`` and append it to :data:`FORMS`. Its tests are a captured model in
``tests/test_forms.py`` and a near miss for each of its constants in ``tests/test_near_misses.py``.

Shape letters: T tokens, E experts, A experts per token, H hidden, I intermediate, N rows of
``gate_up`` (2 I if there is a gate).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mxfp4_fx.core.layouts import CHECKPOINT_ORDER, HUB_LAYOUTS, LAYOUTS
from mxfp4_fx.core.orders import Order
from mxfp4_fx.ops.operands import Activation
from mxfp4_fx.passes.expressions import Expr, Leaf, Letter, OneOf, Op, Rounded, Scalar
from mxfp4_fx.passes.matcher import Match
from mxfp4_fx.passes.vocabulary import (
    arange,
    at_least,
    cast,
    chunk,
    clamp,
    cumsum,
    empty_like,
    histc,
    index_put,
    repeat_rows,
    sigmoid,
    sort,
    transpose,
    view,
    zeroed,
)

T, A, E, H, I, N = (Letter(name) for name in "TAEHIN")  # noqa: E741
ALPHA, LIMIT, UP_OFFSET = Letter("alpha"), Letter("limit"), Letter("up_offset")

HIDDEN = Leaf("hidden")
INDICES, SCORES = Leaf("indices"), Leaf("scores")
GATE_UP, GATE_UP_BIAS = Leaf("gate_up"), Leaf("gate_up_bias")
DOWN, DOWN_BIAS = Leaf("down"), Leaf("down_bias")

GATE_UP_SCALES, DOWN_SCALES = Leaf("gate_up_scales"), Leaf("down_scales")

OUTPUTS = "outputs"  # the role of the experts' outputs

Shapes = dict[str, tuple[Scalar | int, ...]]

# What the families choose: OneOf.choice -> the names of its ways. The first is GPT-OSS's.
AXES, BIASES, ROWS = "axes", "biases", "rows"
TRANSPOSED, ROWS_FIRST = "[E, K, N]", "[E, N, K]"
ALTERNATING, CONCATENATED = "gate and up alternate", "gate, then up"
WITH, WITHOUT = "with", "without"
CLAMPS, OFFSET = "clamps", "offset"
GATE, PRODUCT = "gate", "product"


def expert_shapes(choices: Mapping[str, str]) -> Shapes:
    """Return the shapes of the leaves of experts in floats, with the choices of a match."""
    transposed = choices[AXES] == TRANSPOSED
    # Weights come first and bind the letters: their sizes are fixed, an input's may be symbolic.
    weights: Shapes = {
        "down": (E, I, H) if transposed else (E, H, I),
        "gate_up": (E, H, N) if transposed else (E, N, H),
    }
    biases: Shapes = {"down_bias": (E, H), "gate_up_bias": (E, N)}
    return weights | (biases if choices[BIASES] == WITH else {}) | _INPUTS


_INPUTS: Shapes = {"hidden": (T, H), "indices": (T, A), "scores": (T, A)}


def packed_shapes(layout: str, choices: Mapping[str, str]) -> Shapes:
    """Return the shapes of the leaves of packed experts, whose weights are held in a layout."""
    rows = N if PRODUCT in choices else I * 2
    (gate_up, gate_up_scales), (down, down_scales) = (
        LAYOUTS[layout].shapes(n, k)  # type: ignore[arg-type]  # letters, and arithmetic on them
        for n, k in ((rows, H), (H, I))
    )
    biases: Shapes = {"down_bias": (E, H), "gate_up_bias": (E, rows)}
    return {
        **(biases if choices.get(BIASES) != WITHOUT else {}),
        "down": (E, *down),
        "down_scales": (E, *down_scales),
        "gate_up": (E, *gate_up),
        "gate_up_scales": (E, *gate_up_scales),
        **_INPUTS,
    }


class Sentinels(enum.Enum):
    """The treatment of sentinels: ids from E on, which mark routes to experts held elsewhere.

    transformers 5.8 to 5.18 always guards against them, later versions under expert parallelism
    only. Ids from the router's top-k are never sentinels; a rank's own may be (``routers.Router``).
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
        shapes: from a match's choices to the shapes of the leaves.
        layout: the layout in which the model holds packed weights.
    """

    name: str
    result: Op
    below: str = "error"
    above: str = "error"
    shapes: Callable[[Mapping[str, str]], Shapes] = expert_shapes
    layout: str = CHECKPOINT_ORDER

    @property
    def takes_sentinels(self) -> bool:
        """Whether ids from E on have a meaning. If they have, all routes do, whoever made them."""
        return self.above != "error"


def activation_of(match: Match) -> Activation:
    """Return the activation of matched experts."""
    kind = match.choices.get(PRODUCT, GATED)
    if kind == GATED:
        kind = GATES[match.choices.get(GATE, SIGMOID)]
    constants = (float(match.letters[letter.name]) for letter in (ALPHA, LIMIT, UP_OFFSET))
    return Activation(kind, *constants)


def order_of(match: Match) -> Order:
    """Return the order in which the model holds matched experts."""
    choices = match.choices
    return Order(
        choices.get(AXES, TRANSPOSED) == TRANSPOSED,
        choices.get(ROWS, ALTERNATING) == CONCATENATED,
    )


def grouped_mm(sentinels: Sentinels) -> Op:
    """Build transformers 5's default: rows sorted by expert, one grouped matmul for a projection.

    transformers takes the histogram of float32 ids on a CPU and of int32 ids elsewhere.
    """
    by_expert = sort(view(INDICES, T * A))
    ids, order = by_expert[0], by_expert[1]
    counted = {str(dtype): cast(ids, dtype) for dtype in (torch.float32, torch.int32)}
    counts = histc(OneOf("histogram", counted), bins=E, low=0, high=E - 1)
    offsets = cumsum(counts, torch.int32)
    x = HIDDEN[order // A]

    guarded = sentinels is not Sentinels.NONE
    foreign = view(at_least(ids, E), T * A, 1)
    if guarded:
        ids, x = clamp(ids, low=None, high=E - 1), zeroed(x, foreign)
    gate_up: Expr = Rounded(biased(grouped(Rounded(x), GATE_UP, offsets), GATE_UP_BIAS, ids))
    if sentinels is Sentinels.ROWS:
        gate_up = zeroed(gate_up, foreign)
    y = outputs(biased(grouped(Rounded(activated(gate_up)), DOWN, offsets), DOWN_BIAS, ids))
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
    gate_up = Rounded(biased(routed(x, H, GATE_UP[ids], N), GATE_UP_BIAS, ids))
    y = outputs(biased(routed(activated(gate_up), I, DOWN[ids], H), DOWN_BIAS, ids))
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
    inner["up_offset"] = UP_OFFSET
    x = matmul_ogs(HIDDEN, GATE_UP, GATE_UP_SCALES, GATE_UP_BIAS, I * 2, offsets, **inner)
    return matmul_ogs(x, DOWN, DOWN_SCALES, DOWN_BIAS, H, offsets, **outer)


GATED, RELU2 = "gated", "relu2"
SIGMOID, SWISH, SILU, GELU_TANH = "gate * sigmoid(gate * alpha)", "gate * sigmoid", "silu", "gelu"
# The function of the gate -> the activation's kind.
GATES = {SIGMOID: "swiglu", SWISH: "swiglu", SILU: "swiglu", GELU_TANH: "geglu_tanh"}


def activated(y: Expr) -> Expr:
    """Build the activation [T*A, N] -> [T*A, I]: a gate's function times up, or squared ReLU.

    A family may compute it in float32.
    """
    halves = chunk(y, 2, dim=1)
    gate: Expr = OneOf(ROWS, {ALTERNATING: y[..., slice(None, None, 2)], CONCATENATED: halves[0]})
    up: Expr = OneOf(ROWS, {ALTERNATING: y[..., slice(1, None, 2)], CONCATENATED: halves[1]})
    gate, up = Rounded(gate), Rounded(up)
    # Gate clamped above, up both ways; or neither.
    none = {WITHOUT: {LIMIT: math.inf}}
    gate = OneOf(CLAMPS, {WITH: clamp(gate, low=None, high=LIMIT), WITHOUT: gate}, none)
    up = OneOf(CLAMPS, {WITH: clamp(up, low=-LIMIT, high=LIMIT), WITHOUT: up}, none)
    acted = OneOf(
        GATE,
        {
            SIGMOID: gate * sigmoid(gate * ALPHA),
            SILU: Op("silu", {"input": gate, "inplace": False}),
            SWISH: gate * sigmoid(gate),
            GELU_TANH: Op("gelu", {"input": gate, "approximate": "tanh"}),
        },
        {name: {ALPHA: 1.0} for name in (SILU, SWISH, GELU_TANH)},
        words="a gate that kernels compute (GPT-OSS's, SiLU, or GELU in its tanh form)",
    )
    lifted = OneOf(
        OFFSET,
        {WITH: up + UP_OFFSET, WITHOUT: up},
        {WITHOUT: {UP_OFFSET: 0.0}},
        words="up, clamped or not, with or without a number added",
    )
    relu = Op("relu", {"input": y, "inplace": False})
    return OneOf(
        PRODUCT,
        {GATED: lifted * acted, RELU2: Op("square", {"input": relu})},
        {
            GATED: {N: I * 2},
            RELU2: {N: I * 1, ALPHA: 1.0, LIMIT: math.inf, UP_OFFSET: 0.0},
        },
        words="an activation that kernels compute (GPT-OSS's SwiGLU, SiLU or GELU in its tanh form "
        "times up, or squared ReLU)",
    )


def biased(y: Expr, bias: Expr, ids: Expr) -> Expr:
    """Add each row's expert's bias, if there are biases."""
    return OneOf(BIASES, {WITH: y + bias[ids], WITHOUT: y})


def sum_over_choices(weighted: Expr) -> Op:
    """Sum the rows of each token: [T*A, H] -> [T, H]."""
    args = {"input": view(weighted, T, A, H), "dim": 1, "keepdim": False, "dtype": None}
    return Op("sum", args)


def grouped(x: Expr, weight: Expr, offsets: Expr) -> Expr:
    columns = OneOf(AXES, {ROWS_FIRST: transpose(weight), TRANSPOSED: weight})
    args = {"input": x, "mat2": columns, "offs": offsets, "bias": None, "out_dtype": None}
    return Op("grouped_mm", args)


def routed(x: Expr, k: Scalar, weights: Expr, n: Scalar) -> Expr:
    """Multiply each row by a matrix of its own: [R, K] and [R, K, N] or [R, N, K] -> [R, N]."""
    by_columns = Op("bmm", {"input": view(x, T * A, 1, k), "mat2": weights})
    by_rows = Op("bmm", {"input": weights, "mat2": view(x, T * A, k, 1)})
    return view(OneOf(AXES, {TRANSPOSED: by_columns, ROWS_FIRST: by_rows}), T * A, n)


def outputs(y: Expr) -> Expr:
    """Mark the experts' outputs, which are weighted and summed next."""
    return Rounded(y, OUTPUTS)


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


FORMS = (
    # Rows of negative ids sort first but are not in the offsets, so all others would get the wrong
    # experts.
    Form("grouped_mm", grouped_mm(Sentinels.NONE), below="error", above="error"),
    Form("grouped_mm", grouped_mm(Sentinels.ROWS), below="error", above="skip"),
    Form("grouped_mm", grouped_mm(Sentinels.RESULT), below="error", above="skip"),
    Form("batched_mm", batched_mm(Sentinels.NONE), below="wrap", above="error"),
    Form("batched_mm", batched_mm(Sentinels.SCORES), below="first", above="skip"),
    Form("batched_mm", batched_mm(Sentinels.CLAMP), below="first", above="last"),
    *(
        Form(
            "packed" if layout == CHECKPOINT_ORDER else "transformers_mxfp4",
            packed(layout),
            below="skip",
            above="skip",
            shapes=functools.partial(packed_shapes, layout),
            layout=layout,
        )
        for layout in (CHECKPOINT_ORDER, *HUB_LAYOUTS)
    ),
)
