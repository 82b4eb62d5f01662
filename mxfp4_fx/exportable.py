"""What can be exported: the model, its inputs, what it does and what it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import TensorArgument

from mxfp4_fx.core import torch_private_export
from mxfp4_fx.core.errors import FreedWeightError, Mxfp4Error, OptionError, PackageError
from mxfp4_fx.core.torch_private_distributed import is_dtensor
from mxfp4_fx.exported import named_inputs
from mxfp4_fx.passes.effects import Effect
from mxfp4_fx.passes.memory import Memory, effects_on
from mxfp4_fx.passes.origin import source_line
from mxfp4_fx.weights.freed import is_freed


def check_model(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Check what is exported, and its example inputs."""
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"mxfp4_fx.export takes a module, not a {type(model).__name__}: make the function the "
            "forward of a module"
        )
    if not isinstance(args, tuple):
        raise OptionError(
            f"args must be a tuple of the model's arguments, such as (x,); it is a "
            f"{type(args).__name__}"
        )
    for name, held in _tensors(model):
        if is_freed(held):
            raise FreedWeightError(
                f"{name} was freed by options={{'free_weights': True}}, and an export reads the "
                "model's own weights: mxfp4_fx.restore(model) gives them their memory again"
            )
        if is_dtensor(held):
            raise PackageError(
                f"{name} is spread over processes, and a package is for one: export a model that "
                "is loaded in one process"
            )
        if not held.is_cpu:
            raise PackageError(
                f"{name} is on {held.device}, and packages are for CPUs: move the model to the CPU "
                "first (a device_map that offloads weights must be left out)"
            )
    for name, value in named_inputs(args, kwargs).items():
        if isinstance(value, Tensor) and not value.is_cpu:
            raise PackageError(f"{name} is on {value.device}, and packages are for CPUs")
        if not isinstance(value, Tensor | int | float | str | None):
            raise OptionError(
                f"{name} is a {type(value).__name__}, and a package takes tensors, numbers, "
                "strings, bools and None, in tuples, lists and dicts. Caches of keys and values "
                "are none of these: export with use_cache=False"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@contextlib.contextmanager
def naming(model: nn.Module) -> Iterator[None]:
    """Say in an error of the exporter which model it does not take.

    Raises:
        PackageError: the block raises what is none of this package's errors.
    """
    try:
        yield
    except Mxfp4Error:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        cache = " A cache is no result of a package: export with use_cache=False."
        raise PackageError(
            f"{type(model).__name__} cannot be exported as one graph with these inputs and "
            f"dynamic_shapes.{cache if 'Cache' in text else ''} {text}"
        ) from error


def plain_result(model: nn.Module, signature: Any) -> Any:
    """Return the tree of a model's result in dicts, lists and tuples.

    A package with a class of transformers in it could not be loaded without transformers.
    """

    def plain(tree: Any) -> Any:
        if isinstance(tree, int):  # the number of a result
            return tree
        if isinstance(tree, Mapping):
            return {key: plain(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [*map(plain, tree)]
        if isinstance(tree, tuple):
            return tuple(map(plain, tree))
        raise PackageError(
            f"{type(model).__name__} returns a {type(tree).__name__}; a package returns tensors "
            "in tuples, lists and dicts. Leave caches of keys and values out: use_cache=False"
        )

    return plain(torch_private_export.result_of(signature))


def check_writes(model: nn.Module, graph: fx.Graph, inputs: list[Any]) -> None:
    """Check that a captured graph changes none of its inputs, the model's tensors among them."""
    held = graph.find_nodes(op="placeholder")
    memory = Memory(graph, dict(zip(held, inputs, strict=True)))
    places = {key: node for node in held for key in memory.of(node)}
    for call, effects in effects_on(graph).items():
        for argument, effect in effects.items():
            written = memory.of(argument) & places.keys() if effect & _WRITES else None
            if written:
                raise PackageError(
                    f"{type(model).__name__} writes to {places[written.pop()].name}, by {call} "
                    f"({source_line(call)}), and a package only returns results: export in eval "
                    "mode, without caches and counters"
                )


_WRITES = Effect.WRITES | Effect.RESHAPES | Effect.REPOINTS


def check_results(model: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Check that a program returns tensors."""
    for one in program.graph_signature.output_specs:
        if not isinstance(one.arg, TensorArgument):
            raise PackageError(
                f"{type(model).__name__} returns {getattr(one.arg, 'value', 'a number')!r} beside "
                "its tensors: let it return tensors alone"
            )
