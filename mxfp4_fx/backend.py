"""The Dynamo entry point: ``torch.compile(model, backend="mxfp4")``."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from tqdm import tqdm

from mxfp4_fx import calls
from mxfp4_fx.core import compilation, torch_private
from mxfp4_fx.core.errors import FreedWeightError
from mxfp4_fx.core.options import Options
from mxfp4_fx.huggingface.capture import prepare_capture
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.pipeline import run_pipeline
from mxfp4_fx.passes.report import GraphReport
from mxfp4_fx.weights.freed import is_freed
from mxfp4_fx.weights.source import Mark, mark_of
from mxfp4_fx.weights.store import STORE, warn_of_repeats

log = logging.getLogger("mxfp4_fx.backend")

CompiledGraph = Callable[..., Any]


@compilation.ours
def mxfp4(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledGraph:
    """Compile a captured graph with its GPT-OSS experts in MXFP4.

    Registered as backend ``"mxfp4"``; call it through ``torch.compile``. There is one object of it,
    so that compiling again with the same options finds the code that is compiled already.

    Args:
        gm: the graph as Dynamo captured it.
        example_inputs: real inputs, the model's own parameters among them.
        mode: ``torch.compile``'s mode; reaches Inductor.
        options: see :class:`mxfp4_fx.options.Options`.

    Raises:
        OptionError: an option is unknown or has a bad value.
        MissedRewriteError: with ``strict=True``, something stays as it was.
    """
    parsed = Options.parse(options, mode)
    rewritten, ctx = analyze(gm, example_inputs, parsed)
    refuse_freed(gm, rewritten, ctx)
    announce(ctx)
    if rewritten is gm:
        compiled = compile_inner(gm, example_inputs, parsed)
    else:
        compiled = bind(gm, rewritten, ctx, parsed)
    return noted(compiled, ctx.report)


def analyze(
    gm: fx.GraphModule, inputs: list[Any], options: Options
) -> tuple[fx.GraphModule, Context]:
    """Run the pipeline for the call that the graph was captured in; see :func:`run_pipeline`.

    Raises:
        OptionError: ``options["skip"]`` names what the model does not have.
    """
    call = calls.current()
    if call is not None:
        call.check_skip()
    return run_pipeline(gm, inputs, options, left=call.left_inputs(inputs) if call else None)


def noted(compiled: CompiledGraph, report: GraphReport) -> CompiledGraph:
    """A compiled graph that tells the call which it runs in of the experts that it has."""
    if not (report.rewrites or report.misses):
        return compiled

    def run(*args: Any) -> Any:
        call = calls.current()
        if call is not None:
            call.ran(report, args)
        return compiled(*args)

    return run


def refuse_freed(captured: fx.GraphModule, rewritten: fx.GraphModule, ctx: Context) -> None:
    """A graph that reads a freed weight as it was would read memory that is not there."""
    reads = {n.name for n in rewritten.graph.find_nodes(op="placeholder") if n.users}
    for node, value in zip(captured.graph.find_nodes(op="placeholder"), ctx.inputs, strict=True):
        if is_freed(value) and node.name in reads:
            why = "".join(f"\n  not rewritten: {miss}" for miss in ctx.report.misses)
            raise FreedWeightError(
                f"{value!r} was freed by options={{'free_weights': True}} when it was compiled "
                f"before, but this graph needs it ({node.name}). mxfp4_fx.restore(model) gives "
                f"freed weights their memory again.{why}"
            )


def bind(
    captured: fx.GraphModule, lowered: fx.GraphModule, ctx: Context, options: Options
) -> CompiledGraph:
    """Compile a lowered graph; the result takes the captured graph's inputs."""
    plan = InputPlan(captured, lowered, ctx)
    compiled = compile_inner(lowered, plan.examples(lowered, ctx), options)
    if options.free_weights:

        def run_and_free(*args: Any) -> Any:
            # Not while compiling: Dynamo guards a parameter's class, which freeing changes, and the
            # guards that it is about to make must hold for the other layers, or models, too.
            _free(plan, args)
            return compiled(*plan.inputs(args))

        return run_and_free

    _swizzle_ahead(plan, ctx)

    def run(*args: Any) -> Any:
        return compiled(*plan.inputs(args))

    if not options.verify:
        return run
    verifying, verifying_ctx = run_pipeline(
        captured, ctx.inputs, options, left=ctx.left, verifying=True
    )
    refuse_freed(captured, verifying, verifying_ctx)
    verifying_plan = InputPlan(captured, verifying, verifying_ctx)
    verified, layers = False, len(ctx.report.rewrites)

    def verify_first(*args: Any) -> Any:
        nonlocal verified
        if verified:
            return run(*args)
        result = verifying.forward(*verifying_plan.inputs(args))
        verified = True
        log.info("verified %d rewritten layers", layers)
        return result

    return verify_first


class InputPlan:
    """Where a lowered graph's inputs come from: the captured graph's inputs, swizzled or not.

    Swizzled weights are looked up at every call, by the parameters that the call brings. It lives
    as long as the compiled code, which may outlive the model: it holds positions, no tensors.
    """

    def __init__(self, captured: fx.GraphModule, lowered: fx.GraphModule, ctx: Context) -> None:
        slots = {n.name: i for i, n in enumerate(captured.graph.find_nodes(op="placeholder"))}
        placeholders = lowered.graph.find_nodes(op="placeholder")
        bindings = [ctx.bindings.get(node.name) for node in placeholders]
        # Swizzled weights: the captured graph's inputs that each is made from, layout and name.
        self.swizzled = sorted({(b.sources, b.layout, b.name) for b in bindings if b})
        # For each input: one of the captured graph's as it is, or a swizzled weight and its part.
        self._inputs: list[tuple[int, None] | tuple[int, int]] = [
            (self.swizzled.index((b.sources, b.layout, b.name)), b.part)
            if b
            else (slots[node.name], None)
            for node, b in zip(placeholders, bindings, strict=True)
        ]
        self.as_they_are = {at for at, part in self._inputs if part is None}
        # What the last call that had to swizzle was called with, and how many in a row had others.
        self._last: list[weakref.ref[Mark]] = []
        self._strangers = 0

    def examples(self, lowered: fx.GraphModule, ctx: Context) -> list[Any]:
        """Example inputs for the inner compiler; swizzled weights are fake."""
        placeholders = lowered.graph.find_nodes(op="placeholder")
        return [
            ctx.inputs[at] if part is None else node.meta["example_value"]
            for node, (at, part) in zip(placeholders, self._inputs, strict=True)
        ]

    def inputs(self, args: tuple[Any, ...]) -> list[Any]:
        """The lowered graph's inputs for a call of the captured one with ``args``."""
        # Freed parameters go by the road of all others, past their own class's veto.
        with torch_private.as_plain_tensors():
            before = STORE.swizzled
            parts = self._look_up(args)
            if STORE.swizzled != before:
                self._look_out(args)
                parts = self._look_up(args)  # what shares memory may have turned out to be stale
        return [args[at] if part is None else parts[at][part] for at, part in self._inputs]

    def _look_up(self, args: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
        return [
            STORE.get(args[at[0]], layout, args[at[1]] if len(at) == 2 else None, name)
            for at, layout, name in self.swizzled
        ]

    def _look_out(self, args: tuple[Any, ...]) -> None:
        """Tell if each call brings tensors that no earlier one brought, and that do not last."""
        are_gone = bool(self._last) and all(mark() is None for mark in self._last)
        self._strangers = self._strangers + 1 if are_gone else 0
        self._last = [weakref.ref(mark_of(args[at[0]])) for at, _, _ in self.swizzled]
        if self._strangers == 2:
            warn_of_repeats(
                self.swizzled[0][2], "every call brings another tensor, and the last one is gone"
            )


_TITLE = "mxfp4: swizzling expert weights"


def _pair(inputs: Sequence[Any], sources: tuple[int, ...]) -> tuple[Any, Any]:
    """The weight and the scales, if there are, that ``sources`` are the indices of."""
    return inputs[sources[0]], inputs[sources[1]] if len(sources) == 2 else None


def _swizzle_ahead(plan: InputPlan, ctx: Context) -> None:
    """Swizzle while compiling, with a progress bar, rather than in the first call."""
    for sources, layout, name in tqdm(plan.swizzled, _TITLE, leave=False, disable=None):
        weight, scales = _pair(ctx.inputs, sources)
        if isinstance(weight, Tensor) and not isinstance(weight, torch_private.FakeTensor):
            STORE.get(weight, layout, scales, name)


def _free(plan: InputPlan, args: tuple[Any, ...]) -> None:
    """Swizzle what is not, and give each source's memory back before the next one is swizzled."""
    found = []
    for sources, layout, name in plan.swizzled:
        weight, scales = _pair(args, sources)
        if STORE.can_free(weight, layout, scales) and not set(sources) & plan.as_they_are:
            found.append((weight, layout, scales, name))
    if found:
        for one in tqdm(found, _TITLE, leave=False, disable=None):
            STORE.free(*one)


def compile_inner(gm: fx.GraphModule, inputs: list[Any], options: Options) -> CompiledGraph:
    """Hand a graph to the inner compiler."""
    if options.inner != "inductor":
        inner = options.inner
        backend = torch_private.backend_named(inner) if isinstance(inner, str) else inner
        compiled: CompiledGraph = backend(gm, inputs)
        return compiled
    by_inductor: CompiledGraph = torch_private.compile_with_inductor(
        gm, inputs, options.mode, options.inductor
    )
    return by_inductor


def announce(ctx: Context) -> None:
    """Log what the passes found; warn of misses, once each, or raise with ``strict``."""
    for rewrite in ctx.report.rewrites:
        log.info("%s: %s -> MXFP4, %s kernels", rewrite.layer, rewrite.form, rewrite.kernels)
    for miss in ctx.report.misses:
        log.info("not rewritten: %s", miss)
    # Called by hand, the backend has a graph and no model; the graph is then all that is judged.
    (calls.current() or calls.Call(ctx.options)).announce(ctx.report, ctx.inputs)


# For those who come without a call: set_stance(force_backend="mxfp4").
prepare_capture()
