"""Whether the fuzzer would notice: the passes with one refusal taken out, for each of them.

    PYTHONPATH=tests python -m fuzz.self_check --count 600

Of ``passes/checks.py`` and ``passes/matcher.py`` every statement that refuses is deleted in turn,
every condition of those that have several, and every exemption is granted to all. The fuzzer runs
with each such deletion; a table says which it found.
"""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fuzz.graphs import Result, quiet, run_case
from mxfp4_fx.passes import checks, matcher

# Deletions that no graph of the fuzzer can show: part of the text -> why.
UNSEEN = {
    "target_for": "wants a device without kernels",
    "is_transformed": "wants a function transform (vmap); these graphs have none",
    "is_wrapper": "wants a tensor subclass such as DTensor",
    "value.device": "wants a second device",
    "value.dtype != torch.uint8": "packed experts of other bytes are no program",
    "value.dtype not in DTYPES": "a weight of another dtype is no program, or shows in the "
    "arithmetic; the kernels take a bias of any",
    "never: result.is_floating_point()": "what is computed of the three dtypes has one of them",
    "get_attr": "says why; what it lets through, the next check refuses",
    "never: type(expected)": "what differs in type alone, 0 for False, means the same",
    "never: not isinstance(actual, list | tuple)": "an index that is no tuple gives another shape",
    "never: value is None": "what is no tensor is no program in the place of one",
    "COMMUTATIVE: floordiv": "a number by the order of rows is a division by zero: no program",
    "COMMUTATIVE: ge": "rare here; test_graph_edits.py swaps the arguments of every call",
}


@dataclass(frozen=True)
class Deletion:
    """A place in a module's source.

    Attributes:
        owner: the module or class that has the function.
        place: which of the function's places.
    """

    owner: Any
    function: str
    place: int
    text: str

    def __str__(self) -> str:
        return f"{self.function}: {self.text}"


def _is_refusal(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise):
        return "_mismatch(" in ast.unparse(node)
    return isinstance(node, ast.Expr) and ast.unparse(node).startswith("_fail(")


def _leaves(node: ast.stmt) -> bool:
    return isinstance(node, ast.Continue | ast.Return)


class _Places(ast.NodeTransformer):
    """Finds the places of a function in order; changes the one of number ``delete``."""

    def __init__(self, delete: int = -1) -> None:
        self.delete = delete
        self.texts: list[str] = []

    def _here(self, text: str) -> bool:
        self.texts.append(" ".join(text.split()))
        return len(self.texts) - 1 == self.delete

    def visit_If(self, node: ast.If) -> Any:
        test_text = ast.unparse(node.test)
        if any(map(_is_refusal, node.body)) and self._here(f"if {test_text}: refuse"):
            return ast.copy_location(ast.Pass(), node)
        refuses = any(map(_is_refusal, node.body))
        if refuses or _leaves(node.body[-1]):
            for test in _disjunctions(node.test):
                for at, operand in enumerate(test.values):
                    # without one of the reasons to refuse, or with one exemption for all
                    if self._here(f"{'never' if refuses else 'always'}: {_text(operand)}"):
                        test.values[at] = ast.copy_location(ast.Constant(not refuses), operand)
            whole = not refuses and not isinstance(node.test, ast.BoolOp)
            if whole and self._here(f"always: {test_text}"):
                node.test = ast.copy_location(ast.Constant(True), node.test)
        self.generic_visit(node)
        return node

    def visit_Assign(self, node: ast.Assign) -> Any:
        for test in _disjunctions(node.value):
            for at, operand in enumerate(test.values):
                if self._here(f"never: {_text(operand)}"):
                    test.values[at] = ast.copy_location(ast.Constant(False), operand)
        self.generic_visit(node)
        return node

    def visit_Raise(self, node: ast.Raise) -> Any:
        return node

    def visit_Try(self, node: ast.Try) -> Any:
        for handler in node.handlers:
            if any(map(_is_refusal, handler.body)) and self._here(_text(node.body[0])):
                handler.body = [ast.copy_location(ast.Pass(), handler.body[0])]
        self.generic_visit(node)
        return node


def _disjunctions(test: ast.expr) -> list[ast.BoolOp]:
    """The ``or`` of a condition, or those in its ``and``."""
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return [p for p in parts if isinstance(p, ast.BoolOp) and isinstance(p.op, ast.Or)]


def _text(node: ast.AST) -> str:
    return ast.unparse(node)


def _functions() -> Iterator[tuple[Any, str, types.FunctionType]]:
    for owner in (checks, matcher.Match):
        for name, function in vars(owner).items():
            if isinstance(function, types.FunctionType) and (
                owner is matcher.Match or name.startswith("_check_")
            ):
                yield owner, name, function


def _parsed(function: types.FunctionType) -> tuple[ast.Module, int]:
    lines, start = inspect.getsourcelines(function)
    indent = len(lines[0]) - len(lines[0].lstrip())
    source = "".join(line[indent:] if line.strip() else line for line in lines)
    return ast.parse(source), start


def deletions() -> list[Deletion]:
    found = []
    for owner, name, function in _functions():
        places = _Places()
        places.visit(_parsed(function)[0])
        found += [Deletion(owner, name, at, text) for at, text in enumerate(places.texts)]
    return found


@contextmanager
def deleted(deletion: Deletion) -> Iterator[None]:
    """The passes without it."""
    function = vars(deletion.owner)[deletion.function]
    tree, start = _parsed(function)
    tree = ast.increment_lineno(_Places(deletion.place).visit(copy.deepcopy(tree)), start - 1)
    # As in the module: annotations are not evaluated.
    flags = sys.modules[function.__module__].annotations.compiler_flag
    made = compile(ast.fix_missing_locations(tree), function.__code__.co_filename, "exec", flags)
    code = next(c for c in made.co_consts if isinstance(c, types.CodeType))
    kept, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = kept


@contextmanager
def commutes(op: str) -> Iterator[None]:
    """The matcher with one op more that it takes either way round."""
    matcher._COMMUTATIVE.add(op)
    try:
        yield
    finally:
        matcher._COMMUTATIVE.remove(op)


def variants() -> Iterator[tuple[str, str, Any]]:
    """What is tried: a name, the function that then refuses less, and how to have it."""
    for deletion in deletions():
        where = "" if deletion.owner is checks else "matcher "
        yield f"{where}{deletion}", deletion.function, deleted(deletion)
    for op in ("floordiv", "ge"):
        yield f"matcher _COMMUTATIVE: {op}, too", "expect", commutes(op)


class Refusals:
    """Which function refused what: only cases that it refuses can show what it lacks."""

    def __init__(self) -> None:
        self._functions: dict[str, set[str]] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        original = matcher.Mismatch.__init__
        functions = self._functions

        def note(self: Any, reason: str, *args: Any) -> None:
            original(self, reason, *args)
            frame = sys._getframe(1)
            while frame.f_code.co_name in ("_fail", "_mismatch") and frame.f_back is not None:
                frame = frame.f_back
            functions.setdefault(reason, set()).add(frame.f_code.co_name)

        matcher.Mismatch.__init__ = note
        try:
            yield
        finally:
            matcher.Mismatch.__init__ = original

    def by(self, function: str, case: Result) -> bool:
        # What is reported has words on the form before it, or a remedy.
        known = [r for r, names in self._functions.items() if function in names]
        return any(k in reason for reason in case.reasons for k in known)


def first_fault(cases: list[Result]) -> Result | None:
    """Run the cases again; the first that is a fault now."""
    for case in cases:
        again = run_case(case.seed)
        if again.verdict == "FAULT":
            return again
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=600, help="how many cases for each deletion")
    parser.add_argument("--seed", type=int, default=0, help="the first case's")
    parser.add_argument("--only", default="", help="deletions with this in their name")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)
    missed = 0
    with quiet():
        seeds = range(args.seed, args.seed + args.count)
        refusals = Refusals()
        with refusals.noted():
            cases = [run_case(seed) for seed in seeds]
        # A deletion makes rewrites of refusals, and changes nothing else.
        refused = [case for case in cases if case.verdict == "refused"]
        print(f"{len(refused)} of {args.count} cases are refused")
        for name, function, variant in variants():
            if args.only not in name:
                continue
            candidates = [case for case in refused if refusals.by(function, case)]
            before = time.process_time()
            with variant:
                fault = first_fault(candidates)
            seconds = f"{time.process_time() - before:4.0f} s"
            if fault is not None:
                at = fault.seed - args.seed + 1
                print(f"found  {seconds} {name}\n         case {at}: {fault.fault[:110]}")
                continue
            why = next((why for text, why in UNSEEN.items() if text in name), None)
            missed += why is None
            print(f"{'-     ' if why else 'MISSED'} {seconds} {name} ({len(candidates)} cases)")
            if why:
                print(f"         {why}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
