"""The private names of torch's compilers and of Dynamo: like ``torch_private.py``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mxfp4_fx.core.torch_private import STATIC_INPUT, Backend, lacks, look_up, trusted

with trusted():
    import torch._C._dynamo.eval_frame

    _FrameAction = torch._C._dynamo.eval_frame._FrameAction
    _FrameExecStrategy = torch._C._dynamo.eval_frame._FrameExecStrategy
    _set_code_exec_strategy = torch._C._dynamo.eval_frame.set_code_exec_strategy

# ---- compilers behind this one


def backend_named(name: str) -> Backend:
    """Return the Dynamo backend of that name."""
    return look_up("torch._dynamo", "lookup_backend")(name)


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: list[Any],
    mode: str | None,
    options: Mapping[str, Any],
    instead: Callable[[fx.GraphModule, Sequence[Any]], Any] | None = None,
) -> Any:
    """Compile a graph with Inductor.

    Args:
        gm: the graph, of torch's calls.
        inputs: example inputs.
        mode, options: those of ``torch.compile``; options override the mode's.
        instead: takes the graph of ATen's ops that Inductor would compile for inference, and its
            fake inputs. It returns a function from a list of inputs to a list of outputs, or None
            to let Inductor compile. It is not asked where torch's caches demand Inductor's result.
    """
    for thread in _looking:
        thread.join()
    compile_fx = look_up("torch._inductor.compile_fx", "compile_fx")
    inner = look_up("torch._inductor.compile_fx", "compile_fx_inner")

    bundles = look_up(
        "torch._functorch._aot_autograd.autograd_cache", "should_bundle_autograd_cache"
    )

    def compile_inner(graph: fx.GraphModule, examples: Any, **how: Any) -> Any:
        is_asked = instead is not None and how.get("is_inference") and not bundles()
        made = instead(graph, examples) if instead is not None and is_asked else None
        return inner(graph, examples, **how) if made is None else made

    patches = {**_of_mode(mode), **options} or None
    return compile_fx(gm, inputs, inner_compile=compile_inner, config_patches=patches)


# Threads that look at this CPU for Inductor. It keeps what it finds in lists that are not safe for
# threads: two at once may note a flag twice, and the next process, which does not, compiles anew.
_looking: list[threading.Thread] = []


def prepare_inductor() -> threading.Thread:
    """Have Inductor look at this CPU and precompile its C++ headers in a thread, which is returned.

    It does both once for a machine, before its first kernel, which takes ten seconds and more. What
    goes wrong here goes wrong there again, and is told there.
    """
    # What the threads need is imported here: torch's modules import one another in circles, and a
    # process that is forked while a thread imports a module waits for ever when it imports it, too.
    with contextlib.suppress(Exception):
        importlib.import_module("torch.utils.cpp_extension")
    compiler = look_up("torch._inductor.codecache", "CppPythonBindingsCodeCache")
    look = look_up("torch._inductor.cpu_vec_isa", "valid_vec_isa_list")
    _looking[:] = [thread for thread in _looking if thread.is_alive()]
    before = [*_looking]
    looking = threading.Thread(target=_look, args=(look, before), name="mxfp4_fx looks")
    looking.start()
    _looking.append(looking)
    arguments = compiler, looking
    thread = threading.Thread(target=_compile_nothing, args=arguments, name="mxfp4_fx loads")
    thread.start()
    return thread


def _look(look: Callable[[], Any], before: list[threading.Thread]) -> None:
    for thread in before:
        thread.join()
    with contextlib.suppress(Exception):
        look()


def _compile_nothing(compiler: Any, looking: threading.Thread) -> None:
    looking.join()
    nothing = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(float*) {}\n'
    with contextlib.suppress(Exception):
        compiler.load_pybinding(["float*"], nothing)


def inductor_measures(mode: str | None, options: Mapping[str, Any]) -> bool:
    """Return whether Inductor times kernels while it compiles, to choose the fastest."""
    config, chosen = look_up("torch._inductor", "config"), {**_of_mode(mode), **options}
    names = ("max_autotune", "max_autotune_gemm", "max_autotune_pointwise")
    return any(chosen.get(name, getattr(config, name, False)) for name in names)


def inductor_freezes(mode: str | None, options: Mapping[str, Any]) -> bool:
    """Return whether Inductor makes constants of the weights, and packs those of linears."""
    config, chosen = look_up("torch._inductor", "config"), {**_of_mode(mode), **options}
    return bool(chosen.get("freezing", config.freezing))


def _of_mode(mode: str | None) -> dict[str, Any]:
    return look_up("torch._inductor", "list_mode_options")(mode) if mode else {}


def empty_caches() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which torch's compile caches are empty."""
    return look_up("torch._inductor.utils", "fresh_cache")()


def without_precompiled_headers() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which Inductor reads its C++ headers anew for each kernel."""
    patched: contextlib.AbstractContextManager[Any] = look_up("torch._inductor", "config").patch(
        cpp_cache_precompile_headers=False
    )
    return patched


def is_of_cpp_compiler(error: BaseException) -> bool:
    """Return whether the C++ compiler has refused what Inductor gave it."""
    return isinstance(error, look_up("torch._inductor.exc", "CppCompileError"))


def is_of_unparsed_code(error: BaseException) -> bool:
    """Return whether Inductor could not parse a file of Python code; it hides the SyntaxError."""
    return type(error) is RuntimeError and str(error).startswith("Failed to import ")


# ---- Dynamo


def untraced(function: Callable[..., Any]) -> None:
    """Keep Dynamo out of a function that C++ calls, and out of all functions below it.

    Dynamo does not see the call from C++ and would compile the function as a frame of its own
    (``torch.compiler.set_stance("eager_then_compile")``). ``torch.compiler.disable`` prevents that
    too, but costs microseconds a call. This sets a mark on the code object and wraps nothing.
    """
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    code: types.CodeType = function.__code__
    _set_code_exec_strategy(code, skip)


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep Dynamo from compiling a function as a frame of its own; it still inlines calls of it."""
    look_up("torch._dynamo.eval_frame", "skip_code")(function.__code__)
    return function


def compiled_with() -> Any:
    """Return the backend that Dynamo compiles for now, with its wrappers; None if there is none."""
    current = look_up("torch._dynamo.symbolic_convert", "InstructionTranslator.current_tx")
    try:
        return current().output.compiler_fn
    except AttributeError:  # no compilation runs in this thread
        return None


def wrapped_backend(backend: Any) -> Any:
    """Return the backend inside a wrapper of Dynamo or ``torch.compile``; None if there is none.

    The wrapper passes its own attribute ``kwargs`` on to the backend.
    """
    return getattr(backend, "compiler_fn", None) or getattr(
        backend, "_torchdynamo_orig_backend", None
    )


def have_context(make: Callable[[Any], Any]) -> None:
    """Set the factory of the context that Dynamo enters around each compiled call.

    ``make(backend)`` returns the factory, or None to keep the backend's own.

    Dynamo reads the factory from the backend's attribute ``backend_ctx_ctor``. It enters the
    context in the caller's thread, before it looks at the called function. ``torch.compile`` wraps
    the backend in objects that do not pass this attribute on, so this function sets it on the class
    of the outermost one.
    """

    def context(wrapper: Any) -> Any:
        made = make(wrapper)
        own = vars(wrapper).get("backend_ctx_ctor", contextlib.nullcontext)
        return own if made is None else made

    outermost = look_up("torch._dynamo.repro.after_dynamo", "WrapBackendDebug")
    outermost.backend_ctx_ctor = property(context)


def timed(name: str) -> Any:
    """Return a context whose time ``torch._dynamo.utils.compile_times()`` and tlparse show."""
    timings = sys.modules.get("torch._dynamo.utils")  # without Dynamo nobody looks
    # Another thread may be importing it.
    timed = getattr(timings, "dynamo_timed", None)
    return timed(name) if timed else contextlib.nullcontext()


def stance() -> str:
    """Return the present stance of ``torch.compiler.set_stance``."""
    return str(look_up("torch._dynamo.eval_frame", "_stance.stance"))


LimitCheck = Callable[[Any, Any], tuple[bool, str]]


def replace_limit_check(make: Callable[[LimitCheck], LimitCheck]) -> None:
    """Replace the check that Dynamo makes before it traces a frame: whether it reached a limit.

    ``make`` takes torch's check and returns another. A check takes two dataclasses: the counts of
    the compilations of the frame's code, and the compilation's id with its number
    ``frame_compile_id``. It returns whether a limit is reached, and the limit's name in
    ``torch._dynamo.config``. Its caller has the locals ``compiler_fn``, the backend in its
    wrappers, and ``code``.
    """
    parameters = inspect.signature(look_up("torch._dynamo.convert_frame", "_compile")).parameters
    for name in ("compiler_fn", "code"):
        if name not in parameters:
            raise lacks(AttributeError(f"_compile's argument {name}"))
    made = make(look_up("torch._dynamo.convert_frame", "exceeds_recompile_limit"))
    look_up("torch._dynamo", "convert_frame").exceeds_recompile_limit = made


def is_compiled(code: types.CodeType) -> bool:
    """Return whether Dynamo has compiled a function, for any backend and arguments."""
    return bool(look_up("torch._dynamo.eval_frame", "_debug_get_cache_entry_list")(code))


def tracing_without_cache() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which Dynamo begins traces that keep no results of fake tensors' ops.

    A layer has few ops whose symbolic sizes were seen before. To store a result, torch computes it
    twice, which takes a quarter of the trace.
    """
    patched: contextlib.AbstractContextManager[Any] = look_up("torch._dynamo", "config").patch(
        fake_tensor_cache_enabled=False
    )
    return patched


def keep_results() -> None:
    """Let compilers keep the results of fake tensors' ops in the graph that is being compiled."""
    context = look_up("torch._guards", "TracingContext").try_get()
    mode = getattr(context, "fake_mode", None)
    if mode is not None:
        mode.cache_enabled = look_up("torch._dynamo", "config").fake_tensor_cache_enabled


def keep_apart(frame: types.FrameType) -> None:
    """Count the compilations of a compiled call apart from those for other backends.

    The frame is one that :func:`called_by` knows, entering the call's context. All calls that this
    function sees share a count, and the code that Dynamo compiled for them. A call that has a count
    of its own (``isolate_recompiles``) keeps it.
    """
    context = frame.f_locals["self"]
    if getattr(context, "_isolate_recompiles_id", None) == -1:
        context._isolate_recompiles_id = _region()


@functools.cache
def _region() -> int:
    return int(next(look_up("torch._dynamo.eval_frame", "_next_isolate_recompiles_id")))


def called_by(frame: types.FrameType) -> tuple[Callable[..., Any], list[Any]] | None:
    """Return the function and arguments of a compiled call, or None if the frame is none."""
    if not _is_dynamos(frame, "compile_wrapper"):
        return None
    found = frame.f_locals
    return found["fn"], [*found["args"], *found["kwargs"].values()]


def disabled_by(frame: types.FrameType) -> Any:
    """Return the function that ``torch.compiler.disable`` calls in this frame, or None."""
    return frame.f_locals.get("fn") if _is_dynamos(frame, "_fn") else None


def _is_dynamos(frame: types.FrameType, function: str) -> bool:
    return frame.f_code.co_name == function and frame.f_code.co_filename == _eval_frame_file()


@functools.cache
def _eval_frame_file() -> str:
    return str(look_up("torch._dynamo.eval_frame", "innermost_fn").__code__.co_filename)


@functools.cache
def capture_errors() -> tuple[type[Exception], ...]:
    """Return what Dynamo raises with ``fullgraph=True`` if it cannot capture a function whole."""
    names = "Unsupported", "UserError", "UncapturedHigherOrderOpError", "FailOnRecompileLimitHit"
    return tuple(look_up("torch._dynamo.exc", name) for name in names)


def let_vary(tensor: Tensor, dims: Iterable[int]) -> None:
    """Let Dynamo compile code that takes this tensor for any size of these dimensions."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            look_up("torch._dynamo", "maybe_mark_dynamic")(tensor, dim % tensor.ndim)


def without_address(tensor: Tensor) -> Tensor:
    """Return the tensor, as another object if Dynamo would guard the very object."""
    if not hasattr(tensor, STATIC_INPUT):
        return tensor
    # Dynamo guards a view's base too; but only a view has the gradient.
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.data


def is_traced() -> bool:
    """Return whether this thread's calls are traced, by Dynamo or in one of torch's modes.

    ``torch.compiler.is_compiling()`` is true in all threads while one of them compiles.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    modes: int = torch._C._len_torch_dispatch_stack()
    return modes > 0


def can_isolate() -> bool:
    """Return whether ``torch.compile`` can keep one call's recompilations apart from all others."""
    return "isolate_recompiles" in inspect.signature(torch.compile).parameters
