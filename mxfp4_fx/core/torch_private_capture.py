"""The private names of torch about nested compile regions: like ``torch_private.py``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from mxfp4_fx.core.errors import TorchVersionError
from mxfp4_fx.core.torch_private import look_up

# ---- modules and tensors

# The attributes with which torch implements modules. `training` is none of them.
MODULE_PARTS = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = [
    name
    for name in MODULE_PARTS
    if name.endswith("_hooks") and "state_dict" not in name and name != "_is_full_backward_hook"
]


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks that a call of a module or its backward runs; not those for all modules."""
    for name in _HOOKS:
        yield from getattr(module, name).values()


def is_compiled_module(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` compiled a module by itself."""
    return module._compiled_call_impl is not None


def has_hooks(tensor: Tensor) -> bool:
    """Return whether a tensor has hooks on its gradient."""
    return bool(tensor._backward_hooks) or bool(
        getattr(tensor, "_post_accumulate_grad_hooks", None)
    )


# ---- Dynamo, while it captures


def region(function: Callable[..., Any], most: int) -> Callable[..., Any]:
    """Make a nested compile region of a function.

    Args:
        most: more graphs than this of one function in one graph are an error, where torch reuses
            graphs without tracing.
    """
    made: Callable[..., Any] = torch.compiler.nested_compile_region(
        function, max_reuse_entries=most
    )
    return made


def at_capture() -> Any:
    """Return a function that Dynamo runs as Python: ``at_capture(f)`` calls ``f(context)``.

    ``f`` is a function of a module's. Nothing comes of the call in the graph or its guards.
    """
    return look_up("torch._dynamo.comptime", "comptime")


# What this file looks up while Dynamo captures, when a missing name would come too late.
_INLINE = "torch._higher_order_ops.passes.inline_invoke_subgraph", "inline_invoke_subgraph_nodes"
_NEEDED = (
    ("torch._dynamo.comptime", "comptime"),
    ("torch._dynamo.symbolic_convert", "InstructionTranslator.current_tx"),
    ("torch._dynamo.output_graph", "OutputGraph.resolve_source_value"),
    ("torch._dynamo.guards", "install_guard"),
    ("torch._dynamo.source", "is_from_source"),
    ("torch._guards", "TracingContext"),
    ("torch._guards", "Source.clone"),
    _INLINE,
)


def can_capture_regions() -> bool:
    """Return whether this torch has what this file uses, so that regions may be set: from 2.13."""
    make = getattr(torch.compiler, "nested_compile_region", None)
    if make is None or "max_reuse_entries" not in inspect.signature(make).parameters:
        return False
    try:
        for module, name in _NEEDED:
            look_up(module, name)
    except TorchVersionError:
        return False
    return True


def graph_under_capture() -> Any:
    """Return the object that Dynamo collects the present graph in, or None."""
    current = look_up("torch._dynamo.symbolic_convert", "InstructionTranslator.current_tx")
    try:
        return current().output
    except AttributeError:
        return None


def scalars_seen() -> Any:
    """Return Dynamo's memory of the numbers it has met; it is a new one after a reset."""
    return look_up("torch._dynamo.pgo", "get_code_state")()


def are_floats_symbolic() -> bool:
    """Return whether Dynamo takes each float that it meets as an input (``dynamic=True``)."""
    return not look_up("torch._dynamo.config", "assume_static_by_default")


def path(source: Any) -> str:
    """Return Dynamo's name of a source."""
    name = source.name  # a method before torch 2.12
    return str(name() if callable(name) else name)


def object_at_capture(context: Any, name: str) -> tuple[Any, Any]:
    """Return the object that a local variable holds, and Dynamo's source of it; or (None, None)."""
    variable = _variable(context, name)
    return getattr(variable, "value", None), getattr(variable, "source", None)


def are_tensors(context: Any, name: str, count: int) -> bool:
    """Return whether a local variable holds a tuple of so many tensors."""
    items = getattr(_variable(context, name), "items", None)
    return (
        isinstance(items, list | tuple)
        and len(items) == count
        and all(_fake(item.realize()) is not None for item in items)
    )


def is_tensor_or_none(context: Any, name: str) -> bool:
    """Return whether a local variable holds a tensor or None."""
    variable = _variable(context, name)
    return _fake(variable) is not None or bool(variable.python_type() is type(None))


def is_in_ddp() -> bool:
    """Return whether a module is called in DistributedDataParallel, which takes no regions."""
    if not torch.distributed.is_available():
        return False
    name = "DistributedDataParallel._active_ddp_module"
    return look_up("torch.nn.parallel.distributed", name) is not None


def tensor_at_capture(context: Any, name: str) -> Tensor | None:
    """Return the fake tensor that a local variable holds, or None."""
    return _fake(_variable(context, name))


def sizes(fake: Tensor | None) -> Hashable:
    """Return what is known now of a fake tensor's sizes: equal if they are known to be equal."""
    if fake is None:
        return None
    return tuple(map(_known, fake.shape)), tuple(map(_known, fake.stride())), fake.requires_grad


def _variable(context: Any, name: str) -> Any:
    found = context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker()
    return found.realize()


def _fake(variable: Any) -> Tensor | None:
    proxy = getattr(variable, "proxy", None)
    value = proxy.node.meta.get("example_value") if proxy is not None else None
    return value if isinstance(value, Tensor) else None


def _known(size: int | torch.SymInt) -> int | str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else size


def guards_on(source: Any) -> list[Any] | None:
    """Return Dynamo's guards on an object and what it holds, but for tensors; None: not usable.

    Those on tensors come with the graph's inputs.
    """
    context = look_up("torch._guards", "TracingContext").get()
    found = []
    for guard in context.guards_context.dynamo_guards:
        if not _is_from(guard.originating_source, source):
            continue
        name, given = guard.create_fn_name(), getattr(guard.create_fn, "keywords", {})
        if name == "TENSOR_MATCH":
            continue
        if name == "DUPLICATE_INPUT":  # two paths lead to one object
            value = graph_under_capture().resolve_source_value(guard.originating_source)
            if isinstance(value, Tensor):
                continue
        elif not all(isinstance(value, str | int | float | None) for value in given.values()):
            return None
        found.append(guard)
    return found


def guard_alike(guards: list[Any], old: Any, new: Any) -> None:
    """Guard an object as another is guarded. ``guards`` are the other's (:func:`guards_on`)."""
    install = look_up("torch._dynamo.guards", "install_guard")

    known = {old: new}

    def moved(source: Any) -> Any:
        if source not in known:  # most paths begin with another guard's path
            known[source] = source.clone(lambda part: known.get(part, part))
        return known[source]

    for guard in guards:
        make = guard.create_fn
        if guard.create_fn_name() == "DUPLICATE_INPUT":
            make = functools.partial(make.func, source_b=moved(make.keywords["source_b"]))
        install(moved(guard.originating_source).make_guard(make))
    ordered = graph_under_capture().guard_on_key_order  # dicts whose keys are found by position
    ordered |= {moved(source) for source in ordered if _is_from(source, old)}


def _is_from(source: Any, whole: Any) -> bool:
    is_from: bool = look_up("torch._dynamo.source", "is_from_source")(source, whole)
    return is_from


# ---- sizes in a graph


def settled(value: Any) -> Any:
    """Return a symbolic int as one made of the symbols that it is known to be equal to now."""
    if not isinstance(value, torch.SymInt) or not value.node.is_symbolic():
        return value
    node = value.node
    if node._expr == node.expr or node.expr.is_number:
        return value
    return node.shape_env.create_symintnode(node.expr, hint=node.hint)


@functools.cache
def invoke_subgraph() -> Any:
    """Return the op by which a graph runs a region."""
    return torch.ops.higher_order.invoke_subgraph


def inline(gm: fx.GraphModule, call: fx.Node) -> None:
    """Replace the call of a region by what the region computes."""
    look_up(*_INLINE)(gm, [call])
