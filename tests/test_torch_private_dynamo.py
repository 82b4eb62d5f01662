"""What is taken of Dynamo's and Inductor's private parts does what it is trusted to do."""

from __future__ import annotations

import contextlib
import functools
import inspect
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import Graphs
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config
from torch._inductor import exc
from torch._inductor.codecache import CppPythonBindingsCodeCache

import mxfp4_fx
from mxfp4_fx import calls
from mxfp4_fx.core import (
    compilation,
    torch_private,
    torch_private_dynamo,
)

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


def test_errors_of_the_cpp_compiler_are_known() -> None:
    error = exc.CppCompileError(["g++"], "no")
    assert torch_private_dynamo.is_of_cpp_compiler(error)
    assert not torch_private_dynamo.is_of_cpp_compiler(ValueError())


def test_headers_can_be_left_unprecompiled() -> None:
    assert inductor_config.cpp_cache_precompile_headers
    with torch_private_dynamo.without_precompiled_headers():
        assert not inductor_config.cpp_cache_precompile_headers


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
        assert [callable(kernel) for there, kernel in made if there is thread] == [True]

    def test_compilers_wait_until_the_cpu_is_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two threads that look at it at once find flags that no other process finds.

        They look until somebody waits for them.
        """
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
        looking = torch_private_dynamo._looking
        waits = [SimpleNamespace(join=lambda t=t: (go_on.set(), t.join())) for t in looking]
        monkeypatch.setattr(torch_private_dynamo, "_looking", waits)
        graph = torch.fx.symbolic_trace(torch.nn.Identity())
        try:
            assert torch_private_dynamo.compile_with_inductor(graph, [], None, {}) == [True, True]
        finally:
            go_on.set()
            for thread in threads:
                thread.join()

    @pytest.mark.filterwarnings("error")
    def test_a_failure_is_left_to_inductor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding", None)
        torch_private_dynamo.prepare_inductor().join()

    @pytest.mark.exhaustive
    def test_its_threads_import_no_module(self) -> None:
        """A child that is forked meanwhile would wait for ever if it imported the same one."""
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines() == ["kernel"]


# Prints what the threads import: the compiled kernel's file alone, whose path is its name.
IMPORTS = """
import sys, threading
from mxfp4_fx.core import torch_private_dynamo

def note(event, given):
    if event == "import" and threading.current_thread() is not threading.main_thread():
        print(given[0].rpartition(".")[2] if given[1] else given[0])

sys.addaudithook(note)
torch_private_dynamo.prepare_inductor().join()
"""
