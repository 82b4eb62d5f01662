"""The verdict on a model is on what ran: experts that no graph had are named, for any cause."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Graphs, Layers, compile_with, hidden, mlp, model, pack, tokens
from near_miss import mxfp4_ops
from processes import LAST_RESORT
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import mxfp4_fx
from mxfp4_fx import calls
from mxfp4_fx.core.errors import (
    MissedRewriteError,
    MissedRewriteWarning,
    NoExpertsWarning,
    OptionError,
)

NOT_IN_MXFP4 = "backend 'mxfp4': these MoE layers run as they were, not in MXFP4:"

pytestmark = pytest.mark.usefixtures("no_gradients")


def told(run: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(*args, **kwargs)
    kinds = (MissedRewriteWarning, NoExpertsWarning)
    return [str(w.message) for w in caught if issubclass(w.category, kinds)]


class Layer(nn.Module):
    """A graph break, then an MLP; Dynamo guards the layer's kind."""

    def __init__(self, seed: int, kind: str) -> None:
        super().__init__()
        self.mlp, self.kind = mlp(seed=seed), kind

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + self.mlp(x)[0] if self.kind else x


def breaking(*kinds: str) -> nn.Module:
    return nn.Sequential(*(Layer(seed, kind) for seed, kind in enumerate(kinds)))


class Disabled(nn.Module):
    """Experts that Dynamo is kept out of."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.inner = experts

    @torch.compiler.disable
    def forward(self, *args: Tensor) -> Any:
        return self.inner(*args)


def with_disabled_experts(module: nn.Module) -> nn.Module:
    module.experts = Disabled(module.experts)
    return module


class TestOutOfEveryGraph:
    def test_a_disabled_function(self) -> None:
        (message,) = told(compile_with(with_disabled_experts(mlp())), hidden())
        assert "experts.inner: it ran uncompiled: torch.compiler.disable keeps Dynamo" in message

    def test_is_an_error_when_strict(self) -> None:
        run = compile_with(with_disabled_experts(mlp()), options={"strict": True})
        for _ in range(2):  # at every call
            with pytest.raises(MissedRewriteError, match=r"experts\.inner: it ran uncompiled"):
                run(hidden())

    def test_packed_experts(self) -> None:
        (message,) = told(compile_with(with_disabled_experts(pack(mlp()))), hidden())
        assert "experts.inner: it ran uncompiled" in message

    def test_dynamos_limit(self) -> None:
        module = mlp()
        run = compile_with(module, dynamic=False, options={"strict": True})
        with torch._dynamo.config.patch(recompile_limit=2):
            for length in (3, 4):
                run(hidden(length))
            with pytest.raises(
                MissedRewriteError, match=r"compiles forward no more.*recompile_limit"
            ):
                run(hidden(5))

    def test_the_rest_of_many_layers(self) -> None:
        """Dynamo compiles as often as its limit allows, and the others run all the same."""
        module = breaking(*"abc")
        run = compile_with(module, dynamic=False)
        with torch._dynamo.config.patch(recompile_limit=1):
            assert not told(run, hidden(3))
            messages = told(run, hidden(4))
        assert len(messages) == 3
        for at, message in enumerate(messages):
            assert message.startswith(f"{NOT_IN_MXFP4}\n  {at}.mlp.experts: it ran uncompiled")
            assert "recompile_limit" in message

    def test_no_graph_at_all(self) -> None:
        module = mlp()
        module.forward = torch.compiler.disable(module.forward)
        with pytest.raises(MissedRewriteError, match="experts: it ran uncompiled"):
            compile_with(module, options={"strict": True})(hidden())

    def test_a_forward_that_is_called_past_its_hooks(self) -> None:
        run = compile_with(mlp().experts.forward, dynamic=False)
        with torch._dynamo.config.patch(recompile_limit=1):
            for length, count in ((3, 0), (4, 1)):
                routes = torch.zeros(length, 3, dtype=torch.long), torch.rand(length, 3)
                assert len(told(run, hidden(length)[0], *routes)) == count

    def test_a_wish_for_uncompiled_calls_is_told_and_no_error(self) -> None:
        run = compile_with(mlp(), options={"strict": True})
        with torch.compiler.set_stance("force_eager"):
            (message,) = told(run, hidden())
        assert "set_stance('force_eager') is on" in message

    def test_another_backend_is_left_alone(self) -> None:
        run = torch.compile(with_disabled_experts(mlp()), backend="eager")
        assert not told(run, hidden())

    def test_a_class_that_nobody_knows(self) -> None:
        class Mine(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up = nn.Parameter(torch.randn(4, 64, 32))
                self.down = nn.Parameter(torch.randn(4, 32, 64))

            @torch.compiler.disable
            def forward(self, x: Tensor) -> Tensor:
                return (x @ self.up @ self.down).sum(0)

        (message,) = told(compile_with(nn.Sequential(Mine())), hidden()[0])
        assert "0: it ran uncompiled" in message


class TestWhatRan:
    def test_a_part_without_experts_is_no_miss(self) -> None:
        """Hidden states as outputs break the graph; the head is then a graph of its own."""
        run = compile_with(model(num_hidden_layers=1), options={"strict": True})
        assert not told(run, tokens(), output_hidden_states=True)

    def test_a_part_that_is_compiled_by_itself_counts_for_the_whole(self) -> None:
        options = {"inner": "eager", "strict": True}
        module = mlp()
        module.experts.compile(backend="mxfp4", options=options)
        whole = nn.Sequential(with_disabled_experts(module))
        assert not told(compile_with(whole, options=options), hidden())

    def test_a_graph_that_serves_many_layers_names_each(self) -> None:
        module = breaking(*"aaa")
        assert [r.layer for r in mxfp4_fx.explain(module, hidden()).rewrites] == [
            f"{i}.mlp.experts" for i in range(3)
        ]

    def test_nothing_that_looks_like_experts(self) -> None:
        run = compile_with(nn.Linear(4, 3))
        (message,) = told(run, torch.zeros(2, 4))
        assert "nothing in what it called looks like a mixture of experts: Linear" in message
        assert not told(run, torch.zeros(2, 4))  # once a model ...
        assert told(compile_with(nn.Linear(4, 3)), torch.zeros(2, 4))  # ... and for each

    def test_a_function_without_modules_is_told_of_once(self) -> None:
        run = compile_with(lambda x: x + 1)
        assert [len(told(run, torch.zeros(2))) for _ in range(2)] == [1, 0]

    def test_nothing_that_looks_like_experts_is_an_error_when_strict(self) -> None:
        run = compile_with(nn.Linear(4, 3), options={"strict": True})
        for _ in range(2):
            with pytest.raises(MissedRewriteError, match="strict=True, and nothing"):
                run(torch.zeros(2, 4))

    def test_a_fault_of_the_model_is_not_covered_up(self) -> None:
        def fails(x: Tensor) -> Tensor:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            compile_with(fails, options={"strict": True})(torch.zeros(2))

    def test_a_warning_that_became_an_error_is_raised_for_each_model(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", MissedRewriteWarning)
            for _ in range(2):
                with pytest.raises(MissedRewriteWarning):
                    compile_with(with_disabled_experts(mlp()))(hidden())

    def test_two_models_of_one_kind_are_told_of_each(self) -> None:
        first, second = with_disabled_experts(mlp()), with_disabled_experts(mlp())
        assert told(compile_with(first), hidden())
        assert told(compile_with(second), hidden())

    def test_a_function_of_modules(self) -> None:
        module = with_disabled_experts(mlp())
        (message,) = told(compile_with(lambda x: module(x)[0]), hidden())
        assert "experts.inner: it ran uncompiled" in message

    def test_threads_do_not_see_each_other(self) -> None:
        run = compile_with(with_disabled_experts(mlp()), options={"strict": True})
        failures: list[BaseException] = []

        def call() -> None:
            try:
                with torch.no_grad():
                    run(hidden())
            except MissedRewriteError as error:
                failures.append(error)

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(failures) == 2


class Stage(nn.Module):
    """A part of a model, as a stage of a pipeline has it."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            result = part(x)
            x = result[0] if isinstance(result, tuple) else result
        return x


class TestParts:
    """``strict`` judges a model, also where its parts are compiled apart."""

    def test_a_stage_without_layers_may_have_no_experts(self) -> None:
        whole, x = model(num_hidden_layers=1), hidden()
        stages = Stage(whole.model.layers[0].mlp), Stage(whole.model.norm, whole.lm_head)
        last, first = (compile_with(stage, options={"strict": True}) for stage in stages[::-1])
        assert not told(last, x)
        assert not told(first, x)

    def test_a_part_of_a_model_that_was_called_may_have_no_experts(self) -> None:
        whole, x = nn.Sequential(nn.Linear(64, 64), Stage(mlp())), hidden()
        assert not told(compile_with(whole, options={"strict": True}), x)
        assert not told(compile_with(whole[0], options={"strict": True}), x)

    def test_layers_of_gpt_oss_without_experts_are_an_error(self) -> None:
        whole = model(num_hidden_layers=1)
        whole.model.layers[0].mlp = Stage(nn.Linear(64, 64), nn.Identity())
        whole.model.layers[0].mlp.forward = lambda x: (x, None)
        run = compile_with(whole, options={"strict": True})
        with pytest.raises(MissedRewriteError, match="compile the whole model, or this part"):
            run(tokens())

    def test_experts_that_a_call_does_not_reach_are_no_excuse(self) -> None:
        whole = nn.ModuleDict({"mlp": mlp(), "linear": nn.Linear(4, 3)})
        run = compile_with(lambda x: whole["linear"](x), options={"strict": True})
        with pytest.raises(MissedRewriteError, match="strict=True, and nothing"):
            run(torch.zeros(2, 4))


class TestNothingStays:
    @pytest.mark.parametrize("options", [{}, {"skip": ["experts"]}])
    def test_on_the_module(self, options: dict[str, Any]) -> None:
        module = mlp()
        before = copy.copy(vars(module.experts))
        compile_with(module, options=options)(hidden())
        assert {**vars(module.experts)}.keys() == before.keys()
        assert not module.experts._forward_hooks

    def test_if_the_end_of_a_compilation_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = mlp()

        def fail(call: calls.Call) -> None:
            raise RuntimeError("no results are kept")

        monkeypatch.setattr(calls.Call, "traced", fail)
        with pytest.raises(RuntimeError, match="no results are kept"):
            compile_with(module)(hidden())
        assert calls.current() is None
        assert calls.HOOK not in module.experts._forward_hooks

    def test_after_an_error(self) -> None:
        module = mlp()
        with pytest.raises(RuntimeError):
            compile_with(module)(torch.zeros(1, 7, 63))
        assert not module.experts._forward_hooks


class TestExplain:
    def test_uses_up_no_limit(self) -> None:
        module = mlp()
        graphs = Graphs()
        with torch._dynamo.config.patch(recompile_limit=1):
            for kernels in ("auto", "reference"):
                mxfp4_fx.explain(module, hidden(), options={"kernels": kernels})
            compile_with(module, graphs, options={"strict": True})(hidden())
        assert len(graphs.seen) == 1

    def test_is_not_affected_by_what_was_compiled_before(self) -> None:
        module = mlp()
        run = compile_with(module, dynamic=False)
        with torch._dynamo.config.patch(recompile_limit=1):
            assert [len(told(run, hidden(length))) for length in (3, 4)] == [0, 1]
            assert len(mxfp4_fx.explain(module, hidden(5)).rewrites) == 1


def skipping(whole: nn.Module, *patterns: str) -> tuple[Callable[..., Any], Graphs]:
    graphs = Graphs()
    return compile_with(whole, graphs, options={"skip": [*patterns]}), graphs


def layers(graphs: Graphs) -> int:
    return mxfp4_ops(graphs).count("mxfp4.matmul_ogs.default") // 2


class TestSkip:
    def test_a_module_and_all_in_it(self) -> None:
        run, graphs = skipping(Layers(), "layers.1")
        run(hidden())
        assert layers(graphs) == 1

    @pytest.mark.parametrize("pattern", ["layers.7.*", "layer.1"])
    def test_what_names_nothing_is_an_error(self, pattern: str) -> None:
        run, _ = skipping(Layers(), pattern)
        with pytest.raises(BackendCompilerFailed, match="names no module of Layers") as e:
            run(hidden())
        assert isinstance(e.value.inner_exception, OptionError)

    def test_names_are_those_of_what_is_compiled(self) -> None:
        whole = Layers()
        layer = whole.layers[0]
        layer.compile(backend="mxfp4", options={"inner": "eager", "skip": ["layers.0.*"]})
        with pytest.raises(BackendCompilerFailed, match=r"its experts are experts"):
            whole(hidden())

    def test_layers_that_share_a_graph(self) -> None:
        module = breaking(*"aaa")
        run, _ = skipping(module, "1")
        expected = module(hidden())
        assert not told(run, hidden())
        explained = mxfp4_fx.explain(module, hidden(), options={"skip": ["1"]})
        assert [r.layer for r in explained.rewrites] == ["0.mlp.experts", "2.mlp.experts"]
        assert [(m.layer, m.skipped) for m in explained.misses] == [("1.mlp.experts", True)]
        torch.testing.assert_close(run(hidden()), expected)


def kept(module: Any) -> Any:
    """As the loader leaves experts that the user skipped."""
    module.experts._mxfp4_fx_keep_dense = True
    return module


class TestKeptDense:
    @pytest.mark.parametrize("kept_first", [True, False])
    def test_a_graph_is_not_shared_with_what_is_not_kept(self, kept_first: bool) -> None:
        runs = [(kept(mlp()), 0), (mlp(), 1)]
        for module, expected in runs if kept_first else runs[::-1]:
            graphs = Graphs()
            compile_with(module, graphs)(hidden())
            assert layers(graphs) == expected

    def test_is_told_as_what_it_is(self) -> None:
        (miss,) = mxfp4_fx.explain(kept(mlp()), hidden()).misses
        assert miss.skipped
        assert miss.reason.startswith("kept dense")

    def test_outlives_new_parameters(self) -> None:
        module = kept(mlp())
        module.load_state_dict(mlp(seed=1).state_dict(), assign=True)
        graphs = Graphs()
        compile_with(module, graphs)(hidden())
        assert layers(graphs) == 0


WAYS = {
    "the function is compiled": """
def run(module, x):
    return module(x)[0]
run = torch.compile(run, backend="mxfp4", options=OPTIONS)
run(make(), torch.randn(1, 7, 64))
""",
    "the function is called": """
run = torch.compile(module_of, backend="mxfp4", options=OPTIONS)
assert "transformers" not in sys.modules
torch.compiler.reset()
run(torch.randn(1, 7, 64))
""",
    "the backend is forced": """
import mxfp4_fx.backend
assert "transformers" not in sys.modules
run = torch.compile(module_of, backend="eager")
with torch.compiler.set_stance("default", force_backend="mxfp4"):
    run(torch.randn(1, 7, 64))
""",
}


FRESH = "before anything of Dynamo"

# A child for each way. The first is of a process that has imported torch alone; the others are of
# one that has imported what takes longest, and no transformers.
IN_CHILDREN = """
import json, os, signal, sys
import torch

OPTIONS = {"inner": "eager", "strict": True}
torch.set_grad_enabled(False)

def make():
    from models import mlp
    return mlp(form="eager")

def be_child(way):
    assert "transformers" not in sys.modules
    exec(way, globals())
    from mxfp4_fx.weights.store import STORE
    assert STORE.swizzled == 2, STORE.swizzled

def status(way):
    child = os.fork()
    if not child:
        signal.alarm(int(sys.argv[3]))
        be_child(way)
        sys.exit()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

ways, fresh = json.loads(sys.argv[1]), sys.argv[2]
assert "torch._dynamo" not in sys.modules
statuses = {fresh: status(ways["the function is compiled"])}

import torch._inductor.compile_fx

def module_of(x, make=torch.compiler.disable(make)):
    return make()(x)[0]

statuses |= {name: status(way) for name, way in ways.items()}
print(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def statuses() -> dict[str, int]:
    """How each way's process ended; what they say of an error is in the test's output."""
    arguments = json.dumps(WAYS), FRESH, str(int(LAST_RESORT))
    told = subprocess.check_output(
        [sys.executable, "-c", IN_CHILDREN, *arguments], cwd=Path(__file__).parent, text=True
    )
    found: dict[str, int] = json.loads(told.splitlines()[-1])
    return found


class TestWaysIn:
    def test_a_partial_of_the_backend(self) -> None:
        backend = functools.partial(mxfp4_fx.mxfp4, options={"inner": "eager", "strict": True})
        assert not told(torch.compile(mlp(form="eager"), backend=backend), hidden())

    def test_in_place(self) -> None:
        module = with_disabled_experts(mlp())
        module.compile(backend="mxfp4", options={"inner": "eager", "strict": True})
        with pytest.raises(MissedRewriteError):
            module(hidden())

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("way", [FRESH, *WAYS])
    def test_before_transformers_is_imported(self, way: str, statuses: dict[str, int]) -> None:
        """The eager experts are captured as a whole all the same."""
        assert statuses[way] == 0


@pytest.fixture(autouse=True)
def all_limits_are_torchs() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
