"""The Dynamo entry point: ``torch.compile(model, backend="mxfp4")``."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.compiler import config
from torch.utils.weak import WeakTensorKeyDictionary

from mxfp4_fx import calls
from mxfp4_fx.core import (
    compilation,
    profiling,
    ranks,
    torch_private,
    torch_private_dynamo,
    torch_private_forget,
)
from mxfp4_fx.core.errors import FreedWeightError
from mxfp4_fx.core.options import Options
from mxfp4_fx.core.torch_private_distributed import is_dtensor, shard_of
from mxfp4_fx.huggingface import region_choice
from mxfp4_fx.huggingface.capture import prepare_capture
from mxfp4_fx.ops.fingerprint import fingerprint
from mxfp4_fx.ops.program import Program
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.native_program import program_of
from mxfp4_fx.passes.native_values import NoProgram
from mxfp4_fx.passes.pipeline import run_pipeline
from mxfp4_fx.passes.region_sizes import settle_sizes
from mxfp4_fx.passes.report import GraphReport
from mxfp4_fx.weights.bindings import InputPlan
from mxfp4_fx.weights.freed import is_freed

log = logging.getLogger("mxfp4_fx.backend")

CompiledGraph = Callable[..., Any]
# From a captured graph's inputs to those of other calls; None if not all are known.
OtherInputs = Callable[[Sequence[Any]], "list[tuple[Any, ...]] | None"]


@compilation.ours
def mxfp4(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledGraph:
    """Compile a captured graph with its experts in MXFP4.

    The function is registered as backend ``"mxfp4"``; call it through ``torch.compile``. It is
    always the same object, so that Dynamo finds code compiled earlier with the same options.

    Args:
        gm: the graph as Dynamo captured it.
        example_inputs: real inputs, the model's own parameters among them.
        mode: the mode of ``torch.compile``, which Inductor gets.
        options: see :class:`mxfp4_fx.options.Options`.

    Raises:
        OptionError: an option is unknown or has a bad value.
        MissedRewriteError: with ``strict=True``, the passes report a miss.
    """
    return compile_graph(gm, example_inputs, Options.parse(options, mode))


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    others: OtherInputs | None = None,
) -> CompiledGraph:
    """Compile a captured graph: see :func:`mxfp4`.

    Args:
        gm, example_inputs: as for :func:`mxfp4`.
        options: the parsed options.
        others: finds what the graph gets in the other calls that it will serve, if these are known.
    """
    example_inputs = settle_sizes(gm, example_inputs)
    torch_private_forget.forget_source_with(gm)
    rewritten, ctx = analyze(gm, example_inputs, options)
    refuse_freed(gm, rewritten, ctx)
    announce(ctx)
    sources = torch_private_forget.sources()
    is_verified = options.verify and ctx.report.attention
    has_shards = rewritten is not gm and ctx.shards
    if not (ctx.bindings or is_verified or has_shards):  # with the captured graph's inputs
        compiled = compile_inner(rewritten, example_inputs, options)
    else:
        compiled = bind(gm, rewritten, ctx, options, others)
    torch_private_forget.forget_sources_with(rewritten, sources)
    return noted(compiled, ctx.report)


def analyze(
    gm: fx.GraphModule, inputs: list[Any], options: Options
) -> tuple[fx.GraphModule, Context]:
    """Run the pipeline for the call that the graph was captured in; see :func:`run_pipeline`.

    Raises:
        OptionError: ``options["skip"]`` names experts that the model does not have.
    """
    call = calls.current()
    left = None
    if call is not None:
        call.called.check_skip()
        left = call.called.left_inputs(inputs)
    found = run_pipeline(gm, inputs, options, left=left)
    found[1].report.notes += region_choice.notes(gm)
    return found


def noted(compiled: CompiledGraph, report: GraphReport) -> CompiledGraph:
    """Wrap a compiled graph with experts so that it passes its report to the call it runs in."""
    if not (report.rewrites or report.misses):
        return compiled

    def run(*args: Any) -> Any:
        call = calls.current()
        if call is None:
            return compiled(*args)
        call.ran(report, args)
        try:
            return compiled(*args)
        except Exception as error:
            found = call.renamed(report, args)
            names = [one.layer for one in found.rewrites] + [one.layer for one in found.misses]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            ranks.note(error, f"in the graph of {names[0]}{more}")
            raise

    return run


def refuse_freed(captured: fx.GraphModule, rewritten: fx.GraphModule, ctx: Context) -> None:
    """Raise if a rewritten graph still reads a freed weight, whose memory is gone.

    Raises:
        FreedWeightError: an input with users is a freed parameter.
    """
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
    captured: fx.GraphModule,
    lowered: fx.GraphModule,
    ctx: Context,
    options: Options,
    others: OtherInputs | None = None,
) -> CompiledGraph:
    """Compile a lowered graph; the result takes the captured graph's inputs."""
    plan = plan_inputs(captured, lowered, ctx)
    known = others(ctx.inputs) if others else None
    fakes = [n.meta.get("example_value") for n in lowered.graph.find_nodes(op="placeholder")]
    with plan.swizzling_ahead(
        tuple(ctx.inputs),
        *(known or ()),
        is_quiet=options.inner == "inductor"
        and torch_private_dynamo.inductor_measures(options.mode, options.inductor),
        are_freed=options.free_weights,
    ):
        compiled = compile_inner(lowered, plan.examples(ctx.inputs, fakes), options)
    if options.free_weights:
        # Freeing changes a parameter's class, which Dynamo guards when this function has returned.
        # Its guards must hold for all that the graph will serve, now and when all is freed.
        if known is not None:
            plan.free_together([tuple(ctx.inputs), *known])

        def run_and_free(*args: Any) -> Any:
            plan.free(args)
            return _run(compiled, plan, args)

        return run_and_free

    def run(*args: Any) -> Any:
        return _run(compiled, plan, args)

    if not options.verify:
        return run
    verifying, verifying_ctx = run_pipeline(
        captured, ctx.inputs, options, left=ctx.left, verifying=True
    )
    refuse_freed(captured, verifying, verifying_ctx)
    verifying_plan = plan_inputs(captured, verifying, verifying_ctx)
    # One graph may serve many layers: each is compared in its own first call.
    verified = WeakTensorKeyDictionary()
    report = ctx.report
    counts = len(report.rewrites), len(report.attention), len(report.mxfp8)
    weights = [binding.slots[0] for binding in plan.bindings]
    weights += [at for attention in ctx.report.attention for at in attention.inputs]
    any_layer = torch.empty(0)

    def verify_first(*args: Any) -> Any:
        weight = args[weights[0]] if weights else any_layer
        if is_dtensor(weight):  # swap_tensors, by which it moves, refuses what has weak references
            weight = shard_of(weight)
        if weight in verified:
            return run(*args)
        result = verifying.forward(*verifying_plan.inputs(args))
        verified[weight] = True
        log.info("verified %d rewritten layers, %d attentions and %d linears", *counts)
        return result

    return verify_first


def _run(compiled: CompiledGraph, plan: InputPlan, args: tuple[Any, ...]) -> Any:
    """Run a lowered graph; while a profiler runs, its weights have the names of their layers."""
    inputs = plan.inputs(args)
    if profiling.is_on():
        call = calls.current()
        for swizzled, name in plan.names(args, inputs, call.called.names if call else {}):
            profiling.name(swizzled, name)
    return compiled(*inputs)


def plan_inputs(captured: fx.GraphModule, lowered: fx.GraphModule, ctx: Context) -> InputPlan:
    """Return the map from the captured graph's inputs to the lowered graph's."""
    names = _input_names(captured), _input_names(lowered)
    return InputPlan(*names, ctx.bindings, ctx.shards, _is_lent, _tell_of_lent, _is_shared, _caller)


def _is_lent(tensor: Tensor) -> bool:
    """Return whether a weight is loaded for the current call alone."""
    call = calls.current()
    return call is not None and call.called.is_lent(tensor)


def _is_shared(tensor: Tensor) -> bool:
    """Return whether a linear's weight has readers besides it, as far as is known."""
    call = calls.current()
    return call is None or call.called.is_shared(tensor)


def _tell_of_lent() -> None:
    """Warn once of the experts whose weights are loaded for the current call alone."""
    call = calls.current()
    if call is not None:
        call.tell_of_offloaded()


def _caller() -> Any:
    """Return the model or the function that is called now, or None."""
    call = calls.current()
    return None if call is None else call.caller()


def _input_names(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.find_nodes(op="placeholder")]


def compile_inner(gm: fx.GraphModule, inputs: list[Any], options: Options) -> CompiledGraph:
    """Compile a graph with the inner compiler."""
    if options.inner != "inductor":
        inner = options.inner
        backend = torch_private_dynamo.backend_named(inner) if isinstance(inner, str) else inner
        compiled: CompiledGraph = backend(gm, inputs)
        return compiled

    def by_inductor(without_headers: bool) -> CompiledGraph:
        # Torch's caches outlive this version of the package, and hold no programs.
        tag = f"{config.cache_key_tag}{fingerprint()}{options.programs}"
        # Who sets options of Inductor wants Inductor.
        instead = _program_of if options.programs and not options.inductor else None
        with contextlib.ExitStack() as settings:
            settings.enter_context(config.patch(cache_key_tag=tag))  # type: ignore[attr-defined]
            if without_headers:
                settings.enter_context(torch_private_dynamo.without_precompiled_headers())
            compiled: CompiledGraph = torch_private_dynamo.compile_with_inductor(
                gm, inputs, options.mode, options.inductor, instead
            )
        return compiled

    without_headers = _headers_are_broken.is_set()
    try:
        return by_inductor(without_headers)
    except Exception as error:
        # Torch survives a broken entry of its caches, but neither a broken file that an entry names
        # nor a header whose precompilation was ended by force.
        cache: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if _is_of_a_file(error):
            cache, told = torch_private_dynamo.empty_caches(), _BROKEN_CACHE
        elif not without_headers and any(
            map(torch_private_dynamo.is_of_cpp_compiler, _chain(error))
        ):
            without_headers, told = True, _BROKEN_HEADER
        else:
            raise
        with cache:
            try:
                compiled = by_inductor(without_headers)
            except Exception:
                raise error from None
        if without_headers:
            _headers_are_broken.set()
        log.warning("%s. The error was: %s", told, error)
        return compiled


_headers_are_broken = threading.Event()  # other graphs need not find it out, too

_BROKEN_CACHE = (
    "torch's compile cache seems to be broken: with an empty one the graph compiles. Remove its "
    "directory (TORCHINDUCTOR_CACHE_DIR, or torchinductor_USER among the temporary files), or each "
    "start compiles again"
)
_BROKEN_HEADER = (
    "torch's precompiled C++ headers seem to be broken: without them the graph compiles. Remove "
    "their directory (torchinductor_USER/precompiled_headers among the temporary files), or each "
    "start compiles again"
)


def _program_of(graph: fx.GraphModule, examples: Sequence[Any]) -> Program | None:
    """Return a native program that computes a graph of ATen's ops, if one can."""
    try:
        program = program_of(graph, examples)
    except NoProgram as why:
        log.debug("Inductor compiles the graph: it becomes no native program, because %s", why)
        return None
    log.info("the graph becomes a native program of %d instructions", len(program))
    return program


def _is_of_a_file(error: BaseException) -> bool:
    """Return whether an error, or one inside it, may come from loading a broken file.

    A library raises OSError or ImportError, Python code any of the others.
    """
    kinds = (OSError, ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError)
    is_unparsed = torch_private_dynamo.is_of_unparsed_code
    return any(isinstance(one, kinds) or is_unparsed(one) for one in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those inside it: Inductor wraps errors."""
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__


def announce(ctx: Context) -> None:
    """Log rewrites and misses; warn once of each miss, or raise with ``strict``."""
    lines = _lines(ctx.report)
    for line in lines:
        log.info("%s", line)
    torch_private.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "mxfp4_fx_layers", "encoding": "string"},
        payload_fn=lambda: "\n".join(lines),
    )
    # A backend that is called directly has no call; the report then covers this graph alone.
    call = calls.current() or calls.Call(ctx.options)
    call.announce(ctx.report, ctx.inputs)
    call.announce_linears(ctx.report, ctx.inputs)


def _lines(report: GraphReport) -> list[str]:
    """Return what became of each layer of a graph, for the log and for ``TORCH_TRACE``."""
    return [
        *(f"{one.layer}: {one.form} -> MXFP4, {one.kernels} kernels" for one in report.rewrites),
        *(
            f"{one.layer}: attention with sinks -> memory linear in its length"
            for one in report.attention
        ),
        *(f"attention with sinks stays as it is: {miss}" for miss in report.attention_misses),
        *([f"{report.linears} linears -> native kernels for few rows"] if report.linears else []),
        *(f"{one.layer}: linear -> MXFP8, {one.kernels} kernels" for one in report.mxfp8),
        *(f"not in MXFP8: {miss}" for miss in report.linear_misses),
        *report.notes,
        *(f"not rewritten: {miss}" for miss in report.misses),
    ]


# For set_stance(force_backend="mxfp4"), which compiles without a Call. Before each frame, the
# capture is prepared again, but that comes too late for the frame of a forward that it replaces.
prepare_capture()
