"""Mutations of a graph's inputs: odd values, and parameters of another kind."""

from __future__ import annotations

import math
import operator
import random

import torch
from torch import Tensor, nn

from fuzz.draft import (
    Draft,
    Inputs,
    NotHere,
    arguments_of,
    is_float,
    is_number,
    mutation,
    pick_parameter,
    set_argument,
    text_of,
    value,
)


@mutation(4)
def view_of_weight(d: Draft) -> str:
    """A parameter is read through a view or a copy."""
    node = pick_parameter(d)
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
    return f"{user} reads {text_of(target)}({node}, {args})"


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
        n for n in d.placeholders() if is_float(n) and (value(n).ndim < 3 or "self" not in n.name)
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


@mutation(12)
def kind_of_weight(d: Draft) -> str:
    """A parameter has other strides, a row or a dtype more, the negative bit, or is none."""
    node = pick_parameter(d)
    kinds = ["no parameter", "negative bit", "strides", "offset", "inference", "one more"]
    dtypes = [torch.bfloat16, torch.float64]
    what = d.pick([*kinds, *dtypes, "inference"])
    if what == "inference":  # a bias may be kept for gradients
        node = d.pick(n for n in d.placeholders() if "bias" in n.name)
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
        elif what == "one more":
            new = torch.cat([new, new[:1]])
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
