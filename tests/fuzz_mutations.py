"""What the fuzzer does to a captured graph: changes of its meaning, and of its spelling alone.

A mutation is a function that changes a :class:`Draft` and returns what it did in words. It may make
a program that cannot run: the fuzzer throws that away.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_bases import Base, Edit, unused_name
from torch import Tensor, fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from mxfp4_fx.passes.pipeline import copy_graph

Path = tuple[Any, ...]
Inputs = dict[str, Any]
aten = torch.ops.aten


class NotHere(Exception):
    """A mutation finds nothing in this graph that it could change."""


class Draft:
    """A base's graph while it is being changed.

    Attributes:
        gm: the copy.
        edits: what is done to each new set of inputs, by placeholder's name.
        rng: where every choice comes from.
    """

    def __init__(self, base: Base, rng: random.Random) -> None:
        self.base = base
        self.gm = copy_graph(base.gm)
        self.graph = self.gm.graph
        self.edits: list[Edit] = []
        self.rng = rng

    def nodes(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op != "output"]

    def calls(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op.startswith("call_")]

    def tensors(self) -> list[fx.Node]:
        """All but Dynamo's inputs for floats of the model's, of which the code sees the number."""
        return [node for node in self.nodes() if value(node) is not None and not is_number(node)]

    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def pick(self, options: Any) -> Any:
        options = list(options)
        if not options:
            raise NotHere
        return self.rng.choice(options)

    def place(self, earliest: fx.Node) -> fx.Node:
        """A random call behind which something is put that reads ``earliest``."""
        nodes = self.nodes()
        start = max(nodes.index(earliest), len(self.placeholders()) - 1)
        return self.pick(nodes[start:])

    def call_after(self, place: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_after(place):
            return self._create(target, args, kwargs)

    def call_before(self, place: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(place):
            return self._create(target, args, kwargs)

    def _create(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        made = create(target, args, kwargs)
        near = made.prev if made.prev.op.startswith("call_") else made.next
        # Whose line made it, as Dynamo notes.
        for key in ("nn_module_stack", "stack_trace"):
            if key in near.meta:
                made.meta[key] = near.meta[key]
        return made

    def edges(self) -> list[tuple[fx.Node, Path, fx.Node]]:
        """(user, where among its arguments, value) of each tensor that a call reads."""
        return [
            (user, path, v)
            for user in self.calls()
            for path, v in arguments_of(user)
            if value(v) is not None and not is_number(v)
        ]

    def add_output(self, node: fx.Node) -> None:
        output = self.graph.output_node()
        output.args = ((*output.args[0], node),)


def value(node: object) -> Tensor | None:
    """The fake tensor of a node, as it was captured or last noted; None if it has none."""
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def is_float(node: fx.Node) -> bool:
    found = value(node)
    return found is not None and found.is_floating_point() and found.ndim > 0


def is_number(node: fx.Node) -> bool:
    found = value(node)
    return node.op == "placeholder" and found is not None and found.ndim == 0


_SLICE = ("start", "stop", "step")


def arguments_of(node: fx.Node) -> Iterator[tuple[Path, Any]]:
    """Every argument with the way to it; tuples, lists and slices are opened."""

    def walk(path: Path, part: Any) -> Iterator[tuple[Path, Any]]:
        if isinstance(part, tuple | list):
            for at, inner in enumerate(part):
                yield from walk((*path, at), inner)
        elif isinstance(part, slice):
            for name in _SLICE:
                yield (*path, name), getattr(part, name)
        else:
            yield path, part

    for at, part in enumerate(node.args):
        yield from walk((at,), part)
    for name, part in node.kwargs.items():
        yield from walk((name,), part)


def set_argument(node: fx.Node, path: Path, new: Any) -> None:
    def put(part: Any, path: Path) -> Any:
        if not path:
            return new
        if isinstance(part, slice):
            parts = {name: getattr(part, name) for name in _SLICE}
            return slice(*{**parts, path[0]: put(parts[path[0]], path[1:])}.values())
        return type(part)(put(p, path[1:]) if at == path[0] else p for at, p in enumerate(part))

    if isinstance(path[0], int):
        node.args = put(tuple(node.args), path)
    else:
        node.kwargs = {**node.kwargs, path[0]: put(node.kwargs[path[0]], path[1:])}


Mutation = Callable[[Draft], str]
MUTATIONS: dict[str, Mutation] = {}
NEUTRAL: set[str] = set()  # those that change no meaning
_WEIGHTS: dict[str, int] = {}


def mutation(weight: int = 4, neutral: bool = False) -> Callable[[Mutation], Mutation]:
    def add(function: Mutation) -> Mutation:
        MUTATIONS[function.__name__] = function
        _WEIGHTS[function.__name__] = weight
        if neutral:
            NEUTRAL.add(function.__name__)
        return function

    return add


def choose(rng: random.Random, neutral: bool) -> str:
    names = [name for name in MUTATIONS if (name in NEUTRAL) == neutral]
    return rng.choices(names, [_WEIGHTS[name] for name in names])[0]


def mutate(draft: Draft, kind: str) -> tuple[str, str]:
    """Do one mutation, another where there is nothing for it; returns which, and what it did."""
    while True:
        try:
            return kind, MUTATIONS[kind](draft)
        except NotHere:
            kind = choose(draft.rng, kind in NEUTRAL)


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
    }
    node = d.pick(node for node in d.calls() if _name(node) in options)
    key, new = d.pick(options[_name(node)])
    node.kwargs = {**node.kwargs, key: new}
    return f"{node}: {key}={new}"


def _name(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


@mutation()
def swap(d: Draft) -> str:
    """Two arguments of a call change places."""
    options = []
    for node in d.calls():
        tops = list(range(len(node.args)))
        options += [(node, a, b) for a in tops for b in tops if a < b]
    node, a, b = d.pick(options)
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
    torch.sigmoid: [torch.tanh, torch.relu, F.silu, F.hardsigmoid, torch.sigmoid_, torch.erf],
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
    old, new = node.target, d.pick(_OTHER_OPS[node.target])
    node.op = "call_method" if isinstance(new, str) else "call_function"
    node.target = new
    return f"{node}: {_text(old)} -> {_text(new)}"


def _text(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


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
]


@mutation(6)
def between(d: Draft) -> str:
    """Something is done to a value on its way to one of its users."""
    user, path, old = d.pick(d.edges())
    target, args = d.pick(_CHANGES)
    set_argument(user, path, d.call_before(user, target, old, *args))
    return f"{user}{list(path)}: {_text(target)}({old}, {args})"


@mutation(3)
def another_call(d: Draft) -> str:
    """One of a value's users gets the same computation, made once more."""
    user, path, old = d.pick(e for e in d.edges() if e[2].op.startswith("call_"))
    with d.graph.inserting_before(user):
        again = d.graph.node_copy(old, lambda n: n)
    set_argument(user, path, again)
    return f"{user}{list(path)}: {old} computed once more"


# Other users of a value, and writes.


@mutation(5)
def returned(d: Draft) -> str:
    node = d.pick(d.tensors())
    d.add_output(node)
    return f"{node} returned, too"


_READERS: list[tuple[Any, tuple[Any, ...]]] = [
    ("sum", ()),
    (operator.mul, (2,)),
    ("view", (-1,)),
    ("flatten", ()),
    ("detach", ()),
    ("clone", ()),
    ("max", ()),
    (operator.add, (1,)),
    ("to", (torch.float64,)),
    ("float", ()),
    (torch.sub, (1,)),
]


@mutation(5)
def read(d: Draft) -> str:
    """A value has a user more, whose result is returned."""
    node = d.pick(d.tensors())
    target, args = d.pick(_READERS)
    made = d.call_after(d.place(node), target, node, *args)
    d.add_output(made)
    return f"{_text(target)}({node}) before {made.next}, returned"


def _seen_as(d: Draft, node: fx.Node) -> tuple[fx.Node, str]:
    """The value itself, or a view of it, made somewhere behind it."""
    views: list[tuple[Any, tuple[Any, ...]]] = [
        ("view", (-1,)),
        ("detach", ()),
        (operator.getitem, (0,)),
        (operator.getitem, ((Ellipsis, slice(None, 1)),)),
        (operator.getitem, (slice(None),)),
        ("unsqueeze", (0,)),
        ("t", ()),
        ("transpose", (0, 1)),
        ("flatten", ()),
        ("view_as", (node,)),
        ("to", (torch.float32,)),
        ("narrow", (0, 0, 1)),
        ("chunk", (2,)),
        ("select", (0, 0)),
        ("expand_as", (node,)),
        (torch.split, (2,)),
        (aten.view.default, ([-1],)),
        (aten.alias.default, ()),
        ("permute", (1, 0)),
        ("contiguous", ()),
    ]
    if d.rng.random() < 0.5:
        return node, str(node)
    target, args = d.pick(views)
    view = d.call_after(d.place(node), target, node, *args)
    text = f"{_text(target)}({node})"
    if _text(target) in ("chunk", "split"):
        view, text = d.call_after(view, operator.getitem, view, 0), text + "[0]"
    return view, text


Write = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _writes(d: Draft, to: fx.Node) -> list[Write]:
    some: list[Write] = [
        *((name, (2,), {}) for name in ("mul_", "add_", "sub_", "fill_", "copy_", "clamp_")),
        *((name, (), {}) for name in ("zero_", "neg_", "abs_", "exp_", "sigmoid_", "relu_")),
        *((name, (), {}) for name in ("t_", "squeeze_", "detach_", "sign_", "tanh_")),
        ("clamp_", (-0.5, 0.5), {}),
        ("transpose_", (0, 1), {}),
        ("unsqueeze_", (0,), {}),
        ("squeeze_", (0,), {}),
        ("resize_", ([1],), {}),
        ("resize_as_", (to,), {}),
        ("masked_fill_", (True, 1.0), {}),
        ("add_", (to,), {}),
        ("mul_", (to,), {"alpha": 2}) if d.rng.random() < 0.1 else ("mul_", (to,), {}),
        (torch.mul, (to, 2), {"out": to}),
        (torch.add, (to, 1), {"out": to}),
        (torch.clamp, (to, -0.5, 0.5), {"out": to}),
        (torch.sigmoid_, (), {}),
        (torch.relu_, (), {}),
        (operator.imul, (2,), {}),
        (operator.iadd, (1,), {}),
        (operator.setitem, (0, 0), {}),
        (operator.setitem, (Ellipsis, 1), {}),
        (operator.setitem, (slice(None, None, 2), 0), {}),
        (F.relu, (True,), {}),
        (F.relu, (), {"inplace": True}),
        (F.silu, (True,), {}),
        (F.hardtanh, (-0.5, 0.5, True), {}),
        (F.leaky_relu, (0.5, True), {}),
        (torch.Tensor.mul_, (2,), {}),
        (torch.Tensor.copy_, (0.5,), {}),
        (torch._foreach_mul_, (2,), {}),
        (torch.fill_, (1,), {}),
        (torch.nn.init.zeros_, (), {}),
        (aten.mul_.Tensor, (2,), {}),
        (aten.mul_.Scalar, (2,), {}),
        (aten.add_.Tensor, (1,), {}),
        (aten.fill_.Scalar, (1,), {}),
        (aten.zero_.default, (), {}),
        (aten.squeeze_.dim, (0,), {}),
        (aten.squeeze_.default, (), {}),
        (aten.unsqueeze_.default, (0,), {}),
        (aten.t_.default, (), {}),
        (aten.transpose_.default, (0, 1), {}),
        (aten.copy_.default, (to,), {}),
        (aten.mul.out, (to, 2), {"out": to}),
        (aten.relu_, (), {}),
    ]
    return some


_OWN_ARGUMENTS = {torch.mul, torch.add, torch.clamp, aten.mul.out}


def _write(d: Draft, to: fx.Node, place: fx.Node) -> str:
    if d.rng.random() < 0.15:
        target = d.pick(["copy_", "set_", aten.set_.source_Tensor, "mul_", "add_"])
        other = d.pick(n for n in d.tensors() if n <= place)
        # Of another dtype, set_ crashes torch itself.
        if "set_" in str(target) or d.rng.random() < 0.5:
            other = d.call_after(place, d.pick([torch.zeros_like, "clone", torch.neg]), to)
            place = other
        made = d.call_after(place, target, to, other)
        return f"{_text(target)}({to}, {other}) before {made.next}"
    target, args, kwargs = d.pick(_writes(d, to))
    first: tuple[Any, ...] = () if target in _OWN_ARGUMENTS else (to,)
    if target is torch._foreach_mul_:
        first = ([to],)
    made = d.call_after(place, target, *first, *args, **kwargs)
    return f"{_text(target)}{(*first, *args)} before {made.next}"


@mutation(12)
def write(d: Draft) -> str:
    """A value, or a view of it, is written to at a random place."""
    node = d.pick(d.tensors())
    to, text = _seen_as(d, node)
    return f"{text}: {_write(d, to, d.place(to))}"


@mutation(6)
def write_weight(d: Draft) -> str:
    """A parameter, or a view of it, is written to: first of all, or at a random place."""
    node = _parameter(d)
    if d.rng.random() < 0.4:
        return f"{node}: {_write(d, node, d.placeholders()[-1])}"
    to, text = _seen_as(d, node)
    return f"{text}: {_write(d, to, d.place(to))}"


def _parameter(d: Draft) -> fx.Node:
    """Stacks of matrices rather than others."""
    found = [n for n in d.placeholders() if "self" in n.name and not is_number(n)]
    stacks = [n for n in found if value(n) is not None and value(n).ndim > 2]
    return d.pick(stacks if d.rng.random() < 0.5 else found)


@mutation(5)
def scratch(d: Draft) -> str:
    """New values beside the experts, written to and seen through views."""
    node = d.pick(n for n in d.tensors() if is_float(n))
    place = d.place(node)
    fresh = d.call_after(place, d.pick([operator.mul, operator.add]), node, 2)
    fresh.meta["example_value"] = value(node)
    d.add_output(fresh)
    texts = []
    for _ in range(d.rng.randint(1, 3)):
        to, text = _seen_as(d, fresh)
        if to is not fresh and d.rng.random() < 0.7:
            d.add_output(d.call_after(d.place(to), d.pick(["sum", "clone", torch.neg]), to))
        texts.append(f"{text}: {_write(d, to, d.place(to))}")
    return f"{fresh} = {_text(fresh.target)}({node}, 2), returned; " + "; ".join(texts)


@mutation(3)
def alias(d: Draft) -> str:
    """One more input, a view of another's memory, which is read or written to."""
    of = d.pick(n for n in d.placeholders() if is_float(n) or "blocks" in n.name)
    last = d.placeholders()[-1]
    name = unused_name(d.graph, "view")
    with d.graph.inserting_after(last):
        extra = d.graph.placeholder(name)
    extra.meta["example_value"] = value(of)
    cut = d.pick([slice(None), slice(0, 1)])

    def edit(inputs: Inputs) -> None:
        inputs[name] = inputs[of.name].detach()[cut]

    d.edits.append(edit)
    to, text = _seen_as(d, extra)
    return f"{name} is a view of {of}; {text}: {_write(d, to, d.place(to))}"


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
def autocast(d: Draft) -> str:
    a, b = _two_places(d)
    if d.rng.random() < 0.5:
        a, b = d.placeholders()[-1], d.nodes()[-1]
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


# Views of weights, and other inputs.


@mutation(4)
def view_of_weight(d: Draft) -> str:
    """A parameter is read through a view or a copy."""
    node = _parameter(d)
    user = d.pick(node.users)
    target, args = d.pick(
        [
            (operator.getitem, (slice(None),)),
            (operator.getitem, (slice(0, None),)),
            ("view_as", (node,)),
            ("detach", ()),
            ("flip", (0,)),
            ("contiguous", ()),
            ("clone", ()),
            ("roll", (1, 0)),
            ("expand_as", (node,)),
            (torch.neg, ()),
            ("float", ()),
            ("abs", ()),
            (operator.mul, (1,)),
            ("transpose", (-1, -2)),
        ]
    )
    made = d.call_before(user, target, node, *args)
    user.replace_input_with(node, made)
    return f"{user} reads {_text(target)}({node}, {args})"


def _odd(rng: random.Random, tensor: Tensor, numbers: list[float]) -> Tensor:
    """With some odd numbers at random places."""
    odd = tensor.detach().clone()
    flat = odd.view(-1)
    for at in range(min(2, flat.numel())):
        flat[(rng.randrange(flat.numel()) + at) % flat.numel()] = rng.choice(numbers)
    return odd


@mutation(4)
def odd_values(d: Draft) -> str:
    """Zeros, infinities, NaN, huge and tiny numbers, in activations, scores, biases or router."""
    node = d.pick(
        n for n in d.placeholders() if is_float(n) and value(n).ndim < 3 or n.name == "l_x_"
    )
    numbers = d.pick([[0.0], [float("inf")], [-float("inf")], [float("nan")], [1e30], [1e-42]])
    seed = d.rng.random()

    def edit(inputs: Inputs) -> None:
        odd = _odd(random.Random(seed), inputs[node.name], numbers)
        inputs[node.name].data.copy_(odd)

    d.edits.append(edit)
    return f"{node} has {numbers[0]} in it"


@mutation(12)
def odd_ids(d: Draft) -> str:
    """Routes to the last expert by a negative id, to one expert only, or to none."""
    node = d.pick(n for n in d.placeholders() if value(n) is not None and not is_float(n)
                  and value(n).dtype == torch.int64 and value(n).ndim == 2)  # fmt: skip
    numbers = d.pick([[-1], [-6], [-2, -1], [5], [0], [7, 5], [-7], [1 << 40]])
    seed = d.rng.random()

    def edit(inputs: Inputs) -> None:
        inputs[node.name].copy_(_odd(random.Random(seed), inputs[node.name], numbers))

    d.edits.append(edit)
    return f"{node} has {numbers} in it"


@mutation(2)
def ties(d: Draft) -> str:
    """Experts that the router cannot tell apart."""
    router = [n for n in d.placeholders() if "router" in n.name and is_float(n)]
    if not router:
        raise NotHere
    everyone = d.rng.random() < 0.5

    def edit(inputs: Inputs) -> None:
        for node in router:
            tensor = inputs[node.name].data
            tensor[1:] = tensor[:1] if everyone else tensor[1:]
            tensor[2:4] = tensor[1:2]

    d.edits.append(edit)
    return "the router's rows are alike"


@mutation(3)
def constants(d: Draft) -> str:
    """Another alpha or limit, everywhere."""
    old = d.pick([1.702, 7.0])
    new = d.pick([-0.5, 0.0, 0.1, 1.0, 2.5, 1e30, 1e-30, float("inf"), float("nan"), -old, 7, -7.0])
    count = 0
    for node in d.calls():
        for path, number in arguments_of(node):
            if isinstance(number, float) and abs(number) == old:
                set_argument(node, path, new if number > 0 else -new)
                count += 1
    floats = list(filter(is_number, d.placeholders()))
    if not count and not (floats and math.isfinite(new)):  # Dynamo makes no input of others
        raise NotHere

    def edit(inputs: Inputs) -> None:
        for node in floats:
            if float(inputs[node.name]) == old:
                inputs[node.name].fill_(new)

    d.edits.append(edit)
    return f"{old} is {new} everywhere"


@mutation(8)
def kind_of_weight(d: Draft) -> str:
    """A parameter has other strides or another dtype, the negative bit, or is no parameter."""
    node = _parameter(d)
    kinds = ["no parameter", "negative bit", "strides", "offset", "inference"]
    dtypes = [torch.bfloat16, torch.float16, torch.float64]
    what = d.pick([*kinds, *dtypes])
    if what == "no parameter":
        node.meta = {k: v for k, v in node.meta.items() if k != "tensor_dict"}

    def edit(inputs: Inputs) -> None:
        old = inputs[node.name]
        new = old.detach()
        if what == "negative bit" and new.is_floating_point():
            new = torch._neg_view(-new)
        elif what == "strides" and new.ndim > 1:
            new = new.transpose(0, 1).contiguous().transpose(0, 1)
        elif what in dtypes and new.is_floating_point():
            new = new.to(what)
        elif what == "offset":
            new = torch.cat([new[:1], new])[1:]
        elif what == "inference":
            with torch.inference_mode():
                new = new.clone()
        if what != "no parameter" and isinstance(old, nn.Parameter):
            with torch.inference_mode(what == "inference"):
                new = nn.Parameter(new, requires_grad=old.requires_grad and what != "inference")
        inputs[node.name] = new

    d.edits.append(edit)
    return f"{node}: {what}"


# Spelling: what follows changes no meaning.


@mutation(4, neutral=True)
def order(d: Draft) -> str:
    """Neighbours that do not depend on one another change places."""
    moved = 0
    for _ in range(20):
        node = d.pick(d.calls())
        after = node.next
        pure = node.op == after.op == "call_method" or after.op.startswith("call_")
        if not pure or node in after.all_input_nodes or _effects(node) or _effects(after):
            continue
        after.append(node)
        moved += 1
    if not moved:
        raise NotHere
    return f"{moved} calls moved"


def _effects(node: fx.Node) -> bool:
    if isinstance(node.target, str):
        return node.target.endswith("_")
    schema = getattr(node.target, "_schema", None)
    name = _name(node)
    return name.endswith("_") or name in ("setitem", "_set_grad_enabled", "imul", "iadd") or (
        schema is not None and schema.is_mutable
    )  # fmt: skip


_SAME = {
    operator.add: [torch.add, "add", "__add__"],
    operator.mul: [torch.mul, "mul", torch.multiply, "__mul__"],
    operator.floordiv: [torch.floor_divide, "floor_divide"],
    operator.ge: [torch.ge, "ge"],
    torch.sigmoid: ["sigmoid", torch.special.expit],
    torch.bmm: ["bmm", torch.matmul, operator.matmul],
    torch.sort: ["sort"],
    torch.topk: ["topk"],
    torch.histc: ["histc"],
    torch.cumsum: ["cumsum"],
    torch.empty_like: [torch.zeros_like],
    F.softmax: [torch.softmax, "softmax", torch.nn.functional.softmax],
    "sum": [torch.sum],
    "clamp": [torch.clamp, torch.clip, "clip"],
    "clamp_": ["clip_", torch.clamp_],
    "add_": [operator.iadd, "__iadd__"],
    "masked_fill": [torch.masked_fill],
    "repeat_interleave": [torch.repeat_interleave],
    "unsqueeze": [torch.unsqueeze],
    "squeeze": [torch.squeeze],
    "view": ["reshape"],
    "reshape": ["view"],
    "t": [torch.t],
}


@mutation(6, neutral=True)
def spelling(d: Draft) -> str:
    """A function for a method, or the other way round."""
    node = d.pick(n for n in d.calls() if n.target in _SAME and not n.kwargs)
    new = d.pick(_SAME[node.target])
    text = f"{node}: {_text(node.target)} -> {_text(new)}"
    node.op = "call_method" if isinstance(new, str) else "call_function"
    node.target = new
    return text


_NAMES: dict[str, list[str]] = {
    "sort": ["input", "dim", "descending"],
    "topk": ["input", "k", "dim", "largest", "sorted"],
    "softmax": ["input", "dim", "_stacklevel", "dtype"],
    "cumsum": ["input", "dim"],
    "histc": ["input", "bins", "min", "max"],
    "sum": ["input", "dim", "keepdim"],
    "clamp": ["input", "min", "max"],
    "repeat_interleave": ["input", "repeats", "dim"],
    "unsqueeze": ["input", "dim"],
    "linear": ["input", "weight", "bias"],
    "bmm": ["input", "mat2"],
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "sort": {"dim": -1, "descending": False},
    "topk": {"dim": -1, "largest": True, "sorted": True},
    "sum": {"keepdim": False},
    "clamp": {"min": None},
    "histc": {},
    "add": {"alpha": 1},
    "add_": {"alpha": 1},
    "softmax": {"dtype": torch.float32},
    "matmul_ogs": {"kernels": "reference", "layout": "row_major", "gammas": None},
}


@mutation(5, neutral=True)
def keywords(d: Draft) -> str:
    """Arguments by name that were given by position."""
    node = d.pick(n for n in d.calls() if _name(n) in _NAMES and len(n.args) > 1)
    names = _NAMES[_name(node)]
    keep = d.rng.randint(1, len(node.args) - 1)
    named = dict(zip(names[keep : len(node.args)], node.args[keep:], strict=True))
    node.args, node.kwargs = node.args[:keep], {**named, **node.kwargs}
    return f"{node}: {', '.join(named)} by name"


@mutation(4, neutral=True)
def defaults(d: Draft) -> str:
    """A default is written out."""
    options = []
    for node in d.calls():
        given = {*node.kwargs, *_NAMES.get(_name(node), [])[: len(node.args)]}
        options += [
            (node, key, v)
            for key, v in _DEFAULTS.get(_name(node), {}).items()
            if key not in given
        ]
    node, key, default = d.pick(options)
    node.kwargs = {**node.kwargs, key: default}
    return f"{node}: {key}={default} written out"


@mutation(4, neutral=True)
def other_way_round(d: Draft) -> str:
    """``a + b`` as ``b + a``, ``a * b`` as ``b * a``."""
    node = d.pick(
        n for n in d.calls() if _name(n) in ("add", "mul") and len(n.args) == 2 and not n.kwargs
    )
    node.args = node.args[::-1]
    if not isinstance(node.args[0], fx.Node):
        node.op, node.target = "call_function", getattr(operator, _name(node))
    return f"{node}: the other way round"


@mutation(4, neutral=True)
def does_nothing(d: Draft) -> str:
    """A cast or a view that changes nothing."""
    user, path, old = d.pick(e for e in d.edges() if value(e[2]).ndim)
    dtype = value(old).dtype
    target, args = d.pick([("to", (dtype,)), ("view_as", (old,)), ("reshape_as", (old,)),
                           ("flatten", (0, 0)), ("view", ((-1, *value(old).shape[1:]),)),
                           ("unflatten", (0, (-1,))), ("contiguous", ()),
                           ("type", (dtype,))])  # fmt: skip
    if any(isinstance(size, torch.SymInt) for size in value(old).shape[1:]):
        raise NotHere
    set_argument(user, path, d.call_before(user, target, old, *args))
    return f"{user}{list(path)}: {old}.{_text(target)}"


@mutation(2, neutral=True)
def clone(d: Draft) -> str:
    user, path, old = d.pick(e for e in d.edges() if not _effects(e[0]))
    set_argument(user, path, d.call_before(user, "clone", old))
    return f"{user}{list(path)}: {old} cloned"


@mutation(3, neutral=True)
def dead(d: Draft) -> str:
    """Code whose result nobody uses."""
    node = d.pick(d.tensors())
    target, args = d.pick(_READERS)
    made = d.call_after(d.place(node), target, node, *args)
    return f"{_text(target)}({node}) before {made.next}, for nobody"
