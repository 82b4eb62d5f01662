"""Matching a pattern (``expressions.py``) against a graph.

Matching goes backwards from the pattern's result and proves, node by node, that the graph computes
the same expression. It collects numbers on the way and compares them at the end, when the letters
are known. The comparison is exact, and symbolic where a size is dynamic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from mxfp4_fx.passes.expressions import (
    Expr,
    Leaf,
    Letter,
    Multiple,
    OneOf,
    Op,
    Rounded,
    Scalar,
    brief,
)
from mxfp4_fx.passes.graph import (
    Call,
    Number,
    equal,
    equal_or_guard,
    is_known,
    op_name,
    read_call,
    tensor_of,
)

_COMMUTATIVE = {"add", "mul"}


class Mismatch(Exception):
    """The graph differs from the pattern.

    Attributes:
        reason: what the pattern expects, and what the graph has.
        node: the node that differs, if there is one.
        matched: how many calls agreed before. The attempt with the most explains a miss best.
    """

    def __init__(self, reason: str, node: fx.Node | None, matched: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.matched = matched


class Match:
    """A partial proof, which grows with every :meth:`expect`.

    Attributes:
        nodes: op of the pattern -> the graph node that computes it.
        leaves: leaf name -> graph node.
        choices: what a :class:`OneOf` chooses -> the name of the way that the graph takes.
        letters: letter name -> number, once :meth:`solve` has run.
    """

    def __init__(self) -> None:
        self.nodes: dict[Op, fx.Node] = {}
        self.leaves: dict[str, fx.Node] = {}
        self.choices: dict[str, str] = {}
        self.letters: dict[str, Any] = {}
        self._numbers: list[tuple[Scalar | float, Any, Op, fx.Node]] = []
        self._implied: dict[Letter, Scalar | float] = {}
        self._agreed = 0

    def copy(self) -> Match:
        """Return a copy, to try one of several ways to go on; a failure leaves nothing here."""
        other = Match()
        other._restore(self._saved())
        other.letters = dict(self.letters)
        return other

    def _saved(self) -> tuple[Any, ...]:
        held = self.nodes, self.leaves, self.choices, self._implied, self._numbers
        return *(part.copy() for part in held), self._agreed

    def _restore(self, saved: tuple[Any, ...]) -> None:
        self.nodes, self.leaves, self.choices, self._implied, self._numbers, self._agreed = saved

    def expect(self, expr: Expr, value: Any, user: fx.Node | None = None) -> None:
        """Prove that graph value ``value`` computes ``expr``.

        Raises:
            Mismatch: the proof fails.
        """
        if not isinstance(value, fx.Node):
            raise self._mismatch(f"expected {brief(expr)}, found {value!r}", user)
        if isinstance(expr, Leaf):
            if self.leaves.setdefault(expr.name, value) is not value:
                raise self._mismatch(
                    f"two different values stand for {expr.name}: {self.leaves[expr.name]} and "
                    f"{value}",
                    user or value,
                )
            return
        if isinstance(expr, OneOf):
            self._expect_one_of(expr, value, user)
            return
        assert isinstance(expr, Op)
        if expr in self.nodes:
            if self.nodes[expr] is not value:
                raise self._mismatch(
                    f"{_describe(value)} stands where {_describe(self.nodes[expr])} should be used "
                    "again",
                    user or value,
                )
            return
        call = read_call(value)
        if isinstance(expr, Rounded) and (call is None or call.op != "cast"):
            self.expect(expr.args["input"], value, user)
            self.nodes[expr] = value
            return
        if call is None or call.op != expr.op:
            raise self._mismatch(f"expected {expr}, found {_describe(value)}", value)
        self._agreed += 1
        self._expect_call(expr, call, value)
        self.nodes[expr] = value

    def _expect_one_of(self, expr: OneOf, value: fx.Node, user: fx.Node | None) -> None:
        chosen, name_here, agreed = self.choices.get(expr.choice), op_name(value), self._agreed
        ways = [
            (name, way)
            for name, way in expr.ways.items()
            # An op other than the graph's would fail at once (views have several names).
            if (name == chosen if chosen is not None else _may_be(way, name_here))
        ]
        failures: list[Mismatch] = []
        for name, way in ways:
            # Without another way, a failure is that of whoever has one: it restores.
            saved = self._saved() if len(ways) > 1 else None
            self.choices[expr.choice] = name  # first: what is inside may have the same choice
            try:
                self.expect(way, value, user)
                self._implied |= expr.letters.get(name, {})
                return
            except Mismatch as mismatch:
                failures.append(mismatch)
                if saved is not None:
                    self._restore(saved)
        nearest = max(failures, key=lambda m: m.matched, default=None)
        if nearest is None or (chosen is None and nearest.matched == agreed):
            raise self._mismatch(f"expected {expr}, found {_describe(value)}", value)
        raise nearest

    def _expect_call(self, expr: Op, call: Call, node: fx.Node) -> None:
        orders = [call.args]
        if expr.op in _COMMUTATIVE:
            swapped = {"input": call.args["other"], "other": call.args["input"]}
            orders.append({**call.args, **swapped})
        failures: list[Mismatch] = []
        for args in orders:
            saved = self._saved() if len(orders) > 1 else None
            try:
                for name, expected in expr.args.items():
                    self._expect_argument(expected, args.get(name), expr, node)
                return
            except Mismatch as mismatch:
                failures.append(mismatch)
                if saved is not None:
                    self._restore(saved)
        raise max(failures, key=lambda m: m.matched)

    def _expect_argument(self, expected: Any, actual: Any, expr: Op, node: fx.Node) -> None:
        if isinstance(expected, Expr):
            self.expect(expected, actual, node)
        elif isinstance(expected, Scalar) or _is_number(expected):
            if not _is_number(actual):
                found = _describe(actual) if isinstance(actual, fx.Node) else repr(actual)
                raise self._mismatch(f"expected {expr}, with {expected} but found {found}", node)
            self._numbers.append((expected, actual, expr, node))
        elif isinstance(expected, tuple):
            if not isinstance(actual, list | tuple) or len(actual) != len(expected):
                raise self._mismatch(f"expected {expr}, found {_describe(node)}", node)
            for e, a in zip(expected, actual, strict=True):
                self._expect_argument(e, a, expr, node)
        elif type(expected) is not type(actual) or expected != actual:
            raise self._mismatch(f"expected {expr}, found {_describe(node)}", node)

    def solve(self, shapes: Mapping[str, tuple[Scalar | int, ...]]) -> None:
        """Bind the letters and prove every number and every leaf's shape.

        Args:
            shapes: leaf name -> its shape in letters. The first leaf with a letter in its shape,
                alone or as a multiple, binds the letter.

        Raises:
            Mismatch: a number or a shape differs from the pattern's.
        """
        env = self.letters
        for name, shape in shapes.items():
            value = tensor_of(self.leaves[name])
            if value is None or value.ndim != len(shape):
                raise self._mismatch(f"{name} must have {len(shape)} dimensions", self.leaves[name])
            for letter, size in zip(shape, value.shape, strict=True):
                if isinstance(letter, Letter | Multiple):
                    letter.bind(env, size)
        env |= {letter.name: _number(number, env) for letter, number in self._implied.items()}
        for expected, actual, expr, node in self._numbers:
            if not is_known(actual):
                reason = f"expected {expr}, with {expected} but found a number computed from data"
                raise self._mismatch(f"{reason} (.item()): make it a Python number", node)
            if isinstance(expected, Letter):
                expected.bind(env, actual)
        for name, shape in shapes.items():
            value = tensor_of(self.leaves[name])
            assert value is not None
            wanted = [_number(scalar, env) for scalar in shape]
            # Equal sizes of two inputs may be different symbols: a guard makes them equal.
            if not all(map(equal_or_guard, value.shape, wanted)):
                letters = ", ".join(map(str, shape))
                raise self._mismatch(
                    f"{name} must be [{letters}]; it is {tuple(value.shape)}", self.leaves[name]
                )
        for expected, actual, expr, node in self._numbers:
            number = _number(expected, env)
            if not equal(actual, number):
                said = expected if isinstance(expected, Scalar) else number
                raise self._mismatch(
                    f"expected {expr}, with {said} = {number} but found {actual}", node
                )

    def _mismatch(self, reason: str, node: fx.Node | None) -> Mismatch:
        return Mismatch(reason, node, self._agreed)


def _may_be(way: Expr, name: str | None) -> bool:
    """Return whether a way may fit a call of that name."""
    return type(way) is not Op or way.op in (name, "view")


def _number(value: Scalar | float, env: Mapping[str, Any]) -> Any:
    return value.value(env) if isinstance(value, Scalar) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool)


def _describe(node: fx.Node) -> str:
    """Format a graph node like a pattern."""
    if node.op in ("placeholder", "get_attr"):
        return f"the input {node}"
    call = read_call(node)
    if call is None:
        target = node.target if isinstance(node.target, str) else node.target.__name__
        return f"{target}(..)"
    names = {k: _brief_value(v) for k, v in call.args.items()}
    args = (v if k == "input" else f"{k}={v}" for k, v in names.items())
    return f"{call.op}({', '.join(args)})"


def _brief_value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value)
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_brief_value, value))})"
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return str(value)
    return brief(value)
