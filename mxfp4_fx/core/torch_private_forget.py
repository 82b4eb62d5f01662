"""What torch keeps of a compilation for ever, and lets go here: like ``torch_private.py``.

A process that compiles one model after the other must not grow.
"""

from __future__ import annotations

import inspect
import linecache
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import fx

from mxfp4_fx.core.torch_private import look_up, trusted

with trusted():
    import torch._C._dynamo.eval_frame

    _reset_code = torch._C._dynamo.eval_frame.reset_code

# Code of a function that :func:`forget_with` knows -> the symbolic sizes of its compilations.
_sizes: weakref.WeakKeyDictionary[types.CodeType, list[Any]] = weakref.WeakKeyDictionary()


def forget_with(function: types.FunctionType) -> None:
    """Let what Dynamo compiles of a function go when the function does.

    Its code, to which that belongs, is of this function alone, and so is its name. Torch would keep
    it for ever: a cycle through C++ holds it, tables of why it compiled anew, of the sizes it met
    and of who told what of a compilation, and caches, of which two have no limit, hold the code and
    the symbols of its sizes.
    """
    code = function.__code__
    sizes = _sizes.setdefault(code, [])
    weakref.finalize(function, _forget, code, sizes).atexit = False


def forget_backend_with(function: types.FunctionType, compiled: Callable[..., Any]) -> None:
    """Let the wrapper that ``torch.compile`` made of the backend go when the function does."""
    nonlocals = inspect.getclosurevars(compiled).nonlocals
    backend = look_up("torch._dynamo.eval_frame", "innermost_backend")(nonlocals["callback"])
    backends = look_up("torch._dynamo.eval_frame", "cached_backends")
    weakref.finalize(function, backends.pop, id(backend), None).atexit = False


def forget_source_with(gm: fx.GraphModule) -> None:
    """Let the source of a graph's code go when the graph does; torch's table of them only grows.

    Call it for a captured graph before other graphs are made: torch has just made the code of the
    graph as it was captured, and does not tell its name. What runs is made later, in another name.
    """
    sources = look_up("torch.fx.graph_module", "_loader.eval_cache")
    file = next(reversed(sources), "")
    signature = sources.get(file, "").partition(")")[0]
    names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    files = [file] if names and all(name in signature for name in names) else []
    # A graph's class is of this graph alone.
    weakref.finalize(gm, _forget_sources, sources, type(gm), files).atexit = False


def sources() -> frozenset[str]:
    """Return the names of the sources that torch holds of graphs' code."""
    return frozenset(look_up("torch.fx.graph_module", "_loader.eval_cache"))


def forget_sources_with(gm: fx.GraphModule, before: frozenset[str]) -> None:
    """Let the sources that a compiler made of a graph go with it: all but those of ``before``."""
    held = look_up("torch.fx.graph_module", "_loader.eval_cache")
    files = [file for file in held if file not in before]
    weakref.finalize(gm, _forget_sources, held, type(gm), files).atexit = False


def _forget_sources(sources: dict[str, str], own: type[fx.GraphModule], files: list[str]) -> None:
    for file in (*files, own.forward.__code__.co_filename):
        if sources.pop(file, None) is not None:
            linecache.cache.pop(file, None)


def forget_sizes() -> None:
    """Let the symbolic sizes of the graph that is being compiled go with its function, too.

    The garbage collector cannot see that these belong together: a size's symbols hold the fake
    tensors of the graph, and these, through C++, the size. They cannot go sooner: Dynamo makes
    guards of them when the backend has returned.
    """
    compiling = look_up("torch._dynamo.symbolic_convert", "InstructionTranslator.current_tx")()
    context = look_up("torch._guards", "TracingContext").try_get()
    env = getattr(getattr(context, "fake_mode", None), "shape_env", None)
    if env is not None and compiling.f_code in _sizes:
        _sizes[compiling.f_code].append(env)


def _forget(code: types.CodeType, sizes: list[Any]) -> None:
    entries = look_up("torch._dynamo.eval_frame", "_debug_get_cache_entry_list")(code)
    guards = [entry.guard_manager for entry in entries]
    _reset_code(code)
    _detach_finalizers(guards)
    for guard in guards:
        vars(guard).update(dict.fromkeys(vars(guard)))
    for env in sizes:
        for held in (env.tracked_fakes, env.fake_tensor_cache):
            if held is not None:
                held.clear()
    sizes.clear()
    look_up("torch._dynamo.utils", "guard_failures").pop(code, None)
    met = look_up("torch._dynamo.pgo", "get_code_state")()
    for key in [one for one in met if (one.filename, one.name) == (code.co_filename, code.co_name)]:
        met.pop(key, None)
    compilations = look_up("torch._dynamo.utils", "get_metrics_context")()
    if not compilations.in_progress():  # only the present compilation's are ever read
        compilations._edits.clear()
    caches = vars(look_up("torch.fx.experimental.symbolic_shapes", "ShapeEnv")).values()
    instructions = "torch._dynamo.bytecode_transformation", "_cached_cleaned_instructions"
    variables = "torch._dynamo.guards", "code_framelocals_names_reversed_cached"
    for cache in (*caches, look_up(*instructions), look_up(*variables)):
        if hasattr(cache, "cache_clear"):  # who compiles meanwhile computes it again
            cache.cache_clear()


def _detach_finalizers(guards: list[Any]) -> None:
    """Detach the finalizers of whatever was guarded, classes and modules too: they hold the guards.

    Python has no public list of finalizers. Where it has none at all, they stay.
    """
    known = {id(guard) for guard in guards}
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        found = finalizer.peek()
        owner = getattr(getattr(found and found[1], "func", None), "__self__", None)
        if id(getattr(owner, "guard_manager", None)) in known:
            finalizer.detach()
