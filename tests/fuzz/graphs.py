"""A fuzzer of captured graphs: no mutation makes a wrong rewrite, a crash, or a silent miss.

    PYTHONPATH=tests python -m fuzz.graphs --count 2000 --seed 1
    PYTHONPATH=tests python -m fuzz.graphs --form plain-grad --seed 17 --count 1 --show

A case is one of the graphs of ``bases.py`` with one to three of the mutations of
``mutations.py``. Where the mutated graph runs, the passes may rewrite it or not, but

- the result does what the mutated graph does (``judge.py``), twice in a row: outputs, inputs
  and parameters afterwards, gradients, and whether an output wants one;
- nothing in this package raises;
- every multiplication by a stack of matrices that is a parameter is in the report.

A case depends on its seed and form alone.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import logging
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from fuzz import inputs as input_mutations
from fuzz import mutations, spelling, writes
from fuzz.bases import BASES, Inputs, base_of, modes_kept, new_inputs, propagate
from fuzz.draft import MUTATIONS, NEUTRAL, Draft, choose, mutate
from fuzz.judge import Judge, Recorder, Wrong, call
from mxfp4_fx.backend import bind
from mxfp4_fx.core.options import Options
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.pipeline import run_pipeline

SOURCES = mutations, writes, input_mutations, spelling  # all that are in MUTATIONS

# Those of dynamic shapes take ten times as long.
_SHARE = {name: 1 if "dynamic" in name else 4 for name in BASES}
_SHARE |= {name: 6 for name in BASES if name.endswith("routes")}
_SHARE |= {
    name: 6 for name in BASES if name.endswith(("parallel", "-rank", "-grad")) and _SHARE[name] > 1
}
_SHARE |= {"plain-float64": 1, "plain-odd-size": 1}  # which are never rewritten

_TRIES = 5  # what a case makes until it has a program
# Some ids are errors where a form computes nothing that makes sense (``reference.expert_ids``).
_NAMED = "is out of range: there are"


@dataclasses.dataclass
class Result:
    """How one case ended.

    Attributes:
        verdict: "rewritten", "refused", "no program" or "FAULT".
        kinds: the mutations' names; ``steps`` says what each did.
        thrown_away: how many mutated graphs before were no programs.
        fault: what is wrong, in words.
    """

    seed: int
    form: str
    kinds: list[str]
    steps: list[str]
    thrown_away: int = 0
    verdict: str = "no program"
    fault: str = ""
    graph: str = ""
    reasons: list[str] = dataclasses.field(default_factory=list)

    @property
    def neutral(self) -> bool:
        return NEUTRAL.issuperset(self.kinds)

    def __str__(self) -> str:
        steps = "".join(f"\n  {kind}: {s}" for kind, s in zip(self.kinds, self.steps, strict=True))
        case = f"--form {self.form} --seed {self.seed} --count 1 --show"
        again = f"PYTHONPATH=tests python -m fuzz.graphs {case}"
        return f"{self.form}, seed {self.seed}:{steps}\n  {self.fault}\n  again: {again}"


def run_case(seed: int, form: str | None = None, only: str | None = None) -> Result:
    """One case; ``form`` and ``only`` restrict the choice of the base and of the mutations."""
    rng = random.Random(f"case {seed}")
    chosen = rng.choices(BASES, [_SHARE[name] for name in BASES])[0]
    base = base_of(form or chosen)
    neutral = only in NEUTRAL if only else rng.random() < 0.2
    wanted = [only or choose(rng, neutral) for _ in range(rng.choices([1, 2, 3], [7, 2, 1])[0])]
    for thrown_away in range(_TRIES):
        draft = Draft(base, rng)
        result = Result(seed, base.name, [], [], thrown_away)
        for kind in wanted:
            found, step = mutate(draft, kind)
            result.kinds.append(found)
            result.steps.append(step)
        for node in draft.graph.nodes:
            node.meta["fuzz"] = node.name
        try:
            _judge(draft, result)
        except Wrong as wrong:
            result.verdict, result.fault = "FAULT", f"wrong: {wrong}"
        if result.verdict != "no program":
            break
    return result


def _judge(draft: Draft, result: Result) -> None:
    base, gm = draft.base, draft.gm

    def make_inputs() -> Inputs:
        return new_inputs(base, draft.edits, base.grad)

    try:
        gm.graph.lint()
        gm.recompile()
        inputs = make_inputs()
        propagate(base, gm, inputs.values)
        expected = call(gm.forward, base, make_inputs())
    except Exception as error:
        result.fault = f"{type(error).__name__}: {error}"
        return  # no program, or one that raises
    result.graph, before = readable(gm), str(gm.graph)
    recorder = Recorder()
    options = Options(inner=recorder)
    try:
        with modes_kept(base.grad):
            rewritten, ctx = run_pipeline(gm, inputs.list, options)
    except Exception as error:
        raise Wrong(f"the passes raise {_brief(error)}") from error
    result.reasons = [miss.reason for miss in ctx.report.misses]
    if str(gm.graph) != before:
        raise Wrong("the passes changed the captured graph")
    reported = {found.layer for found in [*ctx.report.rewrites, *ctx.report.misses]}
    for node in suspects(gm, inputs.values):
        if layer_of(node) not in reported:
            raise Wrong(f"{node} of {layer_of(node)!r} is neither rewritten nor reported")
    if rewritten is gm:
        result.verdict = "refused"
        return
    result.verdict = "rewritten"
    _check_whole(gm, rewritten, ctx, inputs.values)
    try:
        with modes_kept(base.grad):
            compiled = bind(gm, rewritten, ctx, options)
        actual = call(compiled, base, make_inputs())
    except Exception as error:
        # Ids that are taken as they are may be odd, too.
        may_be_odd = "odd_ids" in result.kinds or any(r.router for r in ctx.report.rewrites)
        if isinstance(error, IndexError) and _NAMED in str(error) and may_be_odd:
            result.verdict = "refused"
            return
        raise Wrong(f"the compiled graph raises {_brief(error)}") from error
    judge = Judge(base, gm, draft.edits)
    judge.compare(expected, actual, recorder.runs, len(ctx.report.rewrites))
    if base.grad:
        judge.semantics()


def _brief(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "mxfp4_fx" in f.filename]
    at = ours[-1] if ours else last
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]} ({at.filename.rpartition('/')[2]}:{at.lineno})"


_MATMULS = {"bmm", "matmul", "baddbmm", "einsum", "matmul_ogs"}
_SAME_MATRICES = {
    *("getitem", "to", "float", "view", "reshape", "contiguous", "clone", "detach", "index_select"),
    *("transpose", "view_as", "alias", "expand_as", "type", "unflatten", "reshape_as", "flatten"),
}


def suspects(gm: fx.GraphModule, inputs: dict[str, Any]) -> Iterator[fx.Node]:
    """Each multiplication by a parameter that is a stack of matrices, or by what is taken of it."""
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        if node.op.startswith("call_") and (name in _MATMULS or "grouped_mm" in name):
            for value in node.all_input_nodes:
                at = value
                while at.op.startswith("call_") and _short(at) in _SAME_MATRICES:
                    at = at.all_input_nodes[0]
                weight = inputs.get(at.name) if at.op == "placeholder" else None
                if isinstance(weight, nn.Parameter) and weight.ndim >= 3:
                    yield node
                    break


def _check_whole(
    gm: fx.GraphModule, rewritten: fx.GraphModule, ctx: Context, inputs: dict[str, Any]
) -> None:
    """What became MXFP4 is a parameter, and is no longer computed with as it was."""
    left = len(list(suspects(gm, inputs))) - len(list(suspects(rewritten, inputs)))
    if left < 2 * len(ctx.report.rewrites):
        raise Wrong("a rewritten layer is still computed as it was")
    for binding in ctx.bindings:
        for at in binding.slots:
            name, value = list(inputs.items())[at]
            if not isinstance(value, nn.Parameter):
                raise Wrong(f"{name} is swizzled and is no parameter")


def layer_of(node: fx.Node) -> str:
    """The module whose forward made a node: Dynamo notes L['self']._modules['layers']..."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    names = re.findall(r"\w+", path.replace("_modules", ""))[2:]
    return ".".join(names) or "(top level)"


def _short(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]


def readable(gm: fx.GraphModule) -> str:
    def text(node: fx.Node) -> str:
        value = node.meta.get("example_value")
        shape = f"{str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, Tensor) else ""
        return f"{node.format_node()} {shape}"

    return "\n".join(map(text, gm.graph.nodes))


@contextmanager
def quiet() -> Iterator[None]:
    """Deterministic, memory that nobody wrote filled, and nothing said of programs that fail."""
    names = ["torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"]
    levels = {name: logging.getLogger(name).level for name in names}
    before = torch.are_deterministic_algorithms_enabled()
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class Statistics:
    """What became of the cases, mutation by mutation."""

    def __init__(self) -> None:
        self.of: collections.Counter[tuple[str, str]] = collections.Counter()
        self.verdicts: collections.Counter[str] = collections.Counter()
        self.neutral: collections.Counter[str] = collections.Counter()
        self.faults: list[Result] = []
        self.thrown_away = 0

    def add(self, result: Result) -> None:
        self.verdicts[result.verdict] += 1
        self.thrown_away += result.thrown_away
        for kind in result.kinds:
            self.of[kind, result.verdict] += 1
        if result.neutral and result.kinds:
            self.neutral[result.verdict] += 1
        if result.verdict == "FAULT":
            self.faults.append(result)

    def __str__(self) -> str:
        columns = ("rewritten", "refused", "no program", "FAULT")
        rows = [f"{'':18}" + "".join(f"{c:>12}" for c in columns)]
        for kind in MUTATIONS:
            counts = "".join(f"{self.of[kind, column]:12}" for column in columns)
            rows.append(f"{kind + (' *' if kind in NEUTRAL else ''):18}{counts}")
        for text, counter in (("* alone", self.neutral), ("all", self.verdicts)):
            rows.append(f"{text:18}" + "".join(f"{counter[c]:12}" for c in columns))
        rows.append(f"thrown away, for they do not run: {self.thrown_away} more")
        return "\n".join(rows)


def fuzz(
    seeds: range, form: str | None = None, only: str | None = None,
    tell: Callable[[Result], None] = lambda _: None, stop: bool = False,
) -> Statistics:  # fmt: skip
    """Run the cases of ``seeds``; ``stop`` at the first fault."""
    statistics = Statistics()
    with quiet():
        for seed in seeds:
            result = run_case(seed, form, only)
            statistics.add(result)
            tell(result)
            if stop and statistics.faults:
                break
    return statistics


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="how many cases")
    parser.add_argument("--seed", type=int, default=0, help="the first case's")
    parser.add_argument("--form", choices=BASES, help="start from this graph only")
    parser.add_argument("--only", choices=MUTATIONS, help="this mutation only")
    parser.add_argument("--show", action="store_true", help="print every mutated graph")
    args = parser.parse_args(argv)

    def tell(result: Result) -> None:
        if args.show:
            print(result.graph or "no program", "\n")
            print(result.verdict, *result.reasons, sep="\n  ")
        if args.show or result.verdict == "FAULT":
            print(result, "\n", flush=True)

    before = time.process_time()
    statistics = fuzz(range(args.seed, args.seed + args.count), args.form, args.only, tell)
    print(statistics)
    print(f"{time.process_time() - before:.0f} CPU seconds")
    return 1 if statistics.faults else 0


if __name__ == "__main__":
    sys.exit(main())
