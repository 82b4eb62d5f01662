"""Patterns as expressions: a computation, written as operators and functions on its inputs.

They build a directed acyclic graph of :class:`Op` over named tensors (:class:`Leaf`) and named
numbers (:class:`Letter`). ``matcher.py`` proves that a graph computes one.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any


class Expr:
    """A node of a pattern. Equality is identity: two uses of one value are one node."""

    def __add__(self, other: Expr | Scalar | float) -> Expr:
        return Op("add", {"input": self, "other": other, "alpha": 1})

    def __sub__(self, other: Expr) -> Expr:
        return Op("sub", {"input": self, "other": other, "alpha": 1})

    def __mul__(self, other: Expr | Scalar | float) -> Expr:
        return Op("mul", {"input": self, "other": other})

    def __floordiv__(self, other: Scalar | int) -> Expr:
        return Op("floordiv", {"input": self, "other": other})

    def __mod__(self, other: Scalar | int) -> Expr:
        return Op("mod", {"input": self, "other": other})

    def __getitem__(self, index: Any) -> Expr:
        return Op("getitem", {"input": self, "index": index})


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf(Expr):
    """An input tensor of the pattern; it binds to any node."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True, eq=False)
class Op(Expr):
    """A canonical call (``graph.Call``) with expressions as arguments."""

    op: str
    args: dict[str, Any]

    def __str__(self) -> str:
        args = (f"{k}={brief(v)}" if k != "input" else brief(v) for k, v in self.args.items())
        return f"{self.op}({', '.join(args)})"


class Rounded(Op):
    """A value that the graph may cast to another dtype before it uses it.

    The node for it is the cast, or else the value's own. ``checks.py`` judges the dtypes.

    Attributes:
        role: the name by which ``checks.py`` finds it, or "".
    """

    role: str

    def __init__(self, value: Expr, role: str = "") -> None:
        super().__init__("cast", {"input": value})
        object.__setattr__(self, "role", role)

    def __str__(self) -> str:
        return str(self.args["input"])


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf(Expr):
    """A value that is computed in one of several ways.

    All :class:`OneOf` with the same ``choice`` are computed in the way of the same name. The ways
    are tried in order. The first that fits is taken for good, so two ways must not both fit one
    call, except that a leaf may come last.

    Attributes:
        choice: what is chosen, for reports and for ``Match.choices``.
        ways: the name of each way -> its expression.
        letters: the name of a way -> numbers that it implies.
        words: the ways in words, for a reader who does not know the pattern.
    """

    choice: str
    ways: dict[str, Expr]
    letters: Mapping[str, Mapping[Letter, Scalar | float]] = dataclasses.field(default_factory=dict)
    words: str = ""

    def __str__(self) -> str:
        return self.words or " or ".join(dict.fromkeys(map(str, self.ways.values())))


class Scalar:
    """A number of a pattern: a :class:`Letter` or arithmetic on letters."""

    def __init__(self, text: str, value: Callable[[Mapping[str, Any]], Any]) -> None:
        self.text = text
        self.value = value

    def __str__(self) -> str:
        return self.text

    def _with(self, other: Scalar | int, sign: str, f: Callable[[Any, Any], Any]) -> Scalar:
        right = other.value if isinstance(other, Scalar) else lambda env: other
        return Scalar(f"{self}{sign}{other}", lambda env: f(self.value(env), right(env)))

    def __mul__(self, other: Scalar | int) -> Scalar:
        return self._with(other, "*", operator.mul)

    def __floordiv__(self, other: Scalar | int) -> Scalar:
        return self._with(other, "//", operator.floordiv)

    def __sub__(self, other: Scalar | int) -> Scalar:
        return self._with(other, "-", operator.sub)

    def __neg__(self) -> Scalar:
        return Scalar(f"-{self}", lambda env: -self.value(env))


class Letter(Scalar):
    """A named number.

    A leaf's shape binds it, or else the first argument that is this letter alone.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, lambda env: env[name])
        self.name = name

    def __mul__(self, other: Scalar | int) -> Scalar:
        product = super().__mul__(other)
        return Multiple(self, other, product) if isinstance(other, int) else product

    def bind(self, env: dict[str, Any], number: Any) -> None:
        env.setdefault(self.name, number)


class Multiple(Scalar):
    """A letter times a number. It binds the letter if nothing else has bound it before."""

    def __init__(self, letter: Letter, factor: int, product: Scalar) -> None:
        super().__init__(product.text, product.value)
        self.letter = letter
        self.factor = factor

    def bind(self, env: dict[str, Any], number: Any) -> None:
        self.letter.bind(env, number // self.factor)


def brief(value: Any) -> str:
    """Format a pattern value without the arguments of nested ops."""
    if isinstance(value, Rounded):
        return brief(value.args["input"])
    if isinstance(value, OneOf):
        return " or ".join(dict.fromkeys(map(brief, value.ways.values())))
    if isinstance(value, Op):
        return f"{value.op}(..)"
    if isinstance(value, tuple):
        return f"({', '.join(map(brief, value))})"
    if isinstance(value, slice):
        parts = ["" if v is None else str(v) for v in (value.start, value.stop, value.step)]
        return ":".join(parts)
    return "..." if value is Ellipsis else str(value)
