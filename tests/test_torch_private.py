"""What is taken of torch's private parts is there, and does what it is trusted to do.

A new torch that breaks this package breaks it here, with the name that it lacks.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Graphs
from torch import Tensor, fx, nn
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

import mxfp4_fx
from mxfp4_fx import calls
from mxfp4_fx.core import (
    compilation,
    torch_private,
    torch_private_distributed,
    torch_private_dynamo,
)
from mxfp4_fx.errors import TorchVersionError

PACKAGE = Path(mxfp4_fx.__file__).parent

# ---- one file


# Attributes of torch's objects that are read in every call, where they are read ...
ATTRIBUTES = {
    *("_base", "_cdata", "_version"),
    *("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"),
}
# ... those of accelerate, transformers and PEFT, and a named tuple's methods.
OTHERS = {
    *("_active_collector", "_attn_implementation", "_experts_implementation"),
    *("_device_mesh", "_hf_hook", "_is_hooked", "_weight_conversions", "_replace"),
    *("_apply_gate", "_is_expert_parallel", "_asdict"),
    *("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"),
    *("_original_source_patterns", "_original_target_patterns"),
    *("_check_forward_args", "_inject_parameters", "_register_custom_module"),
}


def private_names(file: Path, own: set[str]) -> Iterator[str]:
    """Private names in a file that are torch's, or at least none of this package's ``own``."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.ImportFrom(module=str(module)) if module.startswith("torch"):
                names = [*module.split("."), *(alias.name for alias in node.names)]
            case ast.Import():
                paths = [alias.name for alias in node.names]
                names = [part for p in paths if p.startswith("torch") for part in p.split(".")]
            case ast.Attribute(attr=name):
                names = [name] if name not in own else []
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, name, *_]):
                names = [name.value] if isinstance(name, ast.Constant) else []
            case _:
                continue
        yield from (name for name in names if re.match(r"_(?!_)", str(name)))


def own_names(files: list[Path]) -> set[str]:
    """Private names that the package itself defines: functions, classes, attributes."""
    found: set[str] = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name):
                found.add(name)
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                found.add(name)
    return found


def test_private_names_stand_in_their_files() -> None:
    files = [f for f in PACKAGE.rglob("*.py") if not f.name.startswith("torch_private")]
    own = own_names(files)
    found = {(f.name, name) for f in files for name in private_names(f, own)}
    assert {name for _, name in found} == ATTRIBUTES | OTHERS, found


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch._dynamo.eval_frame", "_no_such_name"), ("torch._no_such_module", "anything")],
)
def test_what_torch_lacks_is_told_by_name(module: str, name: str) -> None:
    with pytest.raises(TorchVersionError) as raised:
        torch_private.look_up(module, name)
    assert re.search("_no_such_(name|module)", str(raised.value))
    assert f"torch {torch.__version__} does not have" in str(raised.value)


def test_what_torch_lacks_ends_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_assert_async")
    source = Path(torch_private.__file__).read_text()
    with pytest.raises(TorchVersionError, match="_assert_async"):
        exec(compile(source, "another torch_private", "exec"), {"__name__": "another"})


# ---- the dispatcher and autograd


def test_the_library_is_a_file_that_is_loaded() -> None:
    if sys.platform == "linux":
        assert torch_private.LIBRARY in Path("/proc/self/maps").read_text()


def test_a_schema_has_names_defaults_and_who_is_written() -> None:
    schema = torch_private.schema_of(torch.ops.aten.add_.Tensor)
    assert schema.name == "aten::add_"
    first, second, alpha = schema.arguments
    assert (first.name, str(first.type), first.alias_info.is_write) == ("self", "Tensor", True)
    assert second.alias_info is None
    assert (alpha.name, alpha.default_value, alpha.is_out) == ("alpha", 1, False)
    assert isinstance(torch.ops.aten.add_, torch_private.OpOverloadPacket)
    assert isinstance(torch.ops.aten.add_.Tensor, torch_private.OpOverload)


def test_whether_a_profiler_runs() -> None:
    assert not torch_private.is_profiling()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch_private.is_profiling()
    assert not torch_private.is_profiling()


def test_below_autograd_nothing_is_recorded() -> None:
    x = torch.ones(2, requires_grad=True)
    with torch_private.below_autograd():
        assert not torch.ops.aten.mul.Tensor(x, x).requires_grad
    assert torch.ops.aten.mul.Tensor(x, x).requires_grad


def test_gradients_are_wanted_by_tensors_in_lists_too() -> None:
    plain, wants = torch.ones(2), torch.ones(2, requires_grad=True)
    assert torch_private.any_requires_grad(1, [plain, wants])
    assert not torch_private.any_requires_grad(1, [plain])


def test_function_transforms_are_seen() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((torch_private.are_transforms_active(), torch_private.is_transformed(x)))
        with torch_private.as_python_calls():
            return x

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2))
    assert seen == [(False, False), (True, True)]


def test_forward_mode_is_seen() -> None:
    assert not torch_private.in_forward_mode()
    with forward_ad.dual_level():
        assert torch_private.in_forward_mode()


def test_autocast_is_kept_out() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with torch_private.without_keys(torch_private.AUTOCAST):
            assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("device", ["CPU", "CUDA", "XPU"])
def test_autocast_has_a_key_for_each_kind_of_device(device: str) -> None:
    assert torch_private.AUTOCAST.has(getattr(torch._C.DispatchKey, f"Autocast{device}"))


def test_an_assertion_has_its_message() -> None:
    torch_private.assert_async(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="out of range"):
        torch_private.assert_async(torch.tensor(False), "out of range")


# ---- tensors and modules


class Loud(Tensor):
    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise AssertionError("was asked")


def test_classes_are_not_asked_where_tensors_are_plain() -> None:
    loud = torch_private.make_subclass(Loud, torch.ones(2))
    with torch_private.as_plain_tensors():
        assert loud.sum() == 2
    with pytest.raises(AssertionError, match="was asked"):
        loud.sum()


def test_a_subclass_has_the_same_memory() -> None:
    plain = torch.ones(2)
    loud = torch_private.make_subclass(Loud, plain)
    with torch_private.as_plain_tensors():
        assert loud.data_ptr() == plain.data_ptr()


def test_guards_tell_shape_strides_and_dtype() -> None:
    x = torch.ones(2, 3)
    guards = torch_private.TensorGuards(x, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    assert guards.check(torch.zeros(2, 3))
    for other in (torch.ones(3, 2), torch.ones(3, 2).t(), torch.ones(2, 3).double()):
        assert not guards.check(other)


def test_tensors_that_are_made_of_tensors_are_known() -> None:
    assert torch_private.is_wrapper(TwoTensor(torch.ones(2), torch.ones(2)))
    assert not torch_private.is_wrapper(torch.ones(2))


def test_storages_are_known_by_a_key() -> None:
    with torch_private.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(4))
        assert isinstance(fake, torch_private.FakeTensor)
    for x in (torch.ones(4), fake):
        assert torch_private.storage_key(x) == torch_private.storage_key(x[1:])
        assert torch_private.storage_key(x) != torch_private.storage_key(torch.ones(4))


def test_attributes_that_are_read_where_they_are_used() -> None:
    x = torch.ones(4)
    before = x._version
    x.add_(1)
    assert x._version > before
    assert x[1:]._base is x
    assert x._base is None
    assert x._cdata == x.view_as(x)._base._cdata  # type: ignore[union-attr]
    module = nn.BatchNorm1d(2)
    assert {*module._parameters} == {"weight", "bias"}
    assert {*module._buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    assert nn.Sequential(module)._modules == {"0": module}
    seen: list[str] = []
    module._forward_pre_hooks[-1] = lambda *_: seen.append("before")
    module._forward_hooks[-1] = lambda *_: seen.append("after")
    module(torch.ones(2, 2))
    assert seen == ["before", "after"]


def test_trees_are_mapped() -> None:
    assert torch_private.tree_map_only(int, str, ([1, 2.0], {"a": 3})) == (["1", 2.0], {"a": "3"})


def test_a_parameter_of_a_tensors_class_is_marked() -> None:
    class Quiet(Tensor):
        pass

    held = nn.Parameter(torch_private.make_subclass(Quiet, torch.ones(2)))
    assert type(held) is Quiet
    assert torch_private.has_parameter_mark(held)
    assert not torch_private.has_parameter_mark(torch.ones(2))


def test_what_is_wrapped_by_compile_is_found() -> None:
    module = nn.Linear(2, 2)
    assert torch_private.unwrapped(torch.compile(module)) is module
    assert torch_private.unwrapped(module) is module


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_a_module_is_called_as_before_it_was_compiled() -> None:
    module, graphs = Twice(), Graphs()
    module.compile(backend=graphs)
    with torch_private.without_compiled_calls([module]):
        module(torch.ones(2))
    assert not graphs.seen
    module(torch.ones(2))
    assert len(graphs.seen) == 1


def test_calls_go_through_what_is_set() -> None:
    module = Twice()
    plain = torch_private.uncompiled(module)
    torch_private.call_through(module, lambda x: plain(x) + 1)
    assert module(1) == plain(1) + 1
    assert torch_private.called_through(module) is not None
    torch_private.call_through(module, None)
    assert module(1) == plain(1)


def test_all_hooks_around_calls_are_found() -> None:
    module = nn.Linear(2, 2)
    kinds = "forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"
    before = sum(map(len, torch_private.hooks([module])))
    for kind in kinds:
        getattr(module, f"register_{kind}")(lambda *_: None)
    of_all = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert sum(map(len, torch_private.hooks([module]))) == before + len(kinds) + 1
    of_all.remove()


def test_what_cannot_be_captured_whole_is_told_by_known_errors() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(torch_private_dynamo.capture_errors()):
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))


def test_a_length_that_may_vary_is_compiled_once() -> None:
    compiled = torch.compile(torch.sin, backend="eager")
    for length in (3, 4):
        x = torch.ones(length)
        if length == 3:
            torch_private_dynamo.let_vary(x, [-1])
        compiled(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_object_that_dynamo_would_guard_is_another() -> None:
    x = torch.ones(2)
    assert torch_private_dynamo.without_address(x) is x
    torch._dynamo.mark_static_address(x)
    other = torch_private_dynamo.without_address(x)
    assert other is not x
    assert other.data_ptr() == x.data_ptr()


def test_fsdps_parameters_are_looked_for_where_it_is_loaded() -> None:
    import torch.distributed.fsdp

    assert not torch_private_distributed.is_filled_by_fsdp(torch.ones(2))


def test_a_dtensor_wraps_its_shard() -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard

    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        whole = nn.Parameter(DTensor.from_local(torch.ones(2, 3, 4), mesh, [Shard(0)]))
        module = nn.ParameterDict({"whole": whole, "plain": torch.ones(2, 3, 4)})
        assert torch_private_distributed.is_dtensor(whole)
        assert not torch_private_distributed.is_dtensor(module["plain"])
        assert torch_private_distributed.dtensors_in([module]) == [whole]
        shard = torch_private_distributed.shard_of(whole)
        assert shard is torch_private_distributed.shard_of(whole)
        assert shard.data_ptr() == whole.to_local().data_ptr()
        assert not torch_private_distributed.why_no_shard(whole)
        partial = DTensor.from_local(torch.ones(2), mesh, [Partial()])
        assert "Partial" in torch_private_distributed.why_no_shard(partial)
    finally:
        dist.destroy_process_group()


# ---- graphs


def captured(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    graphs = Graphs()
    torch.compile(function, backend=graphs, fullgraph=True)(*args)
    (graph,) = graphs.seen
    return graph


def in_modes(x: Tensor) -> Tensor:
    with torch.no_grad():
        x = torch.nn.functional.linear(x, x)
    with torch.inference_mode():
        return x + 1


def test_a_lazy_graph_module_runs_the_graph_as_it_is_when_it_is_called() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.neg, (x,)))
    lazy = torch_private.LazyGraphModule(nn.Module(), graph)
    assert lazy(torch.ones(1)) == -1
    next(iter(graph.find_nodes(op="call_function", target=torch.neg))).target = torch.exp
    lazy.recompile()
    assert torch.equal(lazy.forward(torch.ones(1)), torch.ones(1).exp())


def test_times_stand_beside_torchs_own() -> None:
    with torch_private_dynamo.timed("mxfp4_fx.test"):
        pass
    assert "mxfp4_fx.test" in torch._dynamo.utils.compile_times("str")


def test_dynamo_writes_modes_and_calls_so() -> None:
    targets = {node.target for node in captured(in_modes, torch.ones(2, 2)).graph.nodes}
    for name in (*("set_grad_enabled", "linear", "enter_inference_mode", "exit_inference_mode"),):
        assert getattr(torch_private, name) in targets, name


def test_builtins_of_torch_are_found_by_their_names() -> None:
    for function in (torch.special.expit, torch.linalg.det, torch.fft.fft, torch.relu):
        name = function.__name__
        assert function in [getattr(module, name, None) for module in torch_private.BUILTINS]


def test_what_dynamo_noted_is_copied() -> None:
    copied: list[fx.Node] = []

    def backend(old: fx.GraphModule, inputs: list[Any]) -> Any:
        graph = torch_private.empty_graph_like(old.graph)
        nodes: dict[Any, Any] = {}
        graph.output(graph.graph_copy(old.graph, nodes))
        new = fx.GraphModule(old, graph)
        torch_private.copy_notes(old, new, nodes)
        for node in old.graph.find_nodes(op="placeholder"):
            assert node._dynamo_source is not None
            assert nodes[node]._dynamo_source is node._dynamo_source
            assert "grapharg" in node.meta
            assert "grapharg" not in nodes[node].meta
            copied.append(node)
        for name in ("_param_name_to_source", "_source_to_user_stacks"):
            assert getattr(new, name) is getattr(old, name)
        return old.forward

    torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(2))
    assert len(copied) == 3


def test_weights_are_noted_as_dynamo_notes_them() -> None:
    module = nn.Linear(2, 2)
    graph = captured(module, torch.ones(2)).graph
    noted = [*map(torch_private.is_noted_as_weight, graph.find_nodes(op="placeholder"))]
    assert sorted(noted) == [False, True, True]
    made = graph.placeholder("made")
    torch_private.note_as_weight(made)
    assert torch_private.is_noted_as_weight(made)


def test_hooks_on_saved_tensors_are_kept_out() -> None:
    packed: list[Tensor] = []
    x = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda _: x):
        with torch_private.without_saved_tensor_hooks():
            x.exp()
        assert not packed
        x.exp()
    assert packed


def test_artifacts_are_traced() -> None:
    torch_private.trace_structured("artifact", metadata_fn=dict, payload_fn=str)


# ---- compilers


def test_backends_have_names() -> None:
    gm = fx.symbolic_trace(nn.Identity())
    assert (
        torch_private_dynamo.backend_named("eager")(gm, [torch.ones(2)])(torch.ones(2)) is not None
    )


def test_inductor_tells_whether_it_measures() -> None:
    measures = torch_private_dynamo.inductor_measures
    assert not measures(None, {})
    assert not measures("reduce-overhead", {"max_autotune": False})
    assert measures("max-autotune", {})
    assert measures(None, {"max_autotune_pointwise": True})
    with torch._inductor.config.patch(max_autotune_gemm=True):
        assert measures(None, {})


def test_inductor_tells_whether_it_freezes() -> None:
    freezes = torch_private_dynamo.inductor_freezes
    assert not freezes("max-autotune", {})
    assert freezes(None, {"freezing": True})
    with torch._inductor.config.patch(freezing=True):
        assert freezes(None, {})
        assert not freezes(None, {"freezing": False})


def test_inductor_takes_options_and_knows_modes() -> None:
    modes = torch_private.look_up("torch._inductor", "list_mode_options")
    assert modes("max-autotune")["max_autotune"] is True
    compile_fx = torch_private.look_up("torch._inductor.compile_fx", "compile_fx")
    assert "config_patches" in inspect.signature(compile_fx).parameters


entered: list[str] = []


@contextlib.contextmanager
def their_context() -> Iterator[None]:
    entered.append("theirs")
    yield


def their_backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
    return gm.forward


their_backend.backend_ctx_ctor = their_context  # type: ignore[attr-defined]


def add_one(x: Tensor) -> Tensor:
    call = calls.current()
    entered.append("none" if call is None else str(call.options.inner))
    return x + 1


@pytest.fixture(autouse=True)
def nothing_entered() -> None:
    entered.clear()


@pytest.mark.filterwarnings("ignore::mxfp4_fx.errors.NoExpertsWarning")
def test_a_context_surrounds_each_call_of_ours_compiled_or_not() -> None:
    options = {"inner": "eager"}
    partial = functools.partial(mxfp4_fx.mxfp4, options=options)
    for run in (
        torch.compile(torch.compiler.disable(add_one), backend="mxfp4", options=options),
        torch.compile(add_one, backend=partial),
        torch._dynamo.optimize(partial)(add_one),
    ):
        run(torch.ones(2))
        run(torch.ones(2))
    assert entered == ["eager"] * 6
    assert calls.current() is None


def test_other_backends_keep_a_context_of_their_own() -> None:
    torch._dynamo.optimize(their_backend)(add_one)(torch.ones(2))
    torch.compile(add_one, backend="eager")(torch.ones(2))
    assert entered == ["theirs", "none", "none"]


def test_what_is_never_compiled_by_itself_is_inlined_elsewhere() -> None:
    seen: list[bool] = []

    @torch_private_dynamo.never_compiled
    def inner(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x * 2

    @torch._dynamo.disable(recursive=False)
    def between(x: Tensor) -> Tensor:
        return inner(x)

    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(lambda x: between(x), backend=keep)(torch.ones(2))
    assert (seen, graphs) == ([False], [])
    torch.compile(lambda x: inner(x + 1), backend=keep, fullgraph=True)(torch.ones(2))
    assert (seen, len(graphs)) == ([False, True], 1)


@pytest.mark.filterwarnings("ignore::mxfp4_fx.errors.NoExpertsWarning")
def test_the_backend_that_dynamo_compiles_for_is_known() -> None:
    seen: list[Any] = []

    @torch.compiler.assume_constant_result
    def ask() -> bool:
        seen.append(compilation.innermost(torch_private_dynamo.compiled_with())[0])
        return compilation.compiling_for()

    @compilation.ours
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        return gm.forward

    def double_if_ours(x: Tensor) -> Tensor:
        return x * 2 if ask() else x.clone()

    assert torch_private_dynamo.compiled_with() is None
    assert torch.compile(double_if_ours, backend=backend)(torch.ones(1)) == 2
    assert torch.compile(double_if_ours, backend="eager")(torch.ones(1)) == 1
    assert seen == [backend, None]


def test_a_compiled_call_is_seen_on_the_stack() -> None:
    seen: list[Any] = []

    @torch.compiler.disable
    def look(x: Tensor) -> Tensor:
        seen.append(compilation.compiled_function())
        frames = list(compilation._frames())
        seen.append([f for frame in frames if (f := torch_private_dynamo.disabled_by(frame))])
        return x

    def calls_it(x: Tensor) -> Tensor:
        return look(x + 1)

    assert compilation.compiled_function() is None
    x = torch.ones(2)
    torch.compile(calls_it, backend="eager")(x)
    (function, args), disabled = seen
    assert function is calls_it
    assert args == [x]
    assert [f.__name__ for f in disabled][:1] == ["look"]


def test_the_stance_is_known() -> None:
    assert torch_private_dynamo.stance() == "default"
    with torch.compiler.set_stance("force_eager"):
        assert torch_private_dynamo.stance() == "force_eager"


def test_what_is_compiled_is_known() -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1

    assert not torch_private_dynamo.is_compiled(function.__code__)
    torch.compile(function, backend="eager")(torch.ones(2))
    assert torch_private_dynamo.is_compiled(function.__code__)
    torch.compiler.reset()
    assert not torch_private_dynamo.is_compiled(function.__code__)


def test_what_is_untraced_is_no_frame_of_dynamos() -> None:
    graphs = Graphs()

    def called_by_c(x: Tensor) -> Tensor:
        return x + 1

    torch_private_dynamo.untraced(called_by_c)
    torch.compile(called_by_c, backend=graphs)(torch.ones(2))
    assert not graphs.seen


def test_recompilations_can_be_kept_apart() -> None:
    assert isinstance(torch_private_dynamo.can_isolate(), bool)


@pytest.mark.skipif(not torch_private_dynamo.can_isolate(), reason="this torch has one count")
@pytest.mark.parametrize("apart", [False, True])
def test_a_call_is_kept_apart_from_within(apart: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        compilation.compiled_function(apart=apart)
        yield

    backend = Graphs()
    backend.backend_ctx_ctor = context  # type: ignore[attr-defined]
    with torch._dynamo.config.patch(recompile_limit=1):
        torch.compile(function, backend="eager")(torch.ones(2))
        run = torch._dynamo.optimize(backend)(function)
        for dtype in (torch.float32, torch.float64):
            run(torch.ones(2, dtype=dtype))
    assert len(backend.seen) == apart


class TestPreparingInductor:
    def test_it_compiles_what_its_kernels_need(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """That is, a kernel; in a thread."""
        made, load = [], CppPythonBindingsCodeCache.load_pybinding

        def noted(*args: Any) -> None:
            made.append((threading.current_thread(), load(*args)))

        monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding", noted)
        thread = torch_private_dynamo.prepare_inductor()
        thread.join()
        ((there, kernel),) = made
        assert there is thread
        assert callable(kernel)

    def test_compilers_wait_until_the_cpu_is_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two threads that look at it at once find flags that no other process finds."""
        known: list[bool] = []
        go_on = threading.Event()

        def look() -> None:
            go_on.wait()
            known.append(True)

        monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", look)
        monkeypatch.setattr(
            "torch._inductor.compile_fx.compile_fx", lambda *args, **kwargs: [*known]
        )
        monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding", None)
        threads = [torch_private_dynamo.prepare_inductor() for _ in range(2)]
        threading.Timer(0.1, go_on.set).start()
        graph = torch.fx.symbolic_trace(torch.nn.Identity())
        assert torch_private_dynamo.compile_with_inductor(graph, [], None, {}) == [True, True]
        for thread in threads:
            thread.join()

    @pytest.mark.filterwarnings("error")
    def test_a_failure_is_left_to_inductor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding", None)
        torch_private_dynamo.prepare_inductor().join()
