"""The pipeline: the passes that run on a captured graph, their order, and the reason for it."""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping
from typing import Any

from torch import fx

from mxfp4_fx.core import torch_private, torch_private_dynamo
from mxfp4_fx.core.errors import PipelineError
from mxfp4_fx.core.options import Options
from mxfp4_fx.passes.canonicalize import canonicalize
from mxfp4_fx.passes.context import REWRITE, Context, Pass
from mxfp4_fx.passes.copies import copy_graph
from mxfp4_fx.passes.enter_regions import enter_regions
from mxfp4_fx.passes.fuse_attention import fuse_attention
from mxfp4_fx.passes.fuse_moe import fuse_moe
from mxfp4_fx.passes.localize import localize
from mxfp4_fx.passes.lower_linears import lower_linears
from mxfp4_fx.passes.lower_moe import lower_moe
from mxfp4_fx.passes.quantize_linears import quantize_linears

log = logging.getLogger("mxfp4_fx.passes")


def check(gm: fx.GraphModule, ctx: Context) -> None:
    """Last pass: check that no logical op is left and that every swizzled input is read."""
    for node in gm.graph.nodes:
        if REWRITE in node.meta:
            raise PipelineError(f"{node} was not lowered")
    placeholders = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    for name in (name for binding in ctx.bindings for name in binding.inputs):
        if name not in placeholders or not placeholders[name].users:
            raise PipelineError(f"the swizzled weight {name} is not read")
    for rewrite in ctx.report.rewrites:
        if not rewrite.kernels:
            raise PipelineError(f"{rewrite.layer} was rewritten and has no kernels")
    gm.graph.lint()


def rewrite_regions(gm: fx.GraphModule, ctx: Context) -> None:
    """Eighth pass: the whole pipeline for the bodies of regions; see ``enter_regions.py``."""
    enter_regions(gm, ctx, _rewrite_body)


PIPELINE: tuple[Pass, ...] = (
    localize,  # to_local() is no computation, and all others ask whether an input is a parameter
    canonicalize,  # equal computations look alike ...
    fuse_moe,  # ... so that one pattern finds them; proves and replaces, knows no device
    lower_moe,  # knows the device, proves nothing
    fuse_attention,  # before the linears change, which may change nothing that it matches
    quantize_linears,  # after lower_moe, whose ops show which linears are routers
    lower_linears,  # the linears that are left; after fuse_moe, whose forms have linears
    rewrite_regions,  # after lower_moe, so that both bind a weight that both read once
    check,  # relies on no other pass
)


def run_pipeline(
    gm: fx.GraphModule,
    inputs: list[Any],
    options: Options,
    *,
    left: Mapping[int, str | None] | None = None,
    verifying: bool = False,
) -> tuple[fx.GraphModule, Context]:
    """Run all passes on a copy of a captured graph.

    Args:
        gm: the graph that Dynamo captured; it does not change.
        inputs: its example inputs, the model's own parameters among them.
        options: the user's options.
        left, verifying: see :class:`Context`.

    Returns:
        The rewritten graph, or ``gm`` itself if the passes rewrote nothing; and the context, which
        holds the report.
    """
    ctx = Context(options, inputs, left or {}, verifying)
    with torch_private_dynamo.timed("mxfp4_fx.passes"):
        rewritten = copy_graph(gm)
        for step in PIPELINE:
            run_pass(step, rewritten, ctx)
    return (rewritten if ctx.report.changes_graph else gm), ctx


def _rewrite_body(body: fx.GraphModule, ctx: Context) -> fx.GraphModule:
    """Run all passes on a copy of a region's body and return it."""
    rewritten = copy_graph(body)
    for node, value in ctx.values(rewritten.graph).items():
        # Dynamo's note is about the body's first call.
        torch_private.note_on_weight(node, value is not None)
    for step in PIPELINE:
        run_pass(step, rewritten, ctx)
    return rewritten


def run_pass(step: Pass, gm: fx.GraphModule, ctx: Context) -> None:
    """Run one pass; ``TORCH_LOGS="+mxfp4_fx"`` shows the changes, ``TORCH_TRACE`` the graphs."""
    before = _op_counts(gm)
    _trace(f"before_{step.__name__}", gm)
    with torch_private_dynamo.timed(f"mxfp4_fx.{step.__name__}"):
        step(gm, ctx)
        gm.recompile()
    _trace(f"after_{step.__name__}", gm)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s: %s", step.__name__, _difference(before, _op_counts(gm)))


def _op_counts(gm: fx.GraphModule) -> collections.Counter[str]:
    return collections.Counter(_label(n) for n in gm.graph.nodes if n.op.startswith("call_"))


def _label(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return f".{node.target}"
    return getattr(node.target, "__name__", str(node.target))


def _difference(before: collections.Counter[str], after: collections.Counter[str]) -> str:
    changes = {op: after[op] - before[op] for op in sorted({*before, *after})}
    shown = ", ".join(f"{op} {n:+d}" for op, n in changes.items() if n)
    return f"{before.total()} -> {after.total()} calls" + (f" ({shown})" if shown else "")


def _trace(name: str, gm: fx.GraphModule) -> None:
    torch_private.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"mxfp4_fx_{name}", "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False),
    )
