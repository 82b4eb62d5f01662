"""The private names of torch that the package uses: each of them once, under a plain name.

A new torch may lack any of them. This file then raises ``TorchVersionError`` with the missing name.
``tests/test_torch_private*.py`` pin the behaviour that the package relies on. Names in modules that
take long to import are looked up on first use.

A few private attributes are used outside this file, because every call reads them: ``_base``,
``_cdata`` and ``_version`` of tensors, and a module's dictionaries (``_modules``, ``_parameters``,
``_buffers`` and its hooks).
"""

from __future__ import annotations

import contextlib
import importlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from mxfp4_fx.core.errors import TorchVersionError

Backend = Callable[..., Any]


@contextlib.contextmanager
def trusted() -> Iterator[None]:
    """Raise ``TorchVersionError`` if the block uses a name that this torch lacks."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise lacks(error) from error


def look_up(module: str, name: str) -> Any:
    """Import a module and return the present value of a private name in it."""
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise lacks(error) from error


def lacks(error: Exception) -> TorchVersionError:
    return TorchVersionError(
        f"mxfp4_fx uses a private name that torch {torch.__version__} does not have: {error}. "
        "Install another torch (2.11 or newer; 2.13 is tested), or a newer mxfp4_fx"
    )


with trusted():
    import torch._C._dynamo.eval_frame
    import torch._C._dynamo.guards
    import torch._C._functorch
    import torch._logging
    import torch._ops
    import torch._subclasses
    import torch.autograd.grad_mode
    import torch.fx._lazy_graph_module
    import torch.utils._python_dispatch
    import torch.utils._pytree

    # ---- the dispatcher and autograd

    LIBRARY = str(torch._C.__file__)  # the file that calls OpenMP
    OpOverload = torch._ops.OpOverload
    OpOverloadPacket = torch._ops.OpOverloadPacket
    LazyGraphModule = torch.fx._lazy_graph_module._LazyGraphModule  # makes its code when called
    # A context in which the dispatcher skips an op's autograd kernel.
    below_autograd = torch._C._AutoDispatchBelowAutograd
    # Whether one of an op's arguments, which may be lists, requires a gradient.
    any_requires_grad = torch._C._any_requires_grad
    are_transforms_active = torch._C._are_functorch_transforms_active
    # A context in which the dispatcher skips the given keys, such as autocast's.
    without_keys = torch._C._ExcludeDispatchKeyGuard
    AUTOCAST = (
        torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
        | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
        | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastXPU)
    )
    # Whether a profiler records this thread's ops.
    is_profiling = torch.autograd._profiler_enabled
    # An assertion that the device checks; the host does not wait for it.
    assert_async = torch._assert_async

    # ---- tensors

    FakeTensor = torch._subclasses.FakeTensor
    FakeTensorMode = torch._subclasses.FakeTensorMode
    # A context in which torch does not call ``__torch_function__`` of tensor subclasses.
    as_plain_tensors = torch._C.DisableTorchFunctionSubclass
    # Compares class, dtype, device, shape, strides and modes of tensors in one call.
    TensorGuards = torch._C._dynamo.guards.TensorGuards
    # Whether a tensor wraps other tensors, as a DTensor does.
    is_wrapper = torch.utils._python_dispatch.is_traceable_wrapper_subclass
    # Whether a value is a wrapper of one of ``torch.func``'s transforms.
    is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
    tree_map_only = torch.utils._pytree.tree_map_only
    # Makes a tensor of a subclass that shares another tensor's memory.
    make_subclass = torch.Tensor._make_subclass

    # ---- functions that Dynamo writes into a graph

    set_grad_enabled = torch._C._set_grad_enabled
    enter_inference_mode = torch.autograd.grad_mode._enter_inference_mode
    exit_inference_mode = torch.autograd.grad_mode._exit_inference_mode
    linear = torch._C._nn.linear
    grouped_mm = getattr(torch, "_grouped_mm", None)  # None if this torch lacks it

    # Attention of (query, key, value, dropout, is causal, attn_mask=, scale=) on a CPU in memory
    # that is linear in their lengths. It takes grouped heads, a mask of the query's dtype that has
    # four dimensions, and head dims of stride 1. It returns the result, [B, H, Q, D] in memory of
    # [B, Q, H, D], and the logarithm of each sum of exponentials, float32 [B, H, Q]. None if this
    # torch lacks it.
    flash_attention_for_cpu = getattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None
    )
    # Modules whose builtins are ATen's ops of the same names.
    BUILTINS = (torch, *operator.attrgetter("_nn", "_special", "_linalg", "_fft")(torch._C))
    # Writes an artifact for TORCH_TRACE.
    trace_structured = torch._logging.trace_structured


# ---- ops


def schema_of(op: OpOverload) -> Any:
    """Return an op's schema: ``name``, and ``arguments`` (names, types, defaults, aliases)."""
    return op._schema


def in_forward_mode() -> bool:
    """Return whether a level of forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def as_python_calls() -> Any:
    """Return a context in which ``torch.func``'s transforms start anew while they handle an op.

    In it they see the ``autograd.Function`` that is called in the op's place.
    """
    key = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
    return torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set().add(key),
        torch._C._dispatch_tls_local_exclude_set().remove(key),
    )


# ---- tensors and modules


def storage_key(tensor: Tensor) -> int:
    """Return a key that all tensors of one storage share, whether fake or real."""
    return tensor.untyped_storage()._cdata


def has_parameter_mark(tensor: Tensor) -> bool:
    """Return whether ``nn.Parameter`` made the tensor a parameter and kept its class."""
    return hasattr(tensor, "_is_param")


def unwrapped(function: Any) -> Any:
    """Return the module that ``torch.compile`` wrapped, or ``function`` itself."""
    return getattr(function, "_orig_mod", function)


@contextlib.contextmanager
def without_compiled_calls(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, modules that ``module.compile()`` compiled are called uncompiled."""
    compiled = {m: m._compiled_call_impl for m in modules if m._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def call_through(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Let calls of a module go through ``call``, as ``module.compile()`` does; None undoes it.

    A copy of the module, pickled or deep, is called as it was.
    """
    module._compiled_call_impl = call


def called_through(module: nn.Module) -> Callable[..., Any] | None:
    """Return what :func:`call_through` or ``module.compile()`` has set."""
    return module._compiled_call_impl


def uncompiled(module: nn.Module) -> Callable[..., Any]:
    """Return what calls a module with its hooks, past :func:`call_through`."""
    call: Callable[..., Any] = module._call_impl
    return call


def hooks(modules: Iterable[nn.Module]) -> list[Mapping[int, Callable[..., Any]]]:
    """Return the dictionaries of the hooks around modules' calls, and those of all modules."""
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    of_all = vars(nn.modules.module)
    found = [of_all[f"_global_{kind}_hooks"] for kind in kinds]
    return found + [vars(module)[f"_{kind}_hooks"] for module in modules for kind in kinds]


def default_store() -> Any:
    """Return the store through which the processes of the default group found each other."""
    return look_up("torch.distributed.distributed_c10d", "_get_default_store")()


# ---- graphs


STATIC_INPUT = "_dynamo_static_input_type"


def empty_graph_like(graph: fx.Graph) -> fx.Graph:
    """Return an empty graph with the tracer class of ``graph``, as Dynamo makes them."""
    return fx.Graph(tracer_cls=graph._tracer_cls)


def copy_notes(old: fx.GraphModule, new: fx.GraphModule, nodes: Mapping[fx.Node, fx.Node]) -> None:
    """Copy Dynamo's notes on a graph, which guards and Inductor read.

    Args:
        nodes: node of the old graph -> node of the new graph.
    """
    for before, after in nodes.items():
        after.meta.pop("grapharg", None)  # its weak reference would forbid swap_tensors
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def is_noted_as_weight(placeholder: fx.Node) -> bool:
    """Return whether Dynamo notes an input as a fixed object: parameter, buffer or constant."""
    return STATIC_INPUT in placeholder.meta.get("tensor_dict", {})


def note_as_weight(placeholder: fx.Node) -> None:
    """Note that a new input has a fixed address, as parameters have, and no guard."""
    placeholder.meta["tensor_dict"] = {STATIC_INPUT: "unguarded"}
    placeholder._dynamo_source = None


# Higher-order ops that run a graph on operands -> where these begin among the arguments. The graph
# comes first; a nested compile region has a name behind it, which its calls share.
_FIRST_OPERANDS = {"invoke_subgraph": 2, "tag_activation_checkpoint": 1}


def first_operand(target: object) -> int | None:
    """Return where the operands of a higher-order op that runs a graph begin, or None."""
    if not isinstance(target, torch._ops.HigherOrderOperator):
        return None
    return _FIRST_OPERANDS.get(target.name())


def names_of_body(target: object, name: str) -> tuple[str, ...]:
    """Return the arguments of such an op between its graph and its operands, for a new graph."""
    return (name,) * ((first_operand(target) or 1) - 1)


def source_path(placeholder: fx.Node) -> str:
    """Return the path by which Dynamo reads an input: "L['self']._parameters['weight']", or ""."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")  # a method before torch 2.12
    return str(name() if callable(name) else name)


def note_on_weight(placeholder: fx.Node, is_weight: bool) -> None:
    """Note whether an input of a region is a fixed object, as :func:`is_noted_as_weight` reads."""
    held = {k: v for k, v in placeholder.meta.get("tensor_dict", {}).items() if k != STATIC_INPUT}
    placeholder.meta["tensor_dict"] = held | ({STATIC_INPUT: "unguarded"} if is_weight else {})


def without_saved_tensor_hooks() -> Any:
    """Return a context for fake calls without hooks on saved tensors, which may count real ones."""
    return look_up("torch._dynamo.utils", "_disable_saved_tensors_hooks_during_tracing")()
