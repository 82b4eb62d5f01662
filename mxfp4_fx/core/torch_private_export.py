"""The private names of torch's exporter and of AOTInductor: like ``torch_private.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from mxfp4_fx.core.torch_private import look_up

# ---- the exporter


def capture(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> fx.GraphModule:
    """Capture a module as ``torch.export.export(strict=True)`` does, before it lowers to ATen.

    The graph takes the flat inputs, those that nothing reads too, and has the module's arguments
    and result in its code generator. It reads weights by ``get_attr``. Each node has an
    ``example_value``, and sizes are computed from those of the inputs, as in a graph for a backend.
    """
    to_torch_calls = look_up("torch.export._trace", "_export_to_torch_ir")
    settle_sizes = look_up("torch.fx.passes.runtime_assert", "insert_deferred_runtime_asserts")
    with _flat():
        gm: fx.GraphModule = to_torch_calls(
            module, args, kwargs, dynamic_shapes, _log_export_usage=False
        )
    for node in gm.graph.find_nodes(op="placeholder"):
        if "val" in node.meta:  # of an input that nothing reads
            node.meta.setdefault("example_value", node.meta["val"])
    shapes = _shape_env(gm.graph)
    if shapes is not None:
        settle_sizes(gm, shapes, "mxfp4_fx.export", export=True)
        gm.recompile()
    return gm


def _flat() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which captures of fixed sizes take the way that others take."""
    config = look_up("torch", "_export.config")
    name = "use_legacy_dynamo_graph_capture"
    known: contextlib.AbstractContextManager[Any] = (
        config.patch({name: True}) if hasattr(config, name) else contextlib.nullcontext()
    )
    return known


def _shape_env(graph: fx.Graph) -> Any:
    for node in graph.nodes:
        mode = getattr(node.meta.get("example_value"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return mode.shape_env
    return None


def take_signature(graph: fx.Graph) -> Any:
    """Return how a captured graph takes arguments and gives results, and make it take them flat."""
    signature = graph._codegen
    graph.set_codegen(fx.graph.CodeGen())
    return signature


def give_signature(graph: fx.Graph, signature: Any, result: Any) -> None:
    """Give a graph what :func:`take_signature` took.

    Args:
        result: a tree like the graph's result, whose containers the graph is to return.
    """
    spec = look_up("torch.utils._pytree", "tree_structure")(result)
    signature.pytree_info = signature.pytree_info._replace(out_spec=spec)
    graph.set_codegen(signature)


def result_of(signature: Any) -> Any:
    """Return the tree of a graph's result, with the number of each of its flat results in it."""
    spec = signature.pytree_info.out_spec
    return look_up("torch.utils._pytree", "tree_unflatten")([*range(spec.num_leaves)], spec)


def leaves(tree: Any) -> dict[str, Any]:
    """Return the paths of a tree's leaves, such as ``[0]['mask']`` -> the leaves."""
    paths, _ = look_up("torch.utils._pytree", "tree_flatten_with_path")(tree)
    name = look_up("torch.utils._pytree", "keystr")
    return {name(path): leaf for path, leaf in paths}


def known_values(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """Return a program's inputs -> fake tensors and symbolic numbers, whose sizes may vary."""
    return {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}


def range_of(program: torch.export.ExportedProgram, size: Any) -> tuple[str, int, int | None]:
    """Return a symbolic size as text, and the range of its values; None stands for no limit."""
    expression = size.node.expr
    found = program.range_constraints.get(expression)
    if found is None:  # not a symbol of its own, but computed from others
        return str(expression), 0, None
    is_limited = found.upper.is_Integer and int(found.upper) < _UNLIMITED
    return str(expression), int(found.lower), int(found.upper) if is_limited else None


_UNLIMITED = 1 << 48  # torch has several numbers for "no limit", all of them larger


# ---- AOTInductor


@contextlib.contextmanager
def without_compiler(program: str) -> Iterator[None]:
    """Raise :class:`FileNotFoundError` if the block needs a C++ compiler and finds none.

    Args:
        program: who needs it, for the message.
    """
    missing = look_up("torch._inductor.exc", "InvalidCxxCompiler")
    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, missing):
            found = getattr(found, "inner_exception", None) or found.__cause__
        if found is None:
            raise
        raise FileNotFoundError(f"{program} needs a C++ compiler: {found}") from error


def package(
    program: torch.export.ExportedProgram, file: str, configs: Mapping[str, Any], note: str
) -> None:
    """Compile a program to a file that ends in ``.pt2``, with a text for :data:`NOTE`."""
    patches = {**configs, "aot_inductor.metadata": {NOTE: note}}
    compile_and_package = look_up("torch._inductor", "aoti_compile_and_package")
    compile_and_package(program, package_path=file, inductor_configs=patches)


# The key of this package's text in the file that ends in METADATA of a package, which is a ZIP.
NOTE, METADATA = "mxfp4_fx", "_metadata.json"


def load(file: str) -> Any:
    """Load a package; the result is called like the module."""
    return look_up("torch._inductor", "aoti_load_package")(file)


def inductor_configs(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return Inductor's options for a package: of ``mode``, then ``options``.

    Threads are those of the process that loads the package, not those of the one that made it.
    """
    of_mode = look_up("torch._inductor", "list_mode_options")(mode) if mode else {}
    return {"cpp.dynamic_threads": True, **of_mode, **options}
