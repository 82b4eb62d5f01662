"""Mutations that write: to values, views of them and parameters, by every spelling of torch's."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fuzz.bases import unused_name
from fuzz.draft import (
    Draft,
    Inputs,
    is_float,
    keeps_shape,
    mutation,
    pick_parameter,
    text_of,
    value,
)

aten = torch.ops.aten


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
    text = f"{text_of(target)}({node})"
    if text_of(target) in ("chunk", "split"):
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
        sets = [] if d.dynamic else ["set_", aten.set_.source_Tensor]
        target = d.pick(["copy_", "mul_", "add_", *sets])
        other = d.pick(n for n in d.tensors() if n <= place)
        # Of another dtype, set_ crashes torch itself.
        if not d.dynamic and ("set_" in str(target) or d.rng.random() < 0.5):
            other = d.call_after(place, d.pick([torch.zeros_like, "clone", torch.neg]), to)
            place = other
        made = d.call_after(place, target, to, other)
        return f"{text_of(target)}({to}, {other}) before {made.next}"
    target, args, kwargs = d.pick(w for w in _writes(d, to) if not d.dynamic or keeps_shape(w[0]))
    first: tuple[Any, ...] = () if target in _OWN_ARGUMENTS else (to,)
    if target is torch._foreach_mul_:
        first = ([to],)
    made = d.call_after(place, target, *first, *args, **kwargs)
    return f"{text_of(target)}{(*first, *args)} before {made.next}"


@mutation(12)
def write(d: Draft) -> str:
    """A value, or a view of it, is written to at a random place."""
    node = d.pick(d.tensors())
    to, text = _seen_as(d, node)
    return f"{text}: {_write(d, to, d.place(to))}"


@mutation(10)
def write_weight(d: Draft) -> str:
    """A parameter, or a view of it, is written to: first, last, or at a random place."""
    node = pick_parameter(d)
    if d.rng.random() < 0.6:
        return f"{node}: {_write(d, node, d.pick([d.placeholders()[-1], d.nodes()[-1]]))}"
    to, text = _seen_as(d, node)
    return f"{text}: {_write(d, to, d.place(to))}"


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
    return f"{fresh} = {text_of(fresh.target)}({node}, 2), returned; " + "; ".join(texts)


@mutation(6)
def in_place(d: Draft) -> str:
    """Code beside the experts: a value and its view, changed in place in values and in shape."""
    node = d.pick(n for n in d.tensors() if is_float(n))
    sizes = tuple(value(node).shape)
    at, texts = d.place(node), []

    def add(target: Any, *args: Any) -> fx.Node:
        nonlocal at
        at = d.call_after(at, target, *args)
        texts.append(f"{at} = {text_of(target)}{args}")
        return at

    source = add(operator.getitem, node, None) if d.rng.random() < 0.5 else node
    fresh, other = add(operator.mul, source, 2), add(operator.add, source, 1)
    view = add(*d.pick([("view", fresh, -1), ("view", fresh, sizes), (operator.getitem, fresh, 0)]))
    read = d.rng.random() < 0.3 and add("sum", view, 0)
    add(*d.pick([("add_", fresh, 1), ("add_", fresh, other), ("clamp_", fresh, -1, 1)]))
    reshapes = ["t_", (aten.squeeze_.dim, 0), (aten.unsqueeze_.default, 0), ("transpose_", -1, -2)]
    change = d.pick([(target,) if isinstance(target, str) else target for target in reshapes])
    if not d.dynamic and d.rng.random() < 0.5:
        add(change[0], d.pick([fresh, other]), *change[1:])
    elif not d.dynamic:
        add("set_", fresh, add(torch.zeros_like, fresh))
    for result in (read or add("clone", view), fresh, other):
        d.add_output(result)
    return "; ".join(texts)


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
