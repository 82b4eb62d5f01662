"""Mutations of a graph's spelling, which change no meaning: most of them should be rewritten."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fuzz.draft import READERS, Draft, NotHere, mutation, name_of, set_argument, text_of, value


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
    name = name_of(node)
    return name.endswith("_") or name in ("setitem", "_set_grad_enabled", "imul", "iadd") or (
        schema is not None and schema.is_mutable
    )  # fmt: skip


_SAME = {
    operator.add: [torch.add, "add", "__add__"],
    operator.mul: [torch.mul, "mul", torch.multiply, "__mul__"],
    operator.floordiv: [torch.floor_divide, "floor_divide"],
    operator.ge: [torch.ge, "ge"],
    operator.ne: [torch.ne, "ne"],
    operator.eq: [torch.eq, "eq"],
    operator.mod: [torch.remainder, "remainder"],
    torch.fmod: ["fmod"],
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
    text = f"{node}: {text_of(node.target)} -> {text_of(new)}"
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
    node = d.pick(n for n in d.calls() if name_of(n) in _NAMES and len(n.args) > 1)
    names = _NAMES[name_of(node)]
    keep = d.rng.randint(1, len(node.args) - 1)
    named = dict(zip(names[keep : len(node.args)], node.args[keep:], strict=True))
    node.args, node.kwargs = node.args[:keep], {**named, **node.kwargs}
    return f"{node}: {', '.join(named)} by name"


@mutation(4, neutral=True)
def defaults(d: Draft) -> str:
    """A default is written out."""
    options = []
    for node in d.calls():
        given = {*node.kwargs, *_NAMES.get(name_of(node), [])[: len(node.args)]}
        options += [
            (node, key, v)
            for key, v in _DEFAULTS.get(name_of(node), {}).items()
            if key not in given
        ]
    node, key, default = d.pick(options)
    node.kwargs = {**node.kwargs, key: default}
    return f"{node}: {key}={default} written out"


@mutation(4, neutral=True)
def other_way_round(d: Draft) -> str:
    """``a + b`` as ``b + a``, ``a * b`` as ``b * a``."""
    node = d.pick(
        n for n in d.calls() if name_of(n) in ("add", "mul") and len(n.args) == 2 and not n.kwargs
    )
    node.args = node.args[::-1]
    if not isinstance(node.args[0], fx.Node):
        node.op, node.target = "call_function", getattr(operator, name_of(node))
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
    return f"{user}{list(path)}: {old}.{text_of(target)}"


@mutation(3, neutral=True)
def reshaped(d: Draft) -> str:
    """What is about to be reshaped has another shape before."""
    edges = [e for e in d.edges() if e[0].target in ("reshape", "flatten") and e[1] == (0,)]
    user, path, old = d.pick(e for e in edges if -1 in e[0].args)
    target, args = d.pick([("flatten", ()), ("unsqueeze", (-1,)), ("unsqueeze", (0,))])
    set_argument(user, path, d.call_before(user, target, old, *args))
    return f"{user}: {old}.{target}{args}"


@mutation(3, neutral=True)
def index(d: Draft) -> str:
    """An index in other words."""
    found = [n for n in d.calls() if n.target is operator.getitem]
    found = [n for n in found if value(n.args[0]) is not None]
    tuples = [n for n in found if isinstance(n.args[1], tuple)]
    node = d.pick(tuples if tuples and d.rng.random() < 0.6 else found)
    base, old = node.args
    rest = value(base).ndim - 1
    if isinstance(old, tuple):
        all_but_last = (slice(None),) * rest
        new = d.pick([(*all_but_last, old[-1]), (..., slice(None), *old[1:])])
    else:
        new = d.pick([(old,), (old, ...), (old, *[slice(None)] * rest)])
    node.args = base, new
    return f"{node}: [{old}] -> [{new}]"


@mutation(2, neutral=True)
def clone(d: Draft) -> str:
    user, path, old = d.pick(e for e in d.edges() if not _effects(e[0]))
    set_argument(user, path, d.call_before(user, "clone", old))
    return f"{user}{list(path)}: {old} cloned"


@mutation(3, neutral=True)
def dead(d: Draft) -> str:
    """Code whose result nobody uses."""
    node = d.pick(d.tensors())
    target, args = d.pick(READERS)
    made = d.call_after(d.place(node), target, node, *args)
    return f"{text_of(target)}({node}) before {made.next}, for nobody"
