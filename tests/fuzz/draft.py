"""A captured graph while it is being changed, and the list of what can be done to it."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fuzz.bases import Base, Edit
from mxfp4_fx.passes.copies import copy_graph

Path = tuple[Any, ...]
Inputs = dict[str, Any]


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

    @property
    def dynamic(self) -> bool:
        return any(value(node) is None for node in self.placeholders())

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


def name_of(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


def text_of(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def keeps_shape(target: Any) -> bool:
    """With symbolic sizes, torch itself crashes in some that do not."""
    return not text_of(target).startswith(("t_", "squeeze_", "unsqueeze_", "transpose_", "resize_"))


def pick_parameter(d: Draft) -> fx.Node:
    """Stacks of matrices rather than others."""
    found = [n for n in d.placeholders() if "self" in n.name and not is_number(n)]
    stacks = [n for n in found if value(n) is not None and value(n).ndim > 2]
    return d.pick(stacks if d.rng.random() < 0.5 else found)


# What reads a value and gives another.
READERS: list[tuple[Any, tuple[Any, ...]]] = [
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
