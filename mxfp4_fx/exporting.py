"""``export``: a model with its experts in MXFP4 as a package, which runs without the model's code.

The model is captured as ``torch.export`` does, but before torch lowers it to ATen: so the passes of
the backend run on the graph (``passes/pipeline.py``). The lowered graph, with the swizzled weights
in it, is exported again, to ATen, and AOTInductor compiles that.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mxfp4_fx import calls
from mxfp4_fx.backend import analyze, announce, bind, plan_inputs, refuse_freed
from mxfp4_fx.core import compilation, torch_private, torch_private_export
from mxfp4_fx.core.errors import OptionError, PackageError
from mxfp4_fx.core.options import Options
from mxfp4_fx.explanation import Explanation
from mxfp4_fx.exportable import check_model, check_results, check_writes, naming, plain_result
from mxfp4_fx.exported import Input, Note, Size, contiguous, named_inputs
from mxfp4_fx.passes.context import Context
from mxfp4_fx.passes.listing import GraphChange
from mxfp4_fx.passes.report import GraphReport
from mxfp4_fx.weights.store import STORE

_ENDING = ".pt2"


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Explanation:
    """Compile a model on a CPU, with its experts in MXFP4, to a package for other processes.

    :func:`mxfp4_fx.load_exported` loads it, without the model's code and transformers. The package
    has copies of all weights as they are now, those of experts swizzled; later changes of the model
    do not reach it. The model itself stays as it is. It is exported without gradients, and in its
    present mode (``model.eval()``).

    Args:
        model: a model, a layer, or any other module, dense or packed; what compiled it is left out.
        args, kwargs: example inputs: tensors, numbers, strings, bools and None in tuples, lists
            and dicts. Sizes and all that is no tensor are constants of the package, except for:
        dynamic_shapes: the dimensions that may vary, as for ``torch.export.export``, such as
            ``{"input_ids": {1: torch.export.Dim("T", min=1, max=4096)}}``.
        path: the file to write, which ends in ``.pt2``. There must be none of that name yet.
        mode, options: as for ``torch.compile(backend="mxfp4", mode=..., options=...)``. ``inner``
            can only be ``"inductor"``; ``regions`` changes nothing, because a package has no
            regions. ``options["inductor"]`` are AOTInductor's.

    Returns:
        What was rewritten and what was not, as :func:`mxfp4_fx.explain` has it.

    Raises:
        OptionError: an option or argument is wrong.
        PackageError: the model is not on a CPU, or cannot be exported; or the file cannot be
            written.
        FreedWeightError: the model's weights are freed.
        MissedRewriteError: with ``strict=True``, experts are not rewritten, or there are none.
    """
    parsed = _options(options, mode)
    file = _new_file(path)
    with torch.no_grad():
        exported = lowered_program(model, args, dict(kwargs or {}), dynamic_shapes, parsed)
        _package(exported, file, parsed)
    return exported.explanation


@dataclasses.dataclass(frozen=True)
class Exported:
    """A program in ATen's and this package's ops, what a package of it is for, and the report."""

    program: torch.export.ExportedProgram
    note: Note
    explanation: Explanation


def lowered_program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    options: Options,
) -> Exported:
    """Capture, rewrite and export a model; see :func:`export`."""
    model = torch_private.unwrapped(model)
    check_model(model, args, kwargs)
    args, kwargs = torch_private.tree_map_only(Tensor, contiguous, (args, kwargs))
    modules = [*model.modules()]
    call = calls.Call(options, torch_private.uncompiled(model))
    settings = {name: value for name, value in vars(options).items() if name != "mode"}
    with torch_private.without_compiled_calls(modules), call:
        with compilation.exporting({"options": settings, "mode": options.mode}), naming(model):
            captured = torch_private_export.capture(model, args, kwargs, dynamic_shapes)
        signature = torch_private_export.take_signature(captured.graph)
        result = plain_result(model, signature)
        inputs = [*named_inputs(args, kwargs).values()]
        weights = _lift_weights(captured)
        check_writes(model, captured.graph, [*inputs, *weights])
        rewritten, ctx = analyze(captured, [*inputs, *weights], options)
        refuse_freed(captured, rewritten, ctx)
        announce(ctx)
        call.ran(ctx.report, ctx.inputs)
        report = call.renamed(ctx.report, ctx.inputs)
    if options.verify:
        eager = dataclasses.replace(options, inner="eager")
        bind(captured, rewritten, ctx, eager)(*ctx.inputs)
    change = GraphChange.of(captured, rewritten)
    values = _swizzled(captured, rewritten, ctx, options)
    whole = _with_weights(rewritten, values, len(inputs), signature, result)
    with naming(model):
        program = torch.export.export(
            whole, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
    check_results(model, program)
    return Exported(program, _note(program, args, kwargs), _explanation(report, change))


def _options(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    parsed = Options.parse(options, mode)
    if parsed.inner != "inductor":
        raise OptionError(
            f"options['inner'] is {parsed.inner!r}, and packages need 'inductor': leave it out"
        )
    return parsed


def _new_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if file.suffix != _ENDING:
        raise OptionError(f"{file} must end in {_ENDING}, as torch wants it for packages")
    if file.exists():
        raise PackageError(f"{file} exists already: remove it, or name another file")
    if not file.parent.is_dir():
        raise PackageError(f"there is no directory {file.parent} for {file.name}: make it first")
    return file


def _lift_weights(gm: fx.GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that a graph reads by ``get_attr``; return these tensors.

    The new inputs come behind the others. A backend's graph has them from the start.
    """
    graph = gm.graph
    last = [*graph.find_nodes(op="placeholder")][-1:]
    made: dict[int, fx.Node] = {}
    tensors: list[Tensor] = []
    for node in graph.find_nodes(op="get_attr"):
        value = _attribute(gm, str(node.target))
        if not isinstance(value, Tensor):  # the body of a higher-order op
            continue
        if id(value) not in made:
            place = graph.inserting_after(last[0]) if last else graph.inserting_before()
            with place:
                new = graph.placeholder(str(node.target).replace(".", "_"))
            new.target = new.name
            new.meta = dict(node.meta)
            torch_private.note_as_weight(new)
            made[id(value)], last = new, [new]
            tensors.append(value)
        node.replace_all_uses_with(made[id(value)])
        graph.erase_node(node)
    gm.recompile()
    return tensors


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    found: Any = gm
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _swizzled(
    captured: fx.GraphModule, rewritten: fx.GraphModule, ctx: Context, options: Options
) -> list[Any]:
    """Return the values of the rewritten graph's inputs.

    Weights that are swizzled for this alone are forgotten, so that their memory goes with the
    program's; those of the compiled model stay.
    """
    plan, inputs = plan_inputs(captured, rewritten, ctx), tuple(ctx.inputs)
    if options.free_weights:
        plan.free(inputs)
        return plan.inputs(inputs)
    sources = [(binding.take(inputs), binding) for binding in plan.bindings]
    new = [
        tensors
        for tensors, binding in sources
        if STORE.find(tensors, binding.encoding, binding.layout) is None
    ]
    with plan.swizzling_ahead(inputs, is_quiet=True, are_freed=False):
        pass
    values = plan.inputs(inputs)
    STORE.forget(tensor for tensors in new for tensor in tensors)
    return values


def _with_weights(
    rewritten: fx.GraphModule, values: Sequence[Any], count: int, signature: Any, result: Any
) -> fx.GraphModule:
    """Return a module that has the graph's inputs from the ``count``-th on as its buffers."""
    graph = rewritten.graph
    held: dict[str, Any] = {}
    placeholders = graph.find_nodes(op="placeholder")
    for node, value in [*zip(placeholders, values, strict=True)][count:]:
        held[node.name] = value.detach()
        with graph.inserting_before(node):
            new = graph.create_node("get_attr", node.name)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in held:
            held[node.target] = _attribute(rewritten, node.target)
    torch_private_export.give_signature(graph, signature, result)
    return fx.GraphModule(held, graph)


def _note(
    program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Note:
    """Return what a package of a program is for."""
    targets, ops = set(), set()
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            op = node.target
            if not isinstance(op, torch_private.OpOverload) or op.namespace != "mxfp4":
                continue
            ops.add(op.name().partition("::")[2])
            names = [argument.name for argument in torch_private.schema_of(op).arguments]
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            kernels = given.get("kernels", "reference")
            targets.add((kernels, "" if kernels == "reference" else given.get("layout", "")))
    known = torch_private_export.known_values(program)
    names = program.graph_signature.user_inputs
    inputs = {
        path: _input(program, path, value, known.get(str(name)))
        for (path, value), name in zip(named_inputs(args, kwargs).items(), names, strict=True)
    }
    return Note.here(targets, ops, inputs)


def _input(program: torch.export.ExportedProgram, path: str, value: Any, known: Any) -> Input | Any:
    if isinstance(known, torch.SymInt):
        raise PackageError(
            f"{path} is a number, which cannot vary in a package: leave it out of dynamic_shapes"
        )
    if not isinstance(value, Tensor):
        return value
    shape: list[int | Size] = []
    for dim, size in enumerate(known.shape):
        if isinstance(size, int):
            shape.append(size)
            continue
        symbol, least, most = torch_private_export.range_of(program, size)
        if not symbol.isidentifier():
            raise PackageError(
                f"dimension {dim} of {path} is {symbol}, computed from another one: give it a "
                "Dim of its own, or fix its size"
            )
        shape.append(Size(symbol, least, most))
    return Input(str(value.dtype), tuple(shape))


def _package(exported: Exported, file: Path, options: Options) -> None:
    """Compile a program to a file, which appears when it is complete."""
    configs = torch_private_export.inductor_configs(options.mode, options.inductor)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
            made = Path(folder, file.name)
            with torch_private_export.without_compiler("AOTInductor"):
                torch_private_export.package(
                    exported.program, str(made), configs, exported.note.to_json()
                )
            os.replace(made, file)
    except OSError as error:
        raise PackageError(f"{file} cannot be written: {error}") from error


def _explanation(report: GraphReport, change: GraphChange) -> Explanation:
    return Explanation(
        1,
        tuple(report.rewrites),
        tuple(report.misses),
        tuple(report.notes),
        report.linears,
        tuple(report.attention),
        tuple(report.attention_misses),
        (change,),
        tuple(report.mxfp8),
        tuple(report.linear_misses),
    )
