"""``explain``: which layers of a model are rewritten, with which kernels, which not, and why."""

from __future__ import annotations

import contextvars
import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from mxfp4_fx import calls, page
from mxfp4_fx.backend import analyze, bind, refuse_freed
from mxfp4_fx.core import compilation, ranks, torch_private, torch_private_dynamo
from mxfp4_fx.core.console import size_in_words
from mxfp4_fx.core.errors import Mxfp4Error
from mxfp4_fx.core.options import Options
from mxfp4_fx.ops.operands import ALPHA, LIMIT, UP_OFFSET
from mxfp4_fx.page import in_mxfp8
from mxfp4_fx.passes.listing import GraphChange
from mxfp4_fx.passes.report import Attention, Miss, QuantizedLinear, Rewrite
from mxfp4_fx.weights.freed import is_freed

PATIENCE = 60.0  # seconds; ranks that run a program together come to a call within some

# Where the graphs that an ``explain`` captures are written down.
_changes: contextvars.ContextVar[list[GraphChange] | None] = contextvars.ContextVar(
    "changes", default=None
)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What ``backend="mxfp4"`` does with a model; ``print`` it for the table.

    Attributes:
        graphs: how many graphs Dynamo captured; more than one means graph breaks.
        rewrites: the layers that become MXFP4.
        misses: the layers that look like experts and stay as they are.
        notes: what else the user should know.
        linears: how many linears native kernels compute if they have few rows.
        mxfp8: the linears that read their weights in MXFP8, with ``options["linears"] = "mxfp8"``.
        linear_misses: the linears that should and stay exact, without the routers'.
        attention: the attentions with sinks that become one op, of memory linear in the tokens.
        attention_misses: what looks like attention with sinks on a CPU and stays as it is.
        changes: each captured graph as text, before and after the passes; only HTML shows it.
        rounding_errors: experts, as the checkpoint names them -> the norm of what their rounding to
            MXFP4 changed, divided by the norm of the weights, if ``quantize`` recorded it.
    """

    graphs: int
    rewrites: tuple[Rewrite, ...]
    misses: tuple[Miss, ...]
    notes: tuple[str, ...] = ()
    linears: int = 0
    attention: tuple[Attention, ...] = ()
    attention_misses: tuple[Miss, ...] = ()
    changes: tuple[GraphChange, ...] = dataclasses.field(default=(), repr=False, compare=False)
    mxfp8: tuple[QuantizedLinear, ...] = ()
    linear_misses: tuple[Miss, ...] = ()
    rounding_errors: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def bytes_before(self) -> int:
        """Bytes of the rewritten layers' expert weights, as the model holds them."""
        return sum(rewrite.bytes_before for rewrite in self.rewrites)

    @property
    def bytes_after(self) -> int:
        """Bytes of the same weights as swizzled MXFP4."""
        return sum(rewrite.bytes_after for rewrite in self.rewrites)

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as dicts, lists, strings and numbers."""
        return {
            "graphs": self.graphs,
            "rewrites": [_data(rewrite) for rewrite in self.rewrites],
            "misses": [_data(miss) for miss in self.misses],
            "notes": [*self.notes],
            "linears": self.linears,
            "mxfp8": [_data(linear) for linear in self.mxfp8],
            "linear_misses": [_data(miss) for miss in self.linear_misses],
            "attention": [_data(attention) for attention in self.attention],
            "attention_misses": [_data(miss) for miss in self.attention_misses],
            "rounding_errors": dict(self.rounding_errors),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the explanation as one HTML file, which needs no other file and no network.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(page.page(self.to_dict(), self.changes), encoding="utf-8")

    def _repr_html_(self) -> str:
        """Return the same for a notebook, which shows it in the place of the object."""
        return page.fragment(self.to_dict(), self.changes)

    def __str__(self) -> str:
        found = len(self.rewrites) + len(self.misses)
        lines = [f"{len(self.rewrites)} of {found} MoE layers rewritten, {_graphs(self.graphs)}"]
        if self.rewrites:
            header = ("layer", "form", "experts", "kernels (layout)", "before", "after")
            rows = [_row(rewrite) for rewrite in self.rewrites]
            total = (
                "total",
                "",
                "",
                "",
                size_in_words(self.bytes_before),
                size_in_words(self.bytes_after),
            )
            lines += _table([header, *rows, total])
            lines += dict.fromkeys(f"{_target(r)}: {r.reason}" for r in self.rewrites)
            lines += dict.fromkeys(f"{_target(r)}: {r.travel}" for r in self.rewrites if r.travel)
            lines += dict.fromkeys(filter(None, map(_activation, self.rewrites)))
            lines += dict.fromkeys(r.router for r in self.rewrites if r.router)
        for miss in self.misses:
            lines += [f"not rewritten: {miss.layer}", f"  {miss.reason}"]
            lines += [f"  at {miss.where}"] if miss.where else []
        if not found:
            lines.append("nothing in it looks like a mixture of experts")
        if self.attention:
            count = len(self.attention)
            lines.append(f"{count} attentions with sinks: memory linear in the prompt's length")
        for miss in self.attention_misses:
            lines += [f"attention with sinks as it was: {miss.layer}", f"  {miss.reason}"]
            lines += [f"  at {miss.where}"] if miss.where else []
        if self.mxfp8:
            lines.append(in_mxfp8(self.to_dict()["mxfp8"]))
        for miss in self.linear_misses:
            lines += [f"not in MXFP8: {miss.layer}", f"  {miss.reason}"]
            lines += [f"  at {miss.where}"] if miss.where else []
        if self.linears:
            lines.append(f"{self.linears} linears: native while they have few rows")
        for experts, error in self.rounding_errors.items():
            lines.append(f"{experts}: rounding changed the weights by {error:.2%}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Explanation:
    """Capture ``model(*args, **kwargs)`` and return what the backend would do with it.

    The model runs once, without being quantized or compiled further. Freed weights are read where
    the store has them. Gradient mode matters: outside ``torch.no_grad()``, experts whose weights
    require a gradient are not rewritten.

    Args:
        model: a module or function; the result of ``torch.compile`` is unwrapped.
        args, kwargs: its inputs.
        options: as for ``torch.compile(backend="mxfp4", options=...)``.
        dynamic: as for ``torch.compile``.

    Raises:
        Mxfp4Error: the model is spread over processes, and not all of them call this.
    """
    model = torch_private.unwrapped(model)
    chosen = dict(options) if options else None
    # Recompilations are counted apart: Dynamo's limit applies as in a fresh process, and the user's
    # own compilations lose none of theirs.
    isolated: dict[str, Any] = (
        {"isolate_recompiles": True} if torch_private_dynamo.can_isolate() else {}
    )
    modules = [*model.modules()] if isinstance(model, torch.nn.Module) else []
    _require_all_ranks(modules)
    changes: list[GraphChange] = []
    token = _changes.set(changes)
    try:
        with calls.observed() as found, torch_private.without_compiled_calls(modules):
            run = torch.compile(
                model, backend=_collect, dynamic=dynamic, options=chosen, **isolated
            )
            run(*args, **kwargs)
    finally:
        _changes.reset(token)
    rewrites = tuple(r for report in found.graphs for r in report.rewrites)
    misses = (*(m for report in found.graphs for m in report.misses), *found.outside)
    of_graphs = [note for report in found.graphs for note in report.notes]
    notes = tuple(dict.fromkeys([*found.notes, *of_graphs]))
    linears = sum(report.linears for report in found.graphs)
    attention = tuple(one for report in found.graphs for one in report.attention)
    others = dict.fromkeys(miss for report in found.graphs for miss in report.attention_misses)
    return Explanation(
        len(found.graphs),
        rewrites,
        tuple(dict.fromkeys(misses)),
        notes,
        linears,
        attention,
        tuple(others),
        tuple(changes),
        tuple(dict.fromkeys(one for report in found.graphs for one in report.mxfp8)),
        tuple(dict.fromkeys(miss for report in found.graphs for miss in report.linear_misses)),
    )


def _require_all_ranks(modules: list[torch.nn.Module]) -> None:
    """Wait for the ranks that run a model together, and raise an error if some do not come."""
    together = ranks.of_model(modules)
    if not together:
        return
    try:
        ranks.gather("explain", together, PATIENCE)
    except ranks.Absent as absent:
        raise Mxfp4Error(
            f"explain(...) runs the model once, which is spread over {ranks.named(together)}, and "
            f"within {absent.seconds:.0f} seconds {ranks.named(absent.ranks)} did not call it: "
            "call it on every rank, with the same arguments, and print it on one"
        ) from absent


@compilation.ours
def _collect(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Run the pipeline for its report; return a function that runs the captured graph.

    If weights are freed, it runs the rewritten graph, because only that can. It reports to the
    current call each time it *runs*, because one graph may serve many layers.
    """
    rewritten, ctx = analyze(gm, example_inputs, Options.parse(options))
    changes = _changes.get()
    if changes is not None:
        changes.append(GraphChange.of(gm, rewritten))
    report = ctx.report  # the context holds the model's parameters and must not live on
    graph = gm.forward
    if any(map(is_freed, example_inputs)):
        refuse_freed(gm, rewritten, ctx)
        graph = bind(gm, rewritten, ctx, Options(inner="eager"))

    def run(*args: Any) -> Any:
        call = calls.current()
        if call is not None:
            call.ran(report, args)
        return graph(*args)

    return run


def _data(item: Rewrite | Miss | Attention | QuantizedLinear) -> dict[str, Any]:
    """Return an item as data; JSON has no infinity, so None stands for no limit."""
    data = {name: value for name, value in dataclasses.asdict(item).items() if name != "inputs"}
    return {name: None if value == math.inf else value for name, value in data.items()}


def _activation(rewrite: Rewrite) -> str:
    """Return the experts' activation in words, or "" for GPT-OSS's."""
    alpha, limit, offset = rewrite.alpha, rewrite.limit, rewrite.up_offset
    if rewrite.activation == "relu2":
        return "activation: relu(up)^2, without a gate"
    if (rewrite.activation, alpha, limit, offset) == ("swiglu", ALPHA, LIMIT, UP_OFFSET):
        return ""
    of_gate = "silu(gate)" if alpha == 1 else f"gate * sigmoid({alpha:g} * gate)"
    if rewrite.activation == "geglu_tanh":
        of_gate = "gelu(gate), in its tanh form"
    up = f"(up + {offset:g})" if offset else "up"
    clamped = f", both clamped at {limit:g}" if math.isfinite(limit) else ""
    return f"activation: {of_gate} * {up}{clamped}"


def _target(rewrite: Rewrite) -> str:
    return f"{rewrite.kernels} ({rewrite.layout})"


def _row(rewrite: Rewrite) -> tuple[str, ...]:
    return (
        rewrite.layer,
        rewrite.form,
        f"{rewrite.experts}, top-{rewrite.top_k}",
        _target(rewrite),
        size_in_words(rewrite.bytes_before),
        size_in_words(rewrite.bytes_after),
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _graphs(n: int) -> str:
    return "1 graph" if n == 1 else f"{n} graphs"
