"""Mutations that change what a graph means, or may: numbers, operands, operations, users, modes.

A mutation is a function that changes a draft and returns what it did in words. It may make a
program that cannot run: the fuzzer throws that away.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from fuzz.draft import (
    READERS,
    Draft,
    Inputs,
    NotHere,
    arguments_of,
    is_float,
    keeps_shape,
    mutation,
    name_of,
    set_argument,
    text_of,
    value,
)

# Numbers, operands and operations.


def _other_literals(old: Any) -> list[Any]:
    if isinstance(old, bool):
        return [not old]
    if isinstance(old, int):
        return [old + 1, old - 1, -old - 1, 2 * old, old // 2, 0, 1, None]
    if isinstance(old, float):
        return [2 * old, old / 2, -old, old + 1, 0.0, 1.0, None]
    if isinstance(old, torch.dtype):
        return [torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.int16]
    return [0, 1, 2, -1, 0.5, torch.float64, torch.float32] if old is None else []


@mutation(14)
def literal(d: Draft) -> str:
    literals = {
        node: [(path, old) for path, old in arguments_of(node) if _other_literals(old)]
        for node in d.calls()
    }
    node = d.pick(node for node, found in literals.items() if found)
    path, old = d.pick(literals[node])
    new = d.pick(o for o in _other_literals(old) if type(o) is not type(old) or o != old)
    set_argument(node, path, new)
    return f"{node}{list(path)}: {old} -> {new}"


@mutation(8)
def keyword(d: Draft) -> str:
    """Arguments that a call leaves out."""
    options: dict[str, list[tuple[str, Any]]] = {
        "topk": [("largest", False), ("sorted", False), ("dim", 0)],
        "sum": [("keepdim", True), ("dtype", torch.float64), ("dtype", torch.float16)],
        "softmax": [("dtype", torch.float64), ("dtype", torch.bfloat16), ("dim", 0)],
        "sort": [("descending", True), ("dim", 0), ("stable", True)],
        "cumsum": [("dtype", torch.int64), ("dim", -1)],
        "add": [("alpha", 2), ("alpha", -1), ("alpha", 1)],
        "add_": [("alpha", 2), ("alpha", -1), ("alpha", 1)],
        "clamp": [("min", 0.0), ("min", -1.0), ("max", 1.0), ("min", 1)],
        "histc": [("min", 1), ("max", 0), ("bins", 3)],
        "repeat_interleave": [("dim", None), ("dim", 1), ("output_size", 21)],
        "linear": [("bias", None)],
        "empty_like": [("dtype", torch.int32)],
        "arange": [("step", 1), ("dtype", torch.int32), ("dtype", torch.float32)],
        "matmul_ogs": [("activation", "none"), ("experts_per_token", 1), ("kernels", "reference")],
        "index_put": [("accumulate", True)],
        "to": [("copy", True), ("non_blocking", True)],
        "view": [("dtype", torch.int32)],
        "reshape": [("shape", (-1,))],
        "chunk": [("dim", 0), ("dim", -1), ("chunks", 4)],
        "gelu": [("approximate", "none"), ("approximate", "tanh")],
    }
    node = d.pick(node for node in d.calls() if name_of(node) in options)
    key, new = d.pick(options[name_of(node)])
    node.kwargs = {**node.kwargs, key: new}
    return f"{node}: {key}={new}"


@mutation(6)
def swap(d: Draft) -> str:
    """Two arguments of a call change places."""
    target = d.pick(dict.fromkeys(n.target for n in d.calls() if len(n.args) > 1))
    node = d.pick(n for n in d.calls() if n.target == target and len(n.args) > 1)
    a, b = d.rng.sample(range(len(node.args)), 2)
    args = list(node.args)
    args[a], args[b] = args[b], args[a]
    node.args = tuple(args)
    return f"{node}: arguments {a} and {b} swapped"


@mutation(2)
def drop(d: Draft) -> str:
    """An argument is left out."""
    node = d.pick(node for node in d.calls() if len(node.args) > 1 or node.kwargs)
    if node.kwargs and (len(node.args) < 2 or d.rng.random() < 0.5):
        key = d.pick(node.kwargs)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != key}
        return f"{node}: without {key}"
    node.args = node.args[:-1]
    return f"{node}: without its last argument"


_OTHER_OPS: dict[Any, list[Any]] = {
    operator.add: [operator.sub, operator.mul, torch.maximum, operator.iadd],
    operator.mul: [operator.add, operator.truediv, operator.sub, operator.imul],
    operator.floordiv: [operator.mod, operator.truediv, operator.sub],
    operator.ge: [operator.gt, operator.le, operator.ne],
    operator.ne: [operator.eq, operator.gt, operator.lt],
    operator.eq: [operator.ne, operator.le, operator.ge],
    operator.mod: [operator.floordiv, torch.fmod, operator.sub],
    torch.fmod: [torch.remainder, torch.floor_divide, torch.sub],
    "masked_fill": ["masked_scatter", "where"],
    torch.sigmoid: [torch.tanh, torch.relu, F.silu, F.hardsigmoid, torch.sigmoid_, torch.erf],
    F.silu: [F.gelu, F.relu, F.mish, torch.sigmoid, F.hardswish],
    F.gelu: [F.silu, F.relu, torch.sigmoid],
    F.relu: [torch.abs, F.silu, F.relu6, F.gelu, torch.square, F.leaky_relu],
    torch.square: [torch.abs, torch.neg, torch.exp, F.relu, torch.sqrt],
    "chunk": ["split", "tensor_split", "unsafe_chunk"],
    "transpose": ["swapaxes", "flip", "roll"],
    torch.empty_like: [torch.zeros_like, torch.ones_like],
    torch.sort: [torch.topk, torch.msort],
    torch.topk: [torch.sort, torch.kthvalue],
    torch.bmm: [torch.matmul, torch.mul],
    torch.cumsum: [torch.cumprod, torch.cummax],
    torch.histc: [torch.bincount, torch.sub],
    F.softmax: [F.log_softmax, F.softmin, torch.cumsum, F.gumbel_softmax],
    "sum": ["mean", "amax", "prod", "nansum", "cumsum", "std"],
    "clamp": ["clip", "clamp_min", "clamp_max", "clamp_", "fmod"],
    "clamp_": ["clamp", "clip_", "clamp_max_"],
    "add_": ["sub_", "mul_", "copy_", "add", "div_"],
    "masked_fill_": ["masked_fill", "fill_"],
    "repeat_interleave": ["repeat", "tile"],
    "unsqueeze": ["squeeze", "unsqueeze_", "select"],
    "squeeze": ["unsqueeze", "squeeze_", "select"],
    "view": ["expand", "as_strided", "resize_"],
    "reshape": ["expand", "repeat"],
    "float": ["half", "double", "bfloat16", "int", "abs"],
    "t": ["t_", "contiguous"],
}


@mutation(8)
def exchange(d: Draft) -> str:
    """Another operation."""
    node = d.pick(node for node in d.calls() if node.target in _OTHER_OPS)
    old = node.target
    new = d.pick(op for op in _OTHER_OPS[old] if not d.dynamic or keeps_shape(op))
    node.op = "call_method" if isinstance(new, str) else "call_function"
    node.target = new
    return f"{node}: {text_of(old)} -> {text_of(new)}"


@mutation(10)
def rewire(d: Draft) -> str:
    """An argument is another value of the same shape and dtype."""
    options = []
    for user, path, old in d.edges():
        for other in d.nodes():
            if other is user:
                break
            a, b = value(old), value(other)
            if other is old or a is None or b is None:
                continue
            if a.dtype == b.dtype and tuple(map(str, a.shape)) == tuple(map(str, b.shape)):
                options.append((user, path, old, other))
    user, path, old, other = d.pick(options)
    set_argument(user, path, other)
    return f"{user}{list(path)}: {old} -> {other}"


_CHANGES: list[tuple[Any, tuple[Any, ...]]] = [
    (torch.neg, ()),
    ("flip", (0,)),
    ("roll", (1, -1)),
    ("abs", ()),
    (operator.add, (1,)),
    (operator.mul, (0,)),
    (operator.mul, (1,)),
    ("sort", ()),
    (torch.zeros_like, ()),
    ("transpose", (-1, -2)),
    ("roll", (1, 0)),
    ("flatten", ()),
    ("unsqueeze", (-1,)),
    ("unsqueeze", (0,)),
]


@mutation(3)
def computed_number(d: Draft) -> str:
    """A number comes from the data, as ``x.max()`` and ``x.max().item()`` do."""
    node, path, old = d.pick(
        (node, path, old)
        for node in d.calls()
        for path, old in arguments_of(node)
        if isinstance(old, float)
    )
    of = d.pick(n for n in d.tensors() if n < node and is_float(n))
    number = d.call_before(node, "amax", of)
    text = f"{node}{list(path)}: {old} -> amax({of})"
    if d.rng.random() < 0.5:
        number, text = d.call_before(node, "item", number), text + ".item()"
    set_argument(node, path, number)
    return text


@mutation(6)
def between(d: Draft) -> str:
    """Something is done to a value on its way to one of its users."""
    user, path, old = d.pick(d.edges())
    target, args = d.pick(_CHANGES)
    set_argument(user, path, d.call_before(user, target, old, *args))
    return f"{user}{list(path)}: {text_of(target)}({old}, {args})"


@mutation(3)
def another_call(d: Draft) -> str:
    """One of a value's users gets the same computation, made once more."""
    user, path, old = d.pick(e for e in d.edges() if e[2].op.startswith("call_"))
    with d.graph.inserting_before(user):
        again = d.graph.node_copy(old, lambda n: n)
    set_argument(user, path, again)
    return f"{user}{list(path)}: {old} computed once more"


@mutation(5)
def parts(d: Draft) -> str:
    """Two parts of one value change places: those of a chunk, or of an index with steps."""
    parts = [n for n in d.calls() if n.target is operator.getitem and not is_index(n)]
    whole = d.pick(dict.fromkeys(n.args[0] for n in parts))
    found = [n for n in parts if n.args[0] is whole]
    if len(found) < 2:
        raise NotHere
    a, b = d.rng.sample(found, 2)
    a.args, b.args = b.args, a.args
    return f"{a} and {b} swapped"


def is_index(node: fx.Node) -> bool:
    return isinstance(node.args[1], fx.Node)


@mutation(6)
def bias(d: Draft) -> str:
    """A sum is left out, or one with 1 is put in."""
    if d.rng.random() < 0.7:
        node = d.pick(n for n in d.calls() if name_of(n) in ("add", "add_"))
        d.pick(a for a in node.args if isinstance(a, fx.Node))
        node.replace_all_uses_with(node.args[0])
        d.graph.erase_node(node)
        return f"{node} left out"
    user, path, old = d.pick(e for e in d.edges() if is_float(e[2]) and name_of(e[0]) == "mul")
    set_argument(user, path, d.call_before(user, operator.add, old, d.rng.choice([1, 1.0, -2.5])))
    return f"{user}{list(path)}: {old} and a number"


@mutation(5)
def transposed(d: Draft) -> str:
    """A transposition is left out, or a stack of matrices is transposed once more."""
    found = [n for n in d.calls() if n.target == "transpose"]
    if found and d.rng.random() < 0.5:
        node = d.pick(found)
        node.replace_all_uses_with(node.args[0])
        d.graph.erase_node(node)
        return f"{node} left out"
    user, path, old = d.pick(e for e in d.edges() if is_float(e[2]) and value(e[2]).ndim == 3)
    set_argument(user, path, d.call_before(user, "transpose", old, *d.pick([(1, 2), (-1, -2)])))
    return f"{user}{list(path)}: {old} transposed"


@mutation(4)
def clamped(d: Draft) -> str:
    """A clamp is left out, or put before one of a product's factors."""
    found = [n for n in d.calls() if name_of(n) == "clamp"]
    if found and d.rng.random() < 0.6:
        node = d.pick(found)
        node.replace_all_uses_with(node.args[0])
        d.graph.erase_node(node)
        return f"{node} left out"
    names = ("mul", "silu", "gelu", "relu", "square", "sigmoid", "add")
    user, path, old = d.pick(e for e in d.edges() if is_float(e[2]) and name_of(e[0]) in names)
    limits = d.pick([(None, 2.5), (-2.5, 2.5), (None, 7.0), (-7.0, 7.0), (-2.5, None)])
    set_argument(user, path, d.call_before(user, "clamp", old, *limits))
    return f"{user}{list(path)}: {old} clamped, {limits}"


@mutation(5)
def ids_written(d: Draft) -> str:
    """Ids are changed in place, or others are taken, behind their router."""
    node = d.pick(n for n in d.calls() if value(n) is not None and value(n).dtype == torch.int64
                  and value(n).ndim == 2)  # fmt: skip
    target, args = d.pick([("sub_", (1,)), ("add_", (1,)), ("remainder_", (3,)), ("fill_", (2,)),
                           ("neg_", ()), ("clamp_", (-1, 2))])  # fmt: skip
    made = d.call_after(node, target, node, *args)
    if d.rng.random() < 0.3:
        d.call_before(made, "view", node, -1)  # a view that shows the write
    return f"{node}.{target}{args}"


# Other users of a value.


@mutation(5)
def returned(d: Draft) -> str:
    node = d.pick(d.tensors())
    d.add_output(node)
    return f"{node} returned, too"


@mutation(5)
def read(d: Draft) -> str:
    """A value has a user more, whose result is returned."""
    node = d.pick(d.tensors())
    target, args = d.pick(READERS)
    made = d.call_after(d.place(node), target, node, *args)
    d.add_output(made)
    return f"{text_of(target)}({node}) before {made.next}, returned"


# Gradients and modes.


@mutation(6)
def grad_mode(d: Draft) -> str:
    """Dynamo's calls for ``torch.no_grad()`` around a part of the code, or for a switch."""
    a, b = _two_places(d)
    to = d.rng.random() < 0.25
    first = d.call_after(a, torch._C._set_grad_enabled, to)
    if d.rng.random() < 0.2:
        return f"gradients {'on' if to else 'off'} from {first.next} on"
    second = d.call_after(b if b is not a else first, torch._C._set_grad_enabled, d.base.grad)
    return f"gradients {'on' if to else 'off'} from {first.next} to {second.prev}"


def _two_places(d: Draft) -> tuple[fx.Node, fx.Node]:
    nodes = d.nodes()[len(d.placeholders()) - 1 :]
    at, then = sorted((d.rng.randrange(len(nodes)), d.rng.randrange(len(nodes))))
    return nodes[at], nodes[then]


@mutation(3)
def detach(d: Draft) -> str:
    user, path, old = d.pick(e for e in d.edges() if is_float(e[2]))
    set_argument(user, path, d.call_before(user, "detach", old))
    return f"{user}{list(path)}: {old} detached"


@mutation(4)
def cast(d: Draft) -> str:
    """A value is cast before one of its users reads it."""
    user, path, old = d.pick(e for e in d.edges() if is_float(e[2]))
    dtype = d.rng.choice([torch.bfloat16, torch.float16, torch.float64, torch.int32])
    set_argument(user, path, d.call_before(user, "to", old, dtype))
    return f"{user}{list(path)}: {old} cast to {dtype}"


@mutation(8)
def autocast(d: Draft) -> str:
    a, b = _two_places(d)
    matmuls = [n for n in d.calls() if name_of(n) == "bmm"]
    if matmuls and d.rng.random() < 0.7:  # what autocast does something to
        node = d.pick(matmuls)
        a, b = node.prev, d.pick([node, d.nodes()[-1]])
    enabled = d.rng.random() < 0.8
    enter = d.call_after(a, _enter_autocast, "cpu", torch.bfloat16, enabled, None)
    leave = d.call_after(b if b is not a else enter, _exit_autocast, enter)
    return f"autocast{'' if enabled else '(enabled=False)'} from {enter.next} to {leave.prev}"


@mutation(3)
def wants_grad(d: Draft) -> str:
    """A parameter wants a gradient, or no longer does."""
    node = d.pick(n for n in d.placeholders() if is_float(n) and n.name not in d.base.wants_grad)

    def edit(inputs: Inputs) -> None:
        if isinstance(inputs[node.name], nn.Parameter):
            inputs[node.name].requires_grad_(not inputs[node.name].requires_grad)

    d.edits.append(edit)
    return f"{node}.requires_grad is the other way round"
