"""Calls of ``mxfp4::moe.routes`` and ``moe.adapted`` by the model: only shapes need a proof."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx

from mxfp4_fx.core.errors import WeightError
from mxfp4_fx.core.orders import GPT_OSS, Order
from mxfp4_fx.ops.operands import ACTIVATIONS
from mxfp4_fx.passes import patterns
from mxfp4_fx.passes.expressions import Op
from mxfp4_fx.passes.graph import fixed, known_tensor, op_name, read_call, tensor_of
from mxfp4_fx.passes.matcher import Match, Mismatch
from mxfp4_fx.passes.patterns import ALPHA, LIMIT, A, E, Form, H, I, N, T
from mxfp4_fx.weights.source import encoding_of

OP = "mxfp4.moe.routes"
# Packed experts with adapters, whose factors stay as they are: the node itself is lowered.
ADAPTED = "mxfp4.moe.adapted"
# The leaves of patterns.py, and the op's arguments.
_LEAVES = {"hidden": "hidden", "indices": "indices", "scores": "weights"}
_LEAVES |= {name: name for name in ("gate_up", "gate_up_bias", "down", "down_bias")}
_LEAVES |= {name: name for name in ("gate_up_scales", "down_scales")}
# What `ADAPTED` has no arguments for.
_FIXED: dict[str, Any] = {"first_expert": 0, **GPT_OSS._asdict()}
_CONSTANTS = {"alpha": ALPHA, "limit": LIMIT, "up_offset": patterns.UP_OFFSET}


def is_logical(node: fx.Node) -> bool:
    return op_name(node) in (OP, ADAPTED)


def match_logical(node: fx.Node) -> tuple[Form, Match]:
    """Read a call of the op as a match of a form of its own.

    Raises:
        Mismatch: shapes do not fit, or only a part of the experts is there.
    """
    call = read_call(node)
    assert call is not None
    args = _FIXED | call.args
    match, layout = Match(), args["layout"]
    for leaf, name in _LEAVES.items():
        if isinstance(args[name], fx.Node):
            match.leaves[leaf] = args[name]
    missing = {"hidden", "indices", "scores", "gate_up", "down"} - match.leaves.keys()
    packed = "gate_up_scales" in match.leaves
    if missing or packed != ("down_scales" in match.leaves):
        raise Mismatch(
            f"{call.op} is called without {', '.join(sorted(missing)) or 'scales'}", node, 1
        )
    if (args["gate_up_bias"] is None) != (args["down_bias"] is None):
        raise Mismatch(f"{call.op} is called with one bias: give both, or none", node, 1)
    if args["first_expert"] != 0:
        raise Mismatch(f"{call.op} is called with first_expert={args['first_expert']}", node, 1)
    if args["activation"] not in ACTIVATIONS:
        raise Mismatch(f"{call.op} is called with activation={args['activation']!r}", node, 1)
    match.choices = _choices(args)
    _bind(match, node, args, layout if packed else None)
    result = Op(call.op, {})
    match.nodes[result] = node
    # The op says what any id means: those of no expert count nothing.
    name = "packed_lora" if call.op == ADAPTED else "mxfp4_fx"
    form = Form(name, result, below="skip", above="skip", layout=layout)
    shapes = functools.partial(patterns.packed_shapes, layout) if packed else patterns.expert_shapes
    match.solve(shapes(match.choices))
    return form, match


def _choices(args: dict[str, Any]) -> dict[str, str]:
    kind = args["activation"]
    gate = next((gate for gate, k in patterns.GATES.items() if k == kind), patterns.SIGMOID)
    has_biases = args["gate_up_bias"] is not None
    return {
        patterns.AXES: patterns.TRANSPOSED if args["is_transposed"] else patterns.ROWS_FIRST,
        patterns.ROWS: patterns.CONCATENATED if args["is_concatenated"] else patterns.ALTERNATING,
        patterns.BIASES: patterns.WITH if has_biases else patterns.WITHOUT,
        patterns.PRODUCT: patterns.GATED if ACTIVATIONS[kind] else patterns.RELU2,
        patterns.GATE: gate,
    }


def _bind(match: Match, node: fx.Node, args: dict[str, Any], layout: str | None) -> None:
    """Bind the letters to the sizes of the weights; ``Match.solve`` then proves all shapes."""
    order = Order(args["is_transposed"], args["is_concatenated"])
    sizes = []
    for name in ("gate_up", "down"):
        held = [match.leaves[name], *([] if layout is None else [match.leaves[f"{name}_scales"]])]
        of_name = order if name == "gate_up" else order._replace(is_concatenated=False)
        try:
            sizes.append(encoding_of(of_name, layout).sizes(tuple(map(known_tensor, held))))
        except WeightError as error:
            raise Mismatch(str(error), node, 1) from error
    (e, n, _), (_, h, i) = sizes
    if n != (2 * i if ACTIVATIONS[args["activation"]] else i):
        raise Mismatch(f"gate_up has {n} rows, where down has {i} columns", node, 1)
    indices = tensor_of(match.leaves["indices"])
    if indices is None or indices.ndim != 2 or fixed(indices.shape[1]) is None:
        raise Mismatch("expert ids must be [T, A]", node, 1)
    match.letters |= {E.name: e, N.name: n, H.name: h, I.name: i, T.name: indices.shape[0]}
    match.letters |= {A.name: indices.shape[1]}
    match.letters |= {letter.name: float(args[name]) for name, letter in _CONSTANTS.items()}
